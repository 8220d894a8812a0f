# SPDX-License-Identifier: Apache-2.0
"""Tokens that stand out in their own response."""

from __future__ import annotations

import torch
from verl.trainer.ppo.core_algos import PerToken, TokenMask, index_at_quantile


@torch.no_grad()
def above_response_quantile(values: PerToken, response_mask: PerToken | TokenMask, quantile: float) -> TokenMask:
    """Valid tokens whose value is above a quantile of their response's valid tokens.

    An interpolated quantile would choose the same tokens: no value lies between two neighbours in their order.
    """
    valid = response_mask.bool()
    # Not `nanquantile`, which waits for a GPU.
    ordered = torch.where(valid, values, torch.inf).sort(-1).values
    return valid & (values > ordered.gather(-1, index_at_quantile(valid.sum(-1, keepdim=True), quantile)))
