# SPDX-License-Identifier: Apache-2.0
"""verl's FSDP engine: reading the logits once, and registered for the CPU too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.tensor import DTensor
from verl.steer.audit.update import EntropyAudit
from verl.steer.cpu import packed_attention  # noqa: F401 - registers packed_sdpa
from verl.steer.engine.jagged_rows import replace_row_functions
from verl.steer.engine.normalizer import TokenWeightNormalizer
from verl.steer.engine.vocab_reductions import vocab_reductions
from verl.steer.gc_heap import freeze_gc_heap
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_name
from verl.workers.engine.base import EngineRegistry

from verl_steer import upstream

_upstream = upstream(globals())
replace_row_functions()

if get_device_name() == "cpu":
    # `_upstream` is this overlay's own copy of the module, which offloads a reference model to pinned memory. Only an
    # accelerator has that.
    _upstream.CPUOffloadPolicy = lambda pin_memory: CPUOffloadPolicy(pin_memory=False)

#: Flags of a micro-batch under which upstream reduces something else than whole logits, or more than reductions.
UPSTREAM_ONLY = ("use_fused_kernels", "distillation_use_topk", "distillation_only")


# FSDP2 shards on the CPU over gloo; FSDP1 wants an accelerator, and verl says so when it is asked for.
@EngineRegistry.register(model_type="language_model", backend="fsdp2", device="cpu")
@EngineRegistry.register(model_type="language_model", backend=["fsdp", "fsdp2"], device="cuda", vendor="nvidia")
class SteerFSDPEngineWithLMHead(EntropyAudit, TokenWeightNormalizer, _upstream.FSDPEngineWithLMHead):
    """Upstream's engine; with `fsdp_config.one_pass_reductions` it reduces the logits in one reading.

    Upstream's separate functions for log-prob, entropy and Σπ² read the logits once or more each and hold copies of
    them. `vocab_reductions` does without either.

    `TokenWeightNormalizer` measures a mini-batch's estimated entropy changes where STEER is asked to, `EntropyAudit`
    the true ones where the trainer asks for an audit.
    """

    def initialize(self) -> None:
        """Upstream's; from then on garbage collection passes over what it made."""
        # verl has read it, and keeps it in the model's configuration too: nobody could load a checkpoint that asks for
        # an implementation which only this fork registers.
        vars(self.model_config.hf_config).pop("attn_implementation", None)
        super().initialize()
        freeze_gc_heap()

    def prepare_model_outputs(
        self, output: Any, output_args: dict[str, Any], micro_batch: TensorDict, logits_processor_func: Callable | None
    ) -> dict[str, Tensor]:
        """Upstream's outputs, and with `calculate_sum_pi_squared` also `sum_pi_squared_log_pi`, Σπ² ln π in nats.

        Args:
            output: the model's output with `logits`, (1, packed tokens, vocabulary) where padding is removed, else
                (batch, longest, vocabulary).
            output_args: what `prepare_model_inputs` returned.
            micro_batch: nested tensors and flags, such as `calculate_entropy`.
            logits_processor_func: distillation's; upstream's code calls it.

        Returns:
            Nested tensors (batch, tokens of each sequence), float32.
        """

        def flag(name: str, default: bool = False) -> bool:
            return tu.get_non_tensor_data(data=micro_batch, key=name, default=default)

        if not self.engine_config.one_pass_reductions or any(flag(name) for name in UPSTREAM_ONLY):
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
        reductions = vocab_reductions(
            logits,
            labels,
            None if output_args.get("temperature_is_one", False) else temperature,
            with_entropy=flag("calculate_entropy"),
            with_squares=flag("calculate_sum_pi_squared"),
            inplace_backward=True,
        )

        def nested(values: Tensor) -> Tensor:
            if packed:
                values = self._gather_and_unpad_packed(values, output_args["pad_size"])
            else:
                values = values.flatten().index_select(0, index)
            return torch.nested.nested_tensor_from_jagged(values, offsets)

        outputs = {
            "log_probs": reductions.log_prob,
            "entropy": reductions.entropy,
            "sum_pi_squared": reductions.sum_pi_squared,
            "sum_pi_squared_log_pi": reductions.sum_pi_squared_log_pi,
        }
        return {name: nested(values) for name, values in outputs.items() if values is not None}


def _packed_index(offsets: Tensor, tokens: int, longest: int) -> Tensor:
    """Place of each packed token, (tokens,), in a padded batch (batch, longest) flattened."""
    row = torch.repeat_interleave(offsets.diff(), output_size=tokens)
    return torch.arange(tokens, device=offsets.device) - offsets[row] + row * longest
