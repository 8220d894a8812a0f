# SPDX-License-Identifier: Apache-2.0
"""Tokens that stand out in their own response."""

from __future__ import annotations

from typing import Any

import torch
from verl.trainer.ppo.core_algos import PerToken, TokenMask


def check_response_quantiles(options: Any) -> None:
    """Check that tokens can lie above the quantiles of `policy_loss`: none lies above the largest of its response.

    Raises:
        ValueError: if a quantile is 1; the message has the key and the value.
    """
    for key in ("archer_quantile", "siren_quantile"):
        if getattr(options, key) == 1:
            raise ValueError(f"policy_loss.{key}={getattr(options, key)}: expected a number of at least 0 and below 1")


@torch.no_grad()
def above_response_quantile(values: PerToken, response_mask: PerToken | TokenMask, quantile: float) -> TokenMask:
    """Valid tokens whose value is above a quantile of their response's valid tokens.

    An interpolated quantile would choose the same tokens: no value lies between two neighbours in their order.
    """
    valid = response_mask.bool()
    # Not `nanquantile`, which waits for a GPU.
    ordered = torch.where(valid, values, torch.inf).sort(-1).values
    place = (valid.sum(-1, keepdim=True).double() - 1).clamp_min(0) * quantile
    return valid & (values > ordered.gather(-1, place.long()))
