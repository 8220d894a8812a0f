# SPDX-License-Identifier: Apache-2.0
"""An estimate of the memory that a run needs on each device, from the model's dimensions and the configuration.

It is for dense models, trained whole by FSDP with AdamW. A mixture of experts or LoRA needs other amounts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig
from transformers import AutoConfig, AutoModelForCausalLM
from verl.steer.preflight.machine import device_memory, on_cpu
from verl.steer.preflight.rows import GIB
from verl.utils.torch_dtypes import PrecisionType

#: Bytes that a phase takes beside its tensors: CUDA contexts, NCCL's buffers and fragments of the allocator; on a CPU
#: the modules that a rank's share of the processes has imported.
OVERHEAD = 3 * GIB

#: Tensors of the logits' size and dtype in forward and backward: in one pass the gradient overwrites the logits; verl's
#: separate functions take about seven times as much more (docs/performance.md).
LOGITS = {True: 1, False: 8}

#: What to do where a phase needs too much.
REMEDIES = {
    "generation": "lower rollout.gpu_memory_utilization, or set actor.fsdp_config.param_offload and optimizer_offload",
    "log-probs": "lower rollout.log_prob_micro_batch_size_per_gpu",
    "update": "lower actor.ppo_micro_batch_size_per_gpu, take more GPUs, or set actor.fsdp_config.offload_policy=true",
}


@dataclass
class ModelSize:
    """Dimensions of a decoder: numbers of parameters, and widths in elements for each token."""

    parameters: int
    embeddings: int
    """Parameters of the embedding, and of an output layer that is not tied to it."""
    layers: int
    hidden: int
    query: int
    key: int
    feed_forward: int
    vocabulary: int

    @classmethod
    def of(cls, config: DictConfig) -> ModelSize:
        """The dimensions of the configured model."""
        model = config.actor_rollout_ref.model
        return cls.of_model(AutoConfig.from_pretrained(model.path, trust_remote_code=model.trust_remote_code))

    @classmethod
    def of_model(cls, model_config: Any) -> ModelSize:
        """The dimensions of a model of transformers, built without storage to count its parameters."""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model_config)
        text = model_config.get_text_config()
        head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return cls(
            parameters=sum(p.numel() for p in model.parameters()),
            embeddings=text.vocab_size * text.hidden_size * (1 if text.tie_word_embeddings else 2),
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            query=head * text.num_attention_heads,
            key=head * text.num_key_value_heads,
            feed_forward=text.intermediate_size,
            vocabulary=text.vocab_size,
        )


def _bytes(precision: str) -> int:
    return PrecisionType.to_dtype(precision).itemsize


def master_bytes(actor: DictConfig) -> int:
    """Bytes of each trained weight, and of each of its moments."""
    return _bytes(actor.fsdp_config.model_dtype or "fp32")


def phases(size: ModelSize, config: DictConfig, memory: float) -> dict[str, float]:
    """Bytes that each phase of a step needs on one device.

    For each token a layer with rotary attention and a gated feed-forward saves for the backward pass: the two norms'
    inputs, their float32 copies and their outputs; queries, keys and values, queries and keys rotated; attention's
    output; gate, up, activation and product of the feed-forward. With checkpointing only its input is saved, and one
    layer at a time computes the rest again.

    Args:
        size: the model's.
        config: the run's.
        memory: of a device, bytes; vLLM takes a share of a GPU's.
    """
    ref = config.actor_rollout_ref
    actor, rollout, fsdp = ref.actor, ref.rollout, ref.actor.fsdp_config
    world = config.trainer.nnodes * config.trainer.n_gpus_per_node
    shards = world if fsdp.fsdp_size in (-1, None) else min(world, fsdp.fsdp_size)
    compute = _bytes((fsdp.get("mixed_precision") or {}).get("param_dtype", "bf16"))
    weights = size.parameters * master_bytes(actor) / shards
    if fsdp.offload_policy:
        weights = 0.0
    moments = 2 * weights * (not fsdp.optimizer_offload)

    layer = (size.parameters - size.embeddings) / size.layers
    gathered = compute * (size.embeddings + 2 * layer)  # the next layer is gathered while one computes
    reduced = (compute + 4) * max(size.embeddings, layer)  # a gradient, and its float32 copy on the way to its shards
    saved = compute * (4 * size.hidden + 3 * size.query + 3 * size.key + 4 * size.feed_forward) + 8 * size.hidden

    def tokens(micro_batch: int | None, dynamic: bool, most: int) -> float:
        length = config.data.max_prompt_length + config.data.max_response_length
        return (most if dynamic or not micro_batch else micro_batch * length) / actor.ulysses_sequence_parallel_size

    def logits(count: float) -> float:
        return count * size.vocabulary * compute

    trained = tokens(actor.ppo_micro_batch_size_per_gpu, actor.use_dynamic_bsz, actor.ppo_max_token_len_per_gpu)
    kept = size.hidden * compute * size.layers + saved
    if not ref.model.enable_gradient_checkpointing:
        kept = saved * size.layers
    scored = tokens(
        rollout.log_prob_micro_batch_size_per_gpu,
        rollout.log_prob_use_dynamic_bsz,
        rollout.log_prob_max_token_len_per_gpu,
    )
    copies = LOGITS[bool(fsdp.get("one_pass_reductions"))]
    generation = rollout.gpu_memory_utilization * memory
    if on_cpu(config):
        generation = size.parameters * _bytes(rollout.dtype) + rollout.engine_kwargs.vllm.kv_cache_memory_bytes
    # vLLM sleeps while the model is trained, except on a CPU.
    awake = 0.0 if rollout.free_cache_engine else generation
    return {
        "generation": OVERHEAD + weights * (not fsdp.param_offload) + moments + generation,
        "log-probs": OVERHEAD + awake + weights + moments + gathered + scored * saved + copies * logits(scored),
        "update": OVERHEAD + awake + 4 * weights + gathered + reduced + trained * kept + copies * logits(trained),
    }


def check_memory(config: DictConfig) -> str:
    """Whether each phase fits into a device's memory, by the estimate.

    Raises:
        ValueError: if one does not.
    """
    memory = device_memory(config)
    needed = phases(ModelSize.of(config), config, memory)
    text = ", ".join(f"{phase} {amount / GIB:.1f} GiB" for phase, amount in needed.items())
    text = f"{text} of {memory / GIB:.1f} GiB for each rank (estimate)"
    if too_much := [REMEDIES[phase] for phase, amount in needed.items() if amount > memory]:
        raise ValueError(f"{text}: {'; '.join(too_much)}")
    return text
