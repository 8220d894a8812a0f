# SPDX-License-Identifier: Apache-2.0
"""Rare cases of the core algorithms and the influence: bfloat16, missing sizes, values that are not finite."""

import math

import pytest
import torch
from losses import CLIP, actor_config, exact_inputs, loss_inputs, random_batch
from verl.trainer.ppo.core_algos import (
    ClipRatios,
    LossInputs,
    clip_ratios,
    exact_entropy_change,
    ppo_clipped,
    reweighted_policy_loss,
)
from verl.trainer.ppo.entropy_influence import bounded_weights, token_contributions, token_factors


@pytest.mark.parametrize("low, high, expected", [(None, 0.28, (0.3, 0.28, 3.0)), (0.2, None, (0.2, 0.3, 3.0))])
def test_clip_ratio_is_in_the_place_of_the_bound_that_is_missing_alone(low, high, expected):
    """clip_ratio=0.3 for the one of clip_ratio_low and clip_ratio_high that is null."""
    config = actor_config("vanilla", clip=(0.2, 0.28, 3.0))
    for key, value in (("clip_ratio", 0.3), ("clip_ratio_low", low), ("clip_ratio_high", high)):
        object.__setattr__(config, key, value)
    assert clip_ratios(config) == ClipRatios(*expected)


def test_the_ratio_of_bf16_log_probs_is_computed_in_float32():
    """ln pi = -1.3984 / 1024 and ln pi_old = -254 / 1024: the difference, 252.6016 / 1024, is below ln 1.28.

    In bfloat16 it is 253 / 1024, which is above. ln 1.28 is 252.7847 / 1024.
    """
    log_prob = torch.tensor([[-179 / 2**17]], dtype=torch.bfloat16)
    old_log_prob = torch.tensor([[-254 / 1024]], dtype=torch.bfloat16)
    assert (log_prob - old_log_prob).item() > math.log(1.28) > log_prob.item() - old_log_prob.item()
    above, below = ppo_clipped(loss_inputs(torch.ones(1, 1), None, old_log_prob, log_prob), CLIP)
    assert not above.any() and not below.any()


def test_the_exact_estimate_of_bf16_sums_is_computed_in_float32():
    """The product of entropy and sum of squares too, and what is added to it."""
    *tensors, _ = random_batch()
    half = [tensor.bfloat16() for tensor in (*tensors, torch.rand(6, 33), -torch.rand(6, 33))]
    found, expected = (
        exact_entropy_change(exact_inputs(*values), CLIP) for values in (half, [value.float() for value in half])
    )
    assert found.dtype == torch.float32 and expected.any() and torch.equal(found, expected)


def test_the_weights_of_the_rollout_are_no_token_weights():
    """They multiply the loss, but what the audit and the metrics have as a token's weight is the loss's own."""
    batch = random_batch()
    inputs = LossInputs(batch[2], batch[3], batch[0], batch[4], rollout_is_weights=torch.full_like(batch[0], 3.0))
    weights = torch.full_like(batch[0], 0.9)
    assert torch.equal(reweighted_policy_loss("vanilla", weights, inputs, actor_config()).token_weights, weights)
    assert reweighted_policy_loss("vanilla", None, inputs, actor_config()).token_weights is None


def test_geo_mean_is_scaled_by_the_responses_of_the_mini_batch_alone():
    """Without `batch_num_tokens`: two of eight responses have 2 / 8 of the loss; without a batch's size it is whole."""
    batch = random_batch()
    inputs = LossInputs(batch[2][:2], batch[3][:2], batch[0][:2], batch[4][:2])
    config = actor_config()
    plain = reweighted_policy_loss("geo_mean", None, inputs, config).loss
    config.global_batch_info.update(dp_size=1, global_batch_size=8)
    torch.testing.assert_close(reweighted_policy_loss("geo_mean", None, inputs, config).loss, plain * 2 / 8)
    config.global_batch_info.update(batch_num_tokens=40, global_batch_size=None)
    torch.testing.assert_close(reweighted_policy_loss("geo_mean", None, inputs, config).loss, plain)


def test_a_factor_that_is_not_finite_counts_as_none():
    """Advantages of NaN and of infinity; the other token's factor is its own, 2 at a ratio of 1."""
    log_prob, advantages = torch.zeros(1, 3), torch.tensor([[math.nan, -math.inf, 2.0]])
    found = token_factors(LossInputs(log_prob, log_prob, advantages, torch.ones(1, 3)), CLIP)
    assert found.tolist() == [[0.0, 0.0, 2.0]]


def test_a_contribution_by_hand():
    """(-1 - -3) / 0.5 = 4 times the factor 3 and the scale 0.1; one that is not finite counts as none."""
    above, below = torch.tensor([[-1.0, math.nan, 0.0]]), torch.tensor([[-3.0, 0.0, -math.inf]])
    found = token_contributions(above, below, 0.5, torch.full((1, 3), 3.0), 0.1)
    torch.testing.assert_close(found, torch.tensor([[1.2, 0.0, 0.0]]))


def test_the_slope_of_bf16_log_probs_is_computed_in_float32():
    """-179 / 2^17 less -254 / 1024, which bfloat16 would round."""
    above, below = torch.tensor([[-179 / 2**17]]).bfloat16(), torch.tensor([[-254 / 1024]]).bfloat16()
    found = token_contributions(above, below, 1.0, torch.ones(1, 1), 1.0)
    assert found.item() == 254 / 1024 - 179 / 2**17


def test_weights_of_multipliers_that_are_no_float32():
    """1e39 times 1e-39 is 1, times 0 nothing: the weights are 1 - 1 and 1."""
    found = bounded_weights(torch.tensor([1e-39, 0.0]), 1e39, 0.0, 2.0)
    torch.testing.assert_close(found, torch.tensor([0.0, 1.0]), rtol=0.0, atol=1e-5)
