# SPDX-License-Identifier: Apache-2.0
"""BAPO: the search for its bounds against a loop over them, and the loss with them."""

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_properties import loss_of, row, token_gradients
from losses import actor_config, gradient, random_batch
from verl.steer.config import PolicyLossConfig
from verl.steer.methods.bapo import bapo_bounds, find_bounds, pairs_of_bounds
from verl.steer.methods.registry import POLICY_LOSSES
from verl.trainer.ppo.core_algos import LossInputs, compute_policy_loss_vanilla


def batch_of(ratios, advantages):
    old_log_prob = torch.full((1, len(ratios)), math.log(0.01))
    mask = torch.ones(1, len(ratios), dtype=torch.bool)
    return row(*advantages), None, old_log_prob, old_log_prob + row(*ratios).log(), mask


def share_of_positive(ratios, advantages, low, high):
    """Their share of the loss, one token at a time, and the loss of all."""
    positive = sum(a * min(r, high) for r, a in zip(ratios, advantages, strict=True) if a > 0)
    negative = sum(-a * max(r, low) for r, a in zip(ratios, advantages, strict=True) if a < 0)
    return positive, positive + negative


def search(ratios, advantages, share, low, low_max, low_step, high, high_max, high_step):
    """The two loops of the method in Python: the lower bound rises first, then the upper one."""

    def missed():
        positive, total = share_of_positive(ratios, advantages, low, high)
        return positive < share * total

    while missed() and low < low_max - 1e-9:
        low = min(low + low_step, low_max)
    while missed() and high < high_max - 1e-9:
        high = min(high + high_step, high_max)
    return low, high


def tried_pairs(options):
    """Lower and upper bounds of the pairs in their order."""
    bounds = bapo_bounds(options)
    return [of_kind[index] for of_kind, index in zip(bounds, pairs_of_bounds(*bounds), strict=True)]


def test_the_bounds_in_their_order():
    options = PolicyLossConfig(
        bapo_low=0.6, bapo_low_max=0.75, bapo_low_step=0.1, bapo_high=1.2, bapo_high_max=1.5, bapo_high_step=0.1
    )
    lows, highs = tried_pairs(options)
    torch.testing.assert_close(lows, torch.tensor([0.6, 0.7, 0.75, 0.75, 0.75, 0.75]))
    torch.testing.assert_close(highs, torch.tensor([1.2, 1.2, 1.2, 1.3, 1.4, 1.5]))
    lows, highs = tried_pairs(PolicyLossConfig())
    assert len(lows) == len(highs) == 1 + 6 + 36
    fixed = PolicyLossConfig(bapo_low=0.9, bapo_high=3.0)
    assert [bounds.tolist() for bounds in tried_pairs(fixed)] == [[pytest.approx(0.9)], [3.0]]


def test_bapo_by_hand():
    """Positive: ratios 2 and 0.5 of advantage 1, negative: ratios 0.5 and 1.5 of -1.

    The positive loss is min(2, high) + 0.5, the negative one max(0.5, low) + 1.5. At the first bounds, 0.6 and 1.2,
    they are 1.7 and 2.1; the lower bound rises to 0.9 and makes it 2.4; then the upper one must reach 1.9.
    """
    batch = batch_of((2.0, 0.5, 0.5, 1.5), (1.0, 1.0, -1.0, -1.0))
    # Of the share 0.4999 no bound reaches equality, which rounding would decide.
    outputs = loss_of("bapo", batch, bapo_share=0.4999)
    assert outputs.metrics["actor/bapo_low"].item() == pytest.approx(0.9)
    assert outputs.metrics["actor/bapo_high"].item() == pytest.approx(1.9)
    assert outputs.metrics["actor/bapo_share"].item() == pytest.approx(0.5)
    assert outputs.loss.item() == pytest.approx((-1.9 - 0.5 + 0.9 + 1.5) / 4, abs=1e-6)
    # 2 is above 1.9, and the negative token at 0.5 is below 0.9.
    torch.testing.assert_close(token_gradients("bapo", batch, bapo_share=0.4999), row(0.0, 0.5, 0.0, -1.5))
    # A share of 0.44 is there at the first bounds (1.7 of 3.8), which keep less: 0.5 is below 0.6, 2 above 1.2.
    metrics = loss_of("bapo", batch, bapo_share=0.44).metrics
    assert metrics["actor/bapo_low"].item() == pytest.approx(0.6)
    assert metrics["actor/bapo_high"].item() == pytest.approx(1.2)
    # Out of reach: the last bounds.
    metrics = loss_of("bapo", batch, bapo_share=0.9).metrics
    assert metrics["actor/bapo_high"].item() == pytest.approx(3.0)


@settings(max_examples=60)
@given(st.integers(0, 10_000), st.floats(0.2, 0.8))
def test_the_search_is_the_loop(seed, share):
    """Where two shares aren't so close that rounding decides."""
    advantages, _, old_log_prob, log_prob, mask = random_batch(shape=(3, 11), seed=seed, spread=0.8)
    options = PolicyLossConfig(bapo_share=share)
    low, high, found = find_bounds(LossInputs(old_log_prob, log_prob, advantages, mask), options)
    ratios = (log_prob - old_log_prob).double().exp()[mask].tolist()
    chosen = advantages.double()[mask].tolist()
    expected = search(ratios, chosen, share, 0.6, 0.9, 0.05, 1.2, 3.0, 0.05)
    shares = [
        share_of_positive(ratios, chosen, low, high)
        for low, high in zip(*map(torch.Tensor.tolist, tried_pairs(options)), strict=True)
    ]
    if all(abs(positive - share * total) > 1e-4 for positive, total in shares):
        assert (low.item(), high.item()) == pytest.approx(expected, abs=1e-5)
        positive, total = share_of_positive(ratios, chosen, *expected)
        assert found.item() == pytest.approx(positive / total, abs=1e-4)


def test_fixed_bounds_give_ppo():
    advantages, _, old_log_prob, log_prob, mask = random_batch(spread=1.5)
    bounds = {"bapo_low": 0.8, "bapo_low_max": 0.8, "bapo_high": 1.28, "bapo_high_max": 1.28}

    def outputs(x):
        return loss_of("bapo", (advantages, None, old_log_prob, x, mask), **bounds)

    config = actor_config()
    vanilla, metrics = compute_policy_loss_vanilla(old_log_prob, log_prob, advantages, mask, "token-mean", config)
    found = outputs(log_prob)
    torch.testing.assert_close(found.loss, vanilla)
    assert {name: float(found.metrics[name]) for name in metrics} == pytest.approx(metrics)
    expected = gradient(
        lambda x: compute_policy_loss_vanilla(old_log_prob, x, advantages, mask, "token-mean", config), log_prob
    )
    torch.testing.assert_close(gradient(lambda x: [outputs(x).loss], log_prob), expected)


def test_the_configuration_keeps_its_clip():
    advantages, _, old_log_prob, log_prob, mask = random_batch()
    config = actor_config("bapo")
    POLICY_LOSSES["bapo"].compute(LossInputs(old_log_prob, log_prob, advantages, mask), config)
    assert (config.clip_ratio_low, config.clip_ratio_high) == (0.2, 0.28)


def test_a_batch_without_advantages_has_the_first_bounds():
    advantages, _, old_log_prob, log_prob, mask = random_batch()
    for batch in (
        (torch.zeros_like(advantages), None, old_log_prob, log_prob, mask),
        (advantages, None, old_log_prob, log_prob, torch.zeros_like(mask)),
    ):
        metrics = loss_of("bapo", batch).metrics
        found = [float(metrics[f"actor/bapo_{name}"]) for name in ("low", "high", "share")]
        assert found == pytest.approx([0.6, 1.2, 0.0])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"bapo_low": 0.95}, "policy_loss.bapo_low=0.95: expected at most bapo_low_max=0.9"),
        ({"bapo_high_max": 1.1}, "policy_loss.bapo_high=1.2: expected at most bapo_high_max=1.1"),
        ({"bapo_low_step": 0}, "policy_loss.bapo_low_step=0: expected a finite number of at least 0.001"),
    ],
)
def test_bad_bounds_are_named(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        PolicyLossConfig(**options)
