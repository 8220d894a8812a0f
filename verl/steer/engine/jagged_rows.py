# SPDX-License-Identifier: Apache-2.0
"""Mini-batches and micro-batches of jagged columns, without taking whole columns apart.

Upstream makes a tensor of every row of a batch for each mini-batch that it takes from it, which costs as much as the
forward pass where the model is small and mini-batches are many. `verl.steer.replacements` puts these two functions in
place of those of the same names in `verl.utils.tensordict_utils`.
"""

from __future__ import annotations

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.nested import nested_tensor_from_jagged
from verl.utils import tensordict_utils

_upstream_index_select = tensordict_utils.index_select_tensor_dict
_upstream_chunk = tensordict_utils.chunk_tensordict


def index_select_tensor_dict(batch: TensorDict | None, indices: Tensor | list[int]) -> TensorDict | None:
    """Rows of a batch, in the order of their indices.

    Args:
        batch: tensors, nested tensors and non-tensor data, (batch,); None gives None.
        indices: of the rows, (selected,); below 0 they count from the end.

    Returns:
        What upstream's function of this name returns, (selected,).

    Raises:
        AssertionError: if the indices are not one-dimensional.
    """
    if batch is None:
        return None
    rows, jagged = torch.as_tensor(indices), _jagged_columns(batch)
    selected = _upstream_index_select(_without(batch, jagged), rows)
    for name, column in jagged.items():
        selected[name] = _select_rows(column, rows.to(column.device))
    return selected


def chunk_tensordict(td: TensorDict, chunks: int) -> list[TensorDict]:
    """Equal shares of a batch, neighbours together.

    Args:
        td: tensors, nested tensors and non-tensor data, (batch,).
        chunks: number of shares, which divides the batch's size.

    Returns:
        What upstream's function of this name returns; the columns are views, as upstream's plain tensors are.

    Raises:
        AssertionError: if the batch can't be shared equally.
    """
    jagged = _jagged_columns(td)
    shares = _upstream_chunk(_without(td, jagged), chunks)
    size = len(td) // chunks
    for name, column in jagged.items():
        offsets = column.offsets()
        lengths = offsets.diff().tolist()
        shares_lengths = [lengths[start : start + size] for start in range(0, len(td), size)]
        tokens = column.values().split([sum(share) for share in shares_lengths])
        for i, share in enumerate(shares):
            start = i * size
            share[name] = _jagged(tokens[i], offsets[start : start + size + 1] - offsets[start], shares_lengths[i])
    return shares


def _jagged_columns(batch: TensorDict) -> dict[str, Tensor]:
    """Columns of a row of tokens for each of the batch's rows, one after the other without gaps."""
    return {
        name: column
        for name, column in batch.items()
        if isinstance(column, Tensor) and column.is_nested and column.dim() == 2 and column.lengths() is None
    }


def _without(batch: TensorDict, columns: dict[str, Tensor]) -> TensorDict:
    kept = {name: column for name, column in batch.items() if name not in columns}
    return TensorDict(kept, batch_size=batch.batch_size, device=batch.device)


def _select_rows(column: Tensor, rows: Tensor) -> Tensor:
    lengths, starts = column.offsets().diff()[rows], column.offsets()[:-1][rows]
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    counts = lengths.tolist()
    places = torch.arange(sum(counts), device=rows.device)
    places += torch.repeat_interleave(starts - offsets[:-1], lengths, output_size=len(places))
    return _jagged(column.values().index_select(0, places), offsets, counts)


def _jagged(values: Tensor, offsets: Tensor, lengths: list[int]) -> Tensor:
    # Without the longest length torch pads to that of all rows together.
    return nested_tensor_from_jagged(values, offsets, min_seqlen=min(lengths), max_seqlen=max(lengths))
