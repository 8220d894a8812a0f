# SPDX-License-Identifier: Apache-2.0
"""An estimate of the memory that a run needs on each device, from the model's dimensions and the configuration.

It is for dense decoders with rotary attention and a gated feed-forward, trained whole by FSDP with AdamW.
"""

from __future__ import annotations

from typing import Any

import torch
from omegaconf import DictConfig
from transformers import AutoConfig, AutoModelForCausalLM
from verl.steer.preflight.machine import device_memory
from verl.steer.preflight.rows import GIB
from verl.utils.torch_dtypes import PrecisionType

#: Bytes of a process beside the tensors below: CUDA contexts, NCCL's buffers, fragments; on a CPU its modules.
OVERHEAD = 3 * GIB

#: What to do where a phase needs too much.
REMEDIES = {
    "generation": "lower rollout.gpu_memory_utilization, or set actor.fsdp_config.optimizer_offload=true",
    "log-probs": "lower rollout.log_prob_micro_batch_size_per_gpu",
    "update": "lower actor.ppo_micro_batch_size_per_gpu, take more GPUs, or set actor.strategy=fsdp2 and "
    "actor.fsdp_config.offload_policy=true",
}


def model_of(config: DictConfig) -> tuple[int, Any]:
    """The configured model's number of parameters, counted in a model without storage, and its configuration."""
    model = config.actor_rollout_ref.model
    found = AutoConfig.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(found).num_parameters(), found.get_text_config()


def weight_bytes(actor: DictConfig) -> int:
    """Bytes of a trained weight, of its gradient and of each of its moments."""
    return PrecisionType.to_dtype(actor.fsdp_config.model_dtype or "fp32").itemsize


def phases(parameters: int, model: Any, config: DictConfig, memory: float) -> dict[str, float]:
    """Bytes that each phase of a step needs on a device.

    For a token a layer saves the two norms' inputs, their float32 copies and their outputs; queries, keys and values,
    queries and keys rotated, attention's output; gate, up, activation and product. With checkpointing it saves its
    input, and one layer at a time computes the rest again. Logits: with one pass the gradient overwrites them, while
    verl's functions keep about seven times as much beside them (docs/performance.md).

    Args:
        parameters: of the model.
        model: its configuration in transformers.
        memory: of a device, bytes; vLLM takes `gpu_memory_utilization` of it.
    """
    root, data = config.actor_rollout_ref, config.data
    actor, rollout, fsdp, world = root.actor, root.rollout, root.actor.fsdp_config, config.trainer.n_gpus_per_node
    world *= config.trainer.nnodes
    compute = PrecisionType.to_dtype((fsdp.get("mixed_precision") or {}).get("param_dtype", "bf16")).itemsize
    shard = parameters * weight_bytes(actor) / (world if fsdp.fsdp_size == -1 else fsdp.fsdp_size)
    offloaded = fsdp.offload_policy and actor.strategy == "fsdp2"  # verl's FSDP1 ignores it
    weights, moments = (0.0, 0.0) if offloaded else (shard, 2 * shard * (not fsdp.optimizer_offload))

    head = getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
    heads = head * (model.num_attention_heads + model.num_key_value_heads)
    embedding = model.vocab_size * model.hidden_size * (1 if model.tie_word_embeddings else 2)
    layer = (parameters - embedding) / model.num_hidden_layers
    # FSDP gathers the next layer while one computes, and reduces a gradient in float32.
    gathered, reduced = compute * (embedding + 2 * layer), (compute + 4) * max(embedding, layer)
    saved = compute * (4 * model.hidden_size + 3 * heads + 4 * model.intermediate_size) + 8 * model.hidden_size
    kept = saved * model.num_hidden_layers
    if root.model.enable_gradient_checkpointing:
        kept = saved + compute * model.hidden_size * model.num_hidden_layers
    logits = model.vocab_size * compute * (1 if fsdp.get("one_pass_reductions") else 8)

    def tokens(micro_batch: int | None, dynamic: bool, most: int) -> float:
        whole = (
            most if dynamic or not micro_batch else micro_batch * (data.max_prompt_length + data.max_response_length)
        )
        return whole / actor.ulysses_sequence_parallel_size

    updated = tokens(actor.ppo_micro_batch_size_per_gpu, actor.use_dynamic_bsz, actor.ppo_max_token_len_per_gpu)
    size, dynamic = rollout.log_prob_micro_batch_size_per_gpu, rollout.log_prob_use_dynamic_bsz
    scored = tokens(size, dynamic, rollout.log_prob_max_token_len_per_gpu)
    vllm = rollout.gpu_memory_utilization * memory
    if config.trainer.device == "cpu":
        vllm = parameters * PrecisionType.to_dtype(rollout.dtype).itemsize
        vllm += rollout.engine_kwargs.vllm.kv_cache_memory_bytes
    awake = OVERHEAD + (0.0 if rollout.free_cache_engine else vllm)
    return {
        "generation": OVERHEAD + vllm + weights * (not fsdp.param_offload) + moments,
        "log-probs": awake + weights + moments + gathered + scored * (saved + logits),
        "update": awake + 4 * weights + gathered + reduced + updated * (kept + logits),
    }


def check_memory(config: DictConfig) -> str:
    """Whether every phase fits into a device, by the estimate."""
    memory = device_memory(config)
    needed = phases(*model_of(config), config, memory)
    found = ", ".join(f"{phase} {amount / GIB:.1f}" for phase, amount in needed.items())
    found = f"{found} of {memory / GIB:.1f} GiB for each rank, estimated"
    if remedies := [REMEDIES[phase] for phase, amount in needed.items() if amount > memory]:
        raise ValueError(f"{found}: {'; '.join(remedies)}")
    return found
