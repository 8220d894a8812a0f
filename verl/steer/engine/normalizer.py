# SPDX-License-Identifier: Apache-2.0
"""The range of a whole mini-batch's estimated entropy changes, for `policy_loss.token_weight_normalizer`.

STEER places a token's estimated entropy change between the smallest and the largest of some set of tokens. In the
authors' release that set is a micro-batch on one rank, so the weights depend on how a mini-batch is split. An engine
processes one micro-batch after another and takes the first one's gradient before the last one's forward pass. So the
range of a whole mini-batch is computed from the old policy's estimates, at a ratio of 1, which need fields of the batch
alone. The linear map gives tokens that the current policy has moved out of the range the weight of its nearer end.

    global    the range of the mini-batch, over all data-parallel ranks
    ema       a running mean of these ranges over mini-batches, part of the checkpoint
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from tensordict import TensorDict
from verl.trainer.ppo.core_algos import (
    RANGE_NORMALIZERS,
    EntropyChangeRange,
    LossInputs,
    entropy_change_range,
    signed_entropy_change,
    weighted_change,
)
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

#: File of the running range in an actor's checkpoint.
RANGE_FILE = "token_weight_range.json"


#: The range if no token is valid: no weight depends on it.
NOTHING_VALID = EntropyChangeRange(0.0, 0.0, 0.0)


class TokenWeightNormalizer(FSDPEngineWithLMHead):
    """verl's engine, which computes each mini-batch's range if the loss reads one."""

    running_range: EntropyChangeRange | None = None

    def forward_backward_batch(self, data: TensorDict, loss_function: Any, forward_only: bool = False) -> Any:
        """Add `entropy_change_range` to the mini-batch's non-tensor data, then run the engine's method."""
        # verl binds the actor's configuration to its loss function; other engines' losses have no policy loss.
        config: Any = getattr(loss_function, "keywords", {}).get("config")
        if not forward_only and hasattr(config, "policy_loss"):
            self._measure(data, config.policy_loss)
        return super().forward_backward_batch(data, loss_function, forward_only=forward_only)

    def _measure(self, data: TensorDict, options: Any) -> None:
        """Add the mini-batch's range, unless each micro-batch is measured by its own."""
        if options.loss_mode != "entropy_control" or options.token_weight_normalizer not in RANGE_NORMALIZERS:
            return
        change_range = old_policy_range(data, options, self.get_data_parallel_group())
        if options.token_weight_normalizer == "ema":
            change_range = mean_range(self.running_range, change_range, options.token_weight_ema_decay)
            self.running_range = None if change_range is NOTHING_VALID else change_range
        tu.assign_non_tensor(data, entropy_change_range=change_range)

    def save_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        """Save the engine's state and the running range."""
        super().save_checkpoint(local_path, *args, **kwargs)
        if self.running_range is not None:
            write_state(Path(local_path, RANGE_FILE), self.running_range._asdict())

    def load_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        """Load the running range, if the checkpoint has one, and the engine's state."""
        # The engine may delete files once it has read them.
        file = Path(local_path or "", RANGE_FILE)
        if file.is_file():
            self.running_range = EntropyChangeRange(**json.loads(file.read_text()))
        super().load_checkpoint(local_path, *args, **kwargs)


def write_state(file: Path, state: dict[str, Any]) -> None:
    """Write the state of an engine as JSON; the file appears complete or not at all."""
    # All ranks write the same, whether they share the folder or not.
    part = file.with_name(f"{file.name}.{torch.distributed.get_rank()}")
    part.write_text(json.dumps(state))
    os.replace(part, file)


@torch.no_grad()
def old_policy_range(data: TensorDict, options: Any, group: Any) -> EntropyChangeRange:
    """Range of the estimated entropy change at the old policy over a mini-batch and all ranks of a group.

    Args:
        data: this rank's part of the mini-batch: nested advantages, old_log_probs, entropy and response_mask.
        options: `policy_loss` of the actor's configuration.
        group: the data-parallel process group.

    Returns:
        Numbers, the same on every rank; zeros where no token is valid.

    Raises:
        ValueError: if the batch has no entropies of the old policy, as in bypass mode.
    """
    if "entropy" not in data:
        raise ValueError(
            f"policy_loss.token_weight_normalizer={options.token_weight_normalizer}: expected micro_batch where the "
            "batch has no entropies of the old policy"
        )
    batch = data.select("advantages", "old_log_probs", "entropy", "response_mask").to_padded_tensor()
    old_log_prob, valid = batch["old_log_probs"], batch["response_mask"].bool()
    inputs = LossInputs(old_log_prob, old_log_prob, batch["advantages"], valid, batch["entropy"])
    signed = signed_entropy_change(inputs, options.entropy_change_estimator)
    change = weighted_change(signed, options.entropy_control_mode)
    changes = gather(change[valid], group)
    if not len(changes):
        return NOTHING_VALID
    quantile = options.token_weight_quantile if options.token_weight_map == "threshold" else None
    found = entropy_change_range(changes, torch.ones_like(changes), quantile)
    at_quantile = None if found.at_quantile is None else float(found.at_quantile)
    return EntropyChangeRange(float(found.smallest), float(found.largest), at_quantile)


def gather(values: torch.Tensor, group: Any) -> torch.Tensor:
    """Concatenate the values of all ranks of a group: (n,) without NaN, n differing by rank, to (sum of n,)."""
    values = values.to(get_device_id())
    longest = torch.tensor(len(values), device=values.device)
    torch.distributed.all_reduce(longest, op=torch.distributed.ReduceOp.MAX, group=group)
    padded = values.new_full((int(longest),), math.nan)
    padded[: len(values)] = values
    parts = [torch.empty_like(padded) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(parts, padded, group=group)
    gathered = torch.cat(parts)
    return gathered[~gathered.isnan()]


def mean_range(past: EntropyChangeRange | None, present: EntropyChangeRange, decay: float) -> EntropyChangeRange:
    """decay * past + (1 - decay) * present, bound by bound; if one of them is missing, the other."""
    if past is None or present is NOTHING_VALID:
        return past or present

    def mean(old: Any, new: Any) -> Any:
        return None if new is None else decay * (new if old is None else old) + (1 - decay) * new

    return EntropyChangeRange(*map(mean, past, present))
