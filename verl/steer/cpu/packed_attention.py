# SPDX-License-Identifier: Apache-2.0
"""Attention over packed sequences without flash-attention: `attn_implementation: packed_sdpa`.

With `use_remove_padding` verl packs all sequences of a micro-batch into one row. The `sdpa` of transformers then
computes attention between all pairs of its tokens and masks most of them; here each sequence attends to itself alone.

Importing this module registers the function with transformers' own registry, `AttentionInterface`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface

NAME = "packed_sdpa"

#: Packed positions -> lengths of their sequences: all layers get the same tensor, and the host waits for it once.
_LENGTHS = WeakTensorKeyDictionary()


def packed_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    position_ids: Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention of each sequence to itself, with the signature of transformers' attention functions.

    Args:
        query, key, value: (1, heads, packed tokens, head size), key and value may have fewer heads.
        attention_mask: None, which is what transformers passes to implementations without a mask function.
        position_ids: (1, packed tokens); a sequence begins at each 0.
        scaling: factor of the attention logits; None: 1/√(head size).
        dropout: of the attention's probabilities.
        sliding_window: None, or a length that no sequence exceeds.

    Returns:
        (1, packed tokens, heads, head size), and None in place of attention weights.

    Raises:
        ValueError: if the sequences are not packed into one row, or if one is longer than the sliding window.
    """
    if query.shape[0] != 1 or attention_mask is not None:
        mask = None if attention_mask is None else tuple(attention_mask.shape)
        raise ValueError(
            f"attn_implementation={NAME}: got a batch of {query.shape[0]} rows and attention_mask={mask}; expected "
            "use_remove_padding=true, which packs all sequences into one row without a mask"
        )
    lengths = _lengths(position_ids)
    if sliding_window is not None and max(lengths) > sliding_window:
        raise ValueError(
            f"sliding_window={sliding_window}: got a sequence of {max(lengths)} tokens; expected none to be longer"
        )
    outputs = [
        scaled_dot_product_attention(*parts, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=True)
        for parts in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    ]
    return torch.cat(outputs, 2).transpose(1, 2), None


def _lengths(position_ids: Tensor) -> list[int]:
    """Tokens of each packed sequence."""
    if position_ids not in _LENGTHS:
        starts = (position_ids[0] == 0).nonzero().flatten()
        _LENGTHS[position_ids] = torch.diff(starts, append=starts.new_tensor([position_ids.shape[1]])).tolist()
    return _LENGTHS[position_ids]


AttentionInterface.register(NAME, packed_sdpa)
