# SPDX-License-Identifier: Apache-2.0
"""Mini-batches and micro-batches of jagged columns, by index instead of a tensor for each row.

Upstream splits every column into one tensor per row for each mini-batch, which takes as long as the forward pass where
the model is small and mini-batches are many.
"""

from __future__ import annotations

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.nested import nested_tensor_from_jagged
from verl.utils import tensordict_utils
from verl.utils.tensordict_utils import chunk_tensordict as upstream_chunk
from verl.utils.tensordict_utils import index_select_tensor_dict as upstream_index_select


def replace_row_functions() -> None:
    """Put this module's two functions in place of those of the same names in `verl.utils.tensordict_utils`.

    verl imports that module before it loads any plugin, so the overlay can't serve it.
    """
    tensordict_utils.index_select_tensor_dict = index_select_tensor_dict
    tensordict_utils.chunk_tensordict = chunk_tensordict


def index_select_tensor_dict(batch: TensorDict | None, indices: Tensor | list[int]) -> TensorDict | None:
    """Rows of a batch (batch,) in the order of their indices (selected,); negative ones count from the end.

    Takes, returns and raises the same as upstream's function of this name: a batch of None gives None.
    """
    if batch is None:
        return None
    rows = torch.as_tensor(indices)
    jagged = _jagged_columns(batch)
    selected = upstream_index_select(batch.exclude(*jagged), rows)
    for name, column in jagged.items():
        selected[name] = _select_rows(column, rows.to(column.device))
    return selected


def chunk_tensordict(td: TensorDict, chunks: int) -> list[TensorDict]:
    """Equal chunks of consecutive rows of a batch (batch,).

    Takes, returns and raises the same as upstream's function of this name; the jagged columns are views.
    """
    jagged = _jagged_columns(td)
    parts = upstream_chunk(td.exclude(*jagged), chunks)
    for name, column in jagged.items():
        for part, rows in zip(parts, column.chunk(chunks), strict=True):
            part[name] = _jagged(rows.values(), rows.offsets())
    return parts


def _jagged_columns(batch: TensorDict) -> dict[str, Tensor]:
    """The nested tensors (batch, tokens of each row) whose rows are adjacent in memory."""
    return {
        name: column
        for name, column in batch.items()
        if isinstance(column, Tensor) and column.is_nested and column.dim() == 2 and column.lengths() is None
    }


def _select_rows(column: Tensor, rows: Tensor) -> Tensor:
    lengths, starts = column.offsets().diff()[rows], column.offsets()[:-1][rows]
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    indices = torch.arange(int(offsets[-1]), device=rows.device)
    indices += torch.repeat_interleave(starts - offsets[:-1], lengths, output_size=len(indices))
    return _jagged(column.values().index_select(0, indices), offsets)


def _jagged(values: Tensor, offsets: Tensor) -> Tensor:
    lengths = offsets.diff().tolist()
    # Without the longest length torch pads to that of all rows together.
    return nested_tensor_from_jagged(values, offsets, min_seqlen=min(lengths), max_seqlen=max(lengths))
