# SPDX-License-Identifier: Apache-2.0
"""Mini-batches and micro-batches of jagged columns against verl's own functions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from tensordict.tensorclass import NonTensorData, NonTensorStack
from verl.steer.engine.jagged_rows import (
    chunk_tensordict,
    index_select_tensor_dict,
    replace_row_functions,
    upstream_chunk,
    upstream_index_select,
)
from verl.utils import tensordict_utils as tu


def batch_of(lengths):
    """A batch with a column of every kind."""
    generator = torch.Generator().manual_seed(0)

    def jagged(*shape, dtype=torch.float32):
        rows = [torch.randn(n, *shape, generator=generator).mul(9).to(dtype) for n in lengths]
        return torch.nested.as_nested_tensor(rows, layout=torch.jagged)

    columns = {
        "old_log_probs": jagged(),
        "input_ids": jagged(dtype=torch.int64),
        "hidden_states": jagged(3),
        "advantages": torch.randn(len(lengths), generator=generator),
        "uid": NonTensorStack(*(f"uid {i}" for i in range(len(lengths)))),
    }
    batch = TensorDict(columns, batch_size=len(lengths))
    tu.assign_non_tensor(batch, temperature=0.7)
    return batch


def assert_same(ours, theirs):
    assert set(ours.keys()) == set(theirs.keys()) and ours.batch_size == theirs.batch_size
    for name in theirs.keys():
        got, column = ours.get(name), theirs.get(name)
        if isinstance(column, NonTensorStack):
            assert got.tolist() == column.tolist()
        elif not isinstance(column, torch.Tensor):
            assert tu.unwrap_non_tensor_data(got) == tu.unwrap_non_tensor_data(column)
        elif column.is_nested:
            assert got.dtype == column.dtype
            assert torch.equal(got.offsets(), column.offsets()) and torch.equal(got.values(), column.values())
            # As wide as the longest row, not as all rows together.
            assert got.to_padded_tensor(0).shape == column.to_padded_tensor(0).shape
            if column.lengths() is None:
                # Attention kernels read these two, which torch keeps beside the offsets.
                lengths = column.offsets().diff()
                assert (got._get_min_seqlen(), got._get_max_seqlen()) == (lengths.min(), lengths.max())
        else:
            assert torch.equal(got, column)


def test_verl_calls_them_once_replaced(monkeypatch):
    # monkeypatch restores the present functions afterwards.
    monkeypatch.setattr(tu, "index_select_tensor_dict", upstream_index_select)
    monkeypatch.setattr(tu, "chunk_tensordict", upstream_chunk)
    replace_row_functions()
    assert tu.index_select_tensor_dict is index_select_tensor_dict
    assert tu.chunk_tensordict is chunk_tensordict
    batches = list(tu.make_iterator(batch_of([3, 1, 4, 2]), mini_batch_size=2, epochs=1))
    assert [batch["input_ids"].offsets().tolist() for batch in batches] == [[0, 3, 4], [0, 4, 6]]


@given(lengths=st.lists(st.integers(1, 7), min_size=1, max_size=9), data=st.data())
def test_the_same_rows(lengths, data):
    rows = data.draw(st.lists(st.integers(-len(lengths), len(lengths) - 1), min_size=1, max_size=12))
    batch = batch_of(lengths)
    expected = upstream_index_select(batch, rows)
    assert_same(index_select_tensor_dict(batch, rows), expected)
    assert_same(index_select_tensor_dict(batch, torch.tensor(rows)), expected)


@given(size=st.integers(1, 4), chunks=st.integers(1, 4), data=st.data())
def test_the_same_chunks(size, chunks, data):
    count = size * chunks
    batch = batch_of(data.draw(st.lists(st.integers(1, 7), min_size=count, max_size=count)))
    # A jagged column of more dimensions breaks verl's own function, which has a way round that for some shapes only.
    del batch["hidden_states"]
    for ours, theirs in zip(chunk_tensordict(batch, chunks), upstream_chunk(batch, chunks), strict=True):
        assert_same(ours, theirs)


def test_chunks_of_a_selection():
    batch = batch_of([5, 2, 7, 1, 3, 4])
    del batch["hidden_states"]
    rows = [4, 0, 3, 1]
    ours = chunk_tensordict(index_select_tensor_dict(batch, rows), 2)
    theirs = upstream_chunk(upstream_index_select(batch, rows), 2)
    for got, expected in zip(ours, theirs, strict=True):
        assert_same(got, expected)


def test_columns_with_gaps_are_selected_by_upstream():
    lengths, offsets = torch.tensor([2, 1, 3]), torch.tensor([0, 4, 6, 10])
    column = torch.nested.nested_tensor_from_jagged(torch.arange(10.0), offsets, lengths)
    batch = TensorDict({"column": column}, batch_size=3)
    assert_same(index_select_tensor_dict(batch, [2, 0]), upstream_index_select(batch, [2, 0]))


def test_errors_are_upstreams():
    batch = batch_of([1, 2, 3])
    with pytest.raises(AssertionError):
        chunk_tensordict(batch, 2)
    with pytest.raises(AssertionError):
        index_select_tensor_dict(batch, torch.tensor([[0, 1]]))
    assert index_select_tensor_dict(None, [0]) is None
    assert isinstance(index_select_tensor_dict(batch, [0]).get("temperature"), NonTensorData)
