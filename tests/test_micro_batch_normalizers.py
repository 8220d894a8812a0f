# SPDX-License-Identifier: Apache-2.0
"""The normalizers `rank` and `winsorised`: percentile ranks, and a range that ends at a quantile."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from losses import actor_config
from scipy.stats import rankdata
from verl.trainer.ppo.core_algos import (
    LossInputs,
    entropy_change_range,
    estimate_entropy_change,
    percentile_rank,
    steer_policy_loss,
)

values = st.lists(st.floats(0, 100, width=32), min_size=2, max_size=30)


@given(values=values, padding=st.integers(0, 5))
def test_ranks_are_scipys_and_ignore_padding(values, padding):
    tensor = torch.tensor(values + [50.0] * padding)[None]
    mask = torch.arange(tensor.shape[1])[None] < len(values)
    ranks = percentile_rank(tensor, mask)[mask]
    expected = (rankdata(values, method="min") - 1) / (len(values) - 1)
    assert np.allclose(ranks, expected, atol=1e-6)


@pytest.mark.parametrize("mask", [torch.zeros(1, 3), torch.tensor([[0.0, 1.0, 0.0]])], ids=["none", "one"])
def test_no_and_one_valid_token(mask):
    assert percentile_rank(torch.tensor([[3.0, 1.0, 2.0]]), mask)[mask.bool()].tolist() == [0.0] * int(mask.sum())


@given(values=values, quantile=st.floats(0, 1))
def test_the_quantile_is_numpys(values, quantile):
    tensor = torch.tensor([*values, 77.0])[None]
    mask = torch.arange(tensor.shape[1])[None] < len(values)
    found = entropy_change_range(tensor, mask, quantile).at_quantile
    # The index is computed in float32.
    index = (len(values) - 1) * quantile
    nearby = sorted(values)[int(np.floor(index - 1e-4).clip(0)) : int(np.floor(index + 1e-4)) + 1]
    assert float(found) in np.float32(nearby)


def inputs(seed=0, shape=(4, 12)):
    generator = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(shape, generator=generator)
    return LossInputs(
        old,
        (old + 0.1 * torch.randn(shape, generator=generator)).requires_grad_(),
        torch.randn(shape[0], 1, generator=generator).expand(shape),
        torch.rand(shape, generator=generator) < 0.8,
        torch.rand(shape, generator=generator),
    )


def weights(batch, **options):
    outputs = steer_policy_loss(batch, actor_config(linear=False, **options))
    return outputs.token_weights, outputs.metrics


def test_ranks_spread_the_weights_evenly():
    """lambda = 0.8 ** rank: the mean over many tokens is near the integral of 0.8 ** x, (0.8 - 1) / ln 0.8."""
    batch = inputs(shape=(8, 200))
    found, metrics = weights(batch, token_weight_normalizer="rank")
    change = estimate_entropy_change(batch)
    valid = batch.response_mask
    rank = torch.from_numpy((rankdata(change[valid].double(), method="min") - 1) / (int(valid.sum()) - 1))
    torch.testing.assert_close(found[valid].double(), 0.8**rank, rtol=1e-5, atol=1e-6)
    assert float(metrics["actor/token_weights_mean"]) == pytest.approx(-0.2 / np.log(0.8), abs=1e-3)
    assert float(metrics["actor/token_weights_std"]) == pytest.approx(float(found[valid].std(correction=0)), rel=1e-4)
    assert weights(batch)[1]["actor/token_weights_mean"] > metrics["actor/token_weights_mean"] + 0.02


def test_one_very_large_estimate_moves_no_other_weight_with_winsorising():
    batch, outlier = inputs(), inputs()
    place = tuple(torch.nonzero(batch.response_mask)[3])
    outlier.entropys[place] = 1e4
    options = {"token_weight_normalizer": "winsorised", "token_weight_quantile": 0.5}
    before, after = (weights(one, **options)[0] for one in (batch, outlier))
    others = torch.ones_like(before, dtype=torch.bool)
    others[place] = False
    assert after[place] == pytest.approx(0.8) and (after[others] - before[others]).abs().max() < 0.06
    assert weights(outlier)[0][batch.response_mask & others].min() > 0.99


def test_the_only_estimate_above_zero_has_the_smallest_weight_with_winsorising():
    """Where most advantages are 0, the range up to the quantile has no extent."""
    batch = inputs()
    batch.advantages = torch.zeros(4, 12)
    batch.advantages[0, 0], batch.response_mask[0, 0] = 1.0, True
    found = steer_policy_loss(batch, actor_config(linear=True, token_weight_normalizer="winsorised")).token_weights
    others = batch.response_mask.clone()
    others[0, 0] = False
    assert found[0, 0] == pytest.approx(0.8) and (found[others] == 1.0).all()


@pytest.mark.parametrize("normalizer", ["rank", "winsorised"])
def test_a_micro_batch_without_valid_tokens_has_weights_of_zero(normalizer):
    batch = inputs()
    batch.response_mask = torch.zeros_like(batch.response_mask)
    found, metrics = weights(batch, token_weight_normalizer=normalizer)
    assert (found == 0).all() and all(not torch.as_tensor(value).isnan().any() for value in metrics.values())


@pytest.mark.parametrize("normalizer", ["rank", "winsorised"])
def test_weights_do_not_depend_on_padding(normalizer):
    batch, padded = inputs(), inputs()
    for name, fill in (("old_log_prob", -1.0), ("advantages", 5.0), ("response_mask", False), ("entropys", 3.0)):
        value = getattr(padded, name)
        setattr(padded, name, torch.cat([value, value.new_full((4, 3), fill)], 1))
    padded.log_prob = torch.cat([padded.log_prob, torch.full((4, 3), -9.0)], 1)
    found, with_padding = (weights(one, token_weight_normalizer=normalizer)[0] for one in (batch, padded))
    assert torch.equal(with_padding[:, :12], found) and (with_padding[:, 12:] == 0).all()
