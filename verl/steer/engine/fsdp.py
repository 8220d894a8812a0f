# SPDX-License-Identifier: Apache-2.0
"""verl's FSDP engine, with one reading of the logits, the range of a mini-batch and the entropy audit; on a CPU too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.distributed.tensor import DTensor
from verl.steer.audit.update import EntropyAudit
from verl.steer.config import FSDPEngineConfig
from verl.steer.cpu import packed_attention  # noqa: F401 - registers packed_sdpa
from verl.steer.engine.nucleus import nucleus_entropy
from verl.steer.engine.vocab_reductions import vocab_reductions
from verl.steer.gc_heap import freeze_gc_heap
from verl.utils import tensordict_utils as tu
from verl.workers.engine.base import EngineRegistry

#: Flags of a micro-batch whose outputs verl's own code must compute: it has no whole logits then, or returns more of
#: them than these reductions.
VERL_ONLY = ("use_fused_kernels", "distillation_use_topk", "distillation_only")


# FSDP2 shards on the CPU over gloo. FSDP1 needs an accelerator, and verl's error says so.
@EngineRegistry.register(model_type="language_model", backend="fsdp2", device="cpu")
@EngineRegistry.register(model_type="language_model", backend=["fsdp", "fsdp2"], device="cuda", vendor="nvidia")
class SteerFSDPEngineWithLMHead(EntropyAudit):
    """verl's engine; with `fsdp_config.one_pass_reductions` it reads the logits once for log-prob and entropy.

    verl's separate functions for log-prob, entropy and Σπ² each read the logits at least once and keep copies of them.
    """

    engine_config: FSDPEngineConfig

    def initialize(self) -> None:
        """Build the model; later garbage collections skip the objects made so far."""
        # verl has read the implementation and keeps it in the model's configuration too. A checkpoint with one that
        # only this fork registers could not be loaded elsewhere.
        vars(self.model_config.hf_config).pop("attn_implementation", None)
        super().initialize()
        freeze_gc_heap()

    def prepare_model_outputs(
        self, output: Any, output_args: dict[str, Any], micro_batch: TensorDict, logits_processor_func: Callable | None
    ) -> dict[str, Tensor]:
        """verl's outputs, and with `calculate_sum_pi_squared` also `sum_pi_squared_log_pi`, Σπ² ln π in nats.

        With the number `nucleus_p` also `nucleus_entropy`, of the nucleus with this probability.

        Args:
            output: the model's output with `logits`, (1, packed tokens, vocabulary) where padding is removed, else
                (batch, longest, vocabulary).
            output_args: second result of `prepare_model_inputs`.
            micro_batch: nested tensors and flags, such as `calculate_entropy`.
            logits_processor_func: of distillation, which verl's own code calls.

        Returns:
            Nested tensors (batch, tokens of each sequence), float32. If `_hidden_states` keeps them, also `hidden`,
            (batch, tokens of each sequence, hidden size).
        """

        def flag(name: str, default: bool = False) -> bool:
            return tu.get_non_tensor_data(data=micro_batch, key=name, default=default)

        if not self.engine_config.one_pass_reductions or any(flag(name) for name in VERL_ONLY):
            return super().prepare_model_outputs(output, output_args, micro_batch, logits_processor_func)
        logits = output.logits.full_tensor() if isinstance(output.logits, DTensor) else output.logits
        offsets = micro_batch["input_ids"].offsets()
        labels = output_args["input_ids_rmpad_rolled"]
        packed = flag("use_remove_padding", default=True)
        if packed:
            logits, temperature = logits.squeeze(0), output_args["temperature_rmpad"]
        else:
            batch, longest = logits.shape[:2]
            index = _packed_index(offsets, len(labels), longest)
            labels = labels.new_zeros(batch * longest).index_copy_(0, index, labels).view(batch, longest)
            temperature = output_args["temperature"].unsqueeze(-1)
        if output_args.get("temperature_is_one", False):
            temperature = None
        nucleus_p = tu.get_non_tensor_data(data=micro_batch, key="nucleus_p", default=None)
        reductions = vocab_reductions(
            logits,
            labels,
            temperature,
            with_entropy=flag("calculate_entropy"),
            with_squares=flag("calculate_sum_pi_squared"),
            inplace_backward=nucleus_p is None,  # else autograd orders two backward passes that read them
        )

        def nested(values: Tensor) -> Tensor:
            if packed:
                values = self._gather_and_unpad_packed(values, output_args["pad_size"])
            else:
                values = values.flatten(0, 1).index_select(0, index)
            return torch.nested.nested_tensor_from_jagged(values, offsets)

        outputs = {
            "log_probs": reductions.log_prob,
            "entropy": reductions.entropy,
            "sum_pi_squared": reductions.sum_pi_squared,
            "sum_pi_squared_log_pi": reductions.sum_pi_squared_log_pi,
            "nucleus_entropy": None if nucleus_p is None else nucleus_entropy(logits, nucleus_p, temperature),
            "hidden": self.hidden.squeeze(0) if self.hidden is not None and packed else self.hidden,
        }
        return {name: nested(values) for name, values in outputs.items() if values is not None}


def _packed_index(offsets: Tensor, tokens: int, longest: int) -> Tensor:
    """Index of each packed token, (tokens,), in a flattened padded batch (batch, longest)."""
    row = torch.repeat_interleave(offsets.diff(), output_size=tokens)
    return torch.arange(tokens, device=offsets.device) - offsets[row] + row * longest
