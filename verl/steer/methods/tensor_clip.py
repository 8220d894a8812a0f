# SPDX-License-Identifier: Apache-2.0
"""PPO's dual clip with bounds that are tensors: another one for each token, or found from the micro-batch."""

from __future__ import annotations

from copy import copy
from typing import Any

from verl.trainer.ppo.core_algos import LossInputs, LossOutputs, PerToken, Scalar, reweighted_policy_loss

#: The bounds that verl's vanilla loss reads from the configuration.
CLIP_KEYS = ("clip_ratio_low", "clip_ratio_high")


def tensor_clip_policy_loss(
    inputs: LossInputs, config: Any, low: PerToken | Scalar, high: PerToken | Scalar
) -> LossOutputs:
    """verl's dual-clip PPO loss with the bounds 1 - low and 1 + high on the ratio.

    Args:
        inputs: a micro-batch.
        config: `ActorConfig`; `clip_ratio_c` holds as in verl.
        low, high: in place of `clip_ratio_low` and `clip_ratio_high`, without gradient; of any shape that broadcasts to
            (batch, response_length).
    """
    clipped = copy(config)
    for key, width in zip(CLIP_KEYS, (low, high), strict=True):
        # verl's configurations are frozen.
        object.__setattr__(clipped, key, width)
    return reweighted_policy_loss("vanilla", None, inputs, clipped)
