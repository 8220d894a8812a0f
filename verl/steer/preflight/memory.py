# SPDX-License-Identifier: Apache-2.0
"""An estimate of the memory that a run needs on each device, from the model's dimensions and the configuration.

It is for dense decoders with rotary attention and a gated feed-forward, trained by FSDP with AdamW, whole or with
LoRA; a critic is such a decoder too.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification
from verl.steer.methods.registry import fields_needed
from verl.steer.preflight.machine import device_memory
from verl.steer.preflight.rows import GIB
from verl.steer.requirements.verl_values import as_dataclass
from verl.trainer.ppo.core_algos import INFLUENCE, weighs_mini_batches
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.utils.py_functional import convert_to_regular_types
from verl.utils.torch_dtypes import PrecisionType

#: Bytes of a process beside the tensors below: CUDA contexts, NCCL's buffers, fragments; on a CPU its modules.
OVERHEAD = 3 * GIB

#: What to do where a phase needs too much.
REMEDIES = {
    "generation": "lower rollout.gpu_memory_utilization, or set actor.fsdp_config.optimizer_offload=true",
    "weights to vLLM": "set rollout.layered_summon=true and rollout.load_format=safetensors, or actor.strategy=fsdp2",
    "log-probs": "lower rollout.log_prob_micro_batch_size_per_gpu, or set hardware=gpu8_long",
    "update": "lower actor.ppo_micro_batch_size_per_gpu, set hardware=gpu8_long, take more GPUs, or set "
    "actor.strategy=fsdp2 and actor.fsdp_config.offload_policy=true",
    "best checkpoint": "lower rollout.gpu_memory_utilization, or set actor.fsdp_config.param_offload=false",
    "critic's update": "lower critic.ppo_micro_batch_size_per_gpu, take more GPUs, or set critic.strategy=fsdp2 and "
    "critic.fsdp.offload_policy=true",
}


class Size(NamedTuple):
    """How many parameters a model has, how many of them are trained, and its configuration in transformers."""

    parameters: int
    trained: int
    model: Any


class State(NamedTuple):
    """Bytes on a device of a model's weights while it computes, of their gradients, and of the moments that stay."""

    weights: float
    gradients: float
    moments: float


class Passes(NamedTuple):
    """Bytes that a model's passes take on a device beside its shard, or for each token of a micro-batch."""

    gathered: float
    reduced: float
    #: For a token, by one layer, and by all layers until the backward pass.
    saved: float
    kept: float


def model_of(config: DictConfig) -> Size:
    """The configured model, its parameters counted in a model without storage."""
    return _counted(config.actor_rollout_ref.model, AutoModelForCausalLM)


def critic_of(config: DictConfig) -> Size:
    """The same of the critic, whose head has a single output."""
    return _counted(config.critic.model, AutoModelForTokenClassification)


def _counted(model: DictConfig, auto_class: Any) -> Size:
    found = AutoConfig.from_pretrained(model.path, trust_remote_code=model.trust_remote_code, num_labels=1)
    with torch.device("meta"):
        module = auto_class.from_config(found)
        if model.lora_rank > 0:
            targets, others = map(convert_to_regular_types, (model.target_modules, model.get("exclude_modules")))
            adapter = LoraConfig(r=model.lora_rank, target_modules=targets, exclude_modules=others)
            module = get_peft_model(module, adapter)
    trained = module.num_parameters(only_trainable=True)
    return Size(module.num_parameters(), trained, found.get_text_config())


def weight_bytes(fsdp: DictConfig) -> int:
    """Bytes of a weight, and in training of its gradient and of each of its moments."""
    return PrecisionType.to_dtype(fsdp.model_dtype or "fp32").itemsize


def has_reference(config: DictConfig) -> bool:
    """Whether a run has a second model for a KL term; with LoRA that is the actor without its adapter."""
    model = config.actor_rollout_ref.model
    adapter = model.lora.rank > 0 or model.lora_rank > 0 or model.lora_adapter_path is not None
    return need_reference_policy(config) and not adapter


def shard_of(parameters: int, fsdp: DictConfig, config: DictConfig) -> float:
    """Bytes of a device's part of so many weights."""
    world = config.trainer.n_gpus_per_node * config.trainer.nnodes
    shared = world if fsdp.fsdp_size < 0 else min(fsdp.fsdp_size, world)
    return parameters * weight_bytes(fsdp) / shared


def trained_state(size: Size, fsdp: DictConfig, strategy: str, config: DictConfig) -> State:
    """What a trained model keeps on a device between its passes."""
    if fsdp.offload_policy and strategy == "fsdp2":  # verl's FSDP1 ignores it
        return State(0.0, 0.0, 0.0)
    gradients = shard_of(size.trained, fsdp, config)
    return State(shard_of(size.parameters, fsdp, config), gradients, 2 * gradients * (not fsdp.optimizer_offload))


def compute_bytes(fsdp: DictConfig) -> int:
    """Bytes of a number in a model's passes."""
    return PrecisionType.to_dtype((fsdp.get("mixed_precision") or {}).get("param_dtype", "bf16")).itemsize


def passes_of(size: Size, embedding: int, compute: int, checkpointing: bool) -> Passes:
    """The memory of a model's passes, without logits.

    For a token a layer saves the two norms' inputs, their float32 copies and their outputs; queries, keys and values,
    queries and keys rotated, attention's output; gate, up, activation and product. With checkpointing it saves its
    input, and one layer at a time computes the rest again.

    Args:
        size: of the model.
        embedding: how many of the parameters are outside of the layers.
        compute: bytes of a number.
        checkpointing: of gradients.
    """
    parameters, trained, model = size
    head = getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
    heads = head * (model.num_attention_heads + model.num_key_value_heads)
    layer = (parameters - embedding) / model.num_hidden_layers
    saved = compute * (4 * model.hidden_size + 3 * heads + 4 * model.intermediate_size) + 8 * model.hidden_size
    kept = saved * model.num_hidden_layers
    if checkpointing:
        kept = saved + compute * model.hidden_size * model.num_hidden_layers
    # FSDP gathers the next layer while one computes, and reduces a gradient in float32; LoRA trains a part of a layer.
    reduced = max(embedding, layer) if trained == parameters else trained / model.num_hidden_layers
    return Passes(compute * (embedding + 2 * layer), (compute + 4) * reduced, saved, kept)


def tokens_of(micro_batch: int | None, dynamic: bool, most: int, ranks: int, config: DictConfig) -> float:
    """Tokens of a micro-batch on each of the ranks that share its sequences; `most` is a rank's."""
    longest = config.data.max_prompt_length + config.data.max_response_length
    return most if dynamic or not micro_batch else micro_batch * longest / ranks


def _micro_batches(config: DictConfig) -> tuple[float, float]:
    """Tokens of the actor's micro-batches on a device, in an update and for the log-probs."""
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    share, most = actor.ulysses_sequence_parallel_size, rollout.log_prob_max_token_len_per_gpu
    size, dynamic = actor.ppo_micro_batch_size_per_gpu, actor.use_dynamic_bsz
    updated = tokens_of(size, dynamic, actor.ppo_max_token_len_per_gpu, share, config)
    size, dynamic = rollout.log_prob_micro_batch_size_per_gpu, rollout.log_prob_use_dynamic_bsz
    return updated, tokens_of(size, dynamic, most, share, config)


def phases(size: Size, config: DictConfig, memory: float) -> dict[str, float]:
    """Bytes that each phase of a step needs on a device.

    Logits: with one pass the gradient overwrites them, while verl's functions keep about seven times as much beside
    them (docs/performance.md); the entropy of a nucleus has a gradient of its own, which autograd adds. verl always
    keeps a reference model in the machine's memory, which is the device on a CPU, and gathers it layer by layer: its
    pass needs no more than that for the log-probs.

    Args:
        size: of the model.
        memory: of a device, bytes; vLLM takes `gpu_memory_utilization` of it.
    """
    root, on_cpu = config.actor_rollout_ref, config.trainer.device == "cpu"
    actor, rollout, fsdp = root.actor, root.rollout, root.actor.fsdp_config
    model, compute = size.model, compute_bytes(fsdp)
    state = trained_state(size, fsdp, actor.strategy, config)
    embedding = model.vocab_size * model.hidden_size * (1 if model.tie_word_embeddings else 2)
    passes = passes_of(size, embedding, compute, root.model.enable_gradient_checkpointing)
    if not fsdp.reshard_after_forward:  # all layers stay together until the backward pass
        passes = passes._replace(gathered=compute * size.parameters)
    logits = model.vocab_size * compute * (1 if fsdp.get("one_pass_reductions") else 8)
    has_nucleus = "nucleus_entropys" in fields_needed(as_dataclass(config, "policy_loss"))
    together = passes.gathered + passes.reduced
    of_nucleus = 2 * model.vocab_size * compute if has_nucleus else 0
    updated, scored = _micro_batches(config)
    vllm = vllm_bytes(size.parameters, config, memory)
    reference = shard_of(size.parameters, root.ref.fsdp_config, config) if on_cpu and has_reference(config) else 0.0
    critic, critic_update = critic_memory(config) if need_critic(config) else (0.0, 0.0)
    updating = state.weights + (4 if _keeps_a_direction(config) else 3) * state.gradients  # and two moments
    if fsdp.use_no_sync_for_gradient_accumulation:  # whole gradients add up over the micro-batches
        updating += size.trained * (4 if actor.strategy == "fsdp2" else compute)
    awake = OVERHEAD + reference + (0.0 if rollout.free_cache_engine else vllm)
    present, waiting = state.weights + state.moments, state.weights * (not fsdp.param_offload) + state.moments
    needed = {
        "generation": OVERHEAD + reference + critic + vllm + waiting,
        "log-probs": awake + critic + present + passes.gathered + scored * (passes.saved + logits),
        "update": awake + critic + updating + together + updated * (passes.kept + logits + of_nucleus),
    }
    if root.model.lora_rank > 0 and actor.strategy == "fsdp" and not rollout.layered_summon:
        whole = size.parameters * weight_bytes(fsdp)
        received = size.parameters * PrecisionType.to_dtype(rollout.dtype).itemsize / rollout.tensor_model_parallel_size
        needed["weights to vLLM"] = OVERHEAD + reference + critic + present + whole + received
    if _saves_best(config):  # after a validation, when vLLM is awake; a part of the model is gathered in float32
        largest = 4 * max(embedding, (size.parameters - embedding) / model.num_hidden_layers)
        needed["best checkpoint"] = OVERHEAD + reference + critic + vllm + present + largest
    return needed | ({"critic's update": awake + waiting + critic_update} if critic_update else {})


def vllm_bytes(parameters: int, config: DictConfig, memory: float) -> float:
    """Bytes that vLLM takes of a device with so much memory."""
    rollout = config.actor_rollout_ref.rollout
    if config.trainer.device != "cpu":
        return rollout.gpu_memory_utilization * memory
    weights = parameters * PrecisionType.to_dtype(rollout.dtype).itemsize
    return weights + rollout.engine_kwargs.vllm.kv_cache_memory_bytes


def _keeps_a_direction(config: DictConfig) -> bool:
    """Whether a direction of the trained parameters' size, for the influence, lasts until the update."""
    options, audit = as_dataclass(config, "policy_loss"), config.trainer.get("entropy_audit") or {}
    controlled = weighs_mini_batches(options) and options.entropy_change_estimator == INFLUENCE
    return (controlled and options.influence_way == "parameters") or bool(audit.get("freq") and audit.get("influence"))


def _saves_best(config: DictConfig) -> bool:
    return config.trainer.get("save_best_only", False) or config.trainer.get("best_metric_key") is not None


def critic_memory(config: DictConfig) -> tuple[float, float]:
    """Bytes of the critic on a device, in the actor's phases and in its own update."""
    critic, fsdp = config.critic, config.critic.fsdp
    found = critic_of(config)
    state = trained_state(found, fsdp, critic.strategy, config)
    embedding = found.model.vocab_size * found.model.hidden_size
    passes = passes_of(found, embedding, compute_bytes(fsdp), critic.model.enable_gradient_checkpointing)
    size, most = critic.ppo_micro_batch_size_per_gpu, critic.ppo_max_token_len_per_gpu
    updated = tokens_of(size, critic.use_dynamic_bsz, most, fsdp.ulysses_sequence_parallel_size, config)
    update = state.weights + 3 * state.gradients + passes.gathered + passes.reduced + updated * passes.kept
    return state.weights * (not fsdp.param_offload) + state.moments, update


def check_memory(config: DictConfig) -> str:
    """Whether every phase fits into a device, by the estimate."""
    memory = device_memory(config)
    needed = phases(model_of(config), config, memory)
    found = ", ".join(f"{phase} {amount / GIB:.1f}" for phase, amount in needed.items())
    found = f"{found} of {memory / GIB:.1f} GiB for each rank, estimated"
    if remedies := [REMEDIES[phase] for phase, amount in needed.items() if amount > memory]:
        raise ValueError(f"{found}: {'; '.join(remedies)}")
    return found
