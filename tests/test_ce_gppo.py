# SPDX-License-Identifier: Apache-2.0
"""CE-GPPO: the gradients of tokens that PPO clips, by hand, and its limits."""

import math

import pytest
import torch
from loss_properties import loss_of, row, token_gradients
from losses import actor_config, gradient, random_batch
from verl.trainer.ppo.core_algos import compute_policy_loss_vanilla

# The clip is 0.2 below, 0.28 above, and 10.
RATIOS = (0.5, 0.9, 1.2, 2.0, 0.5, 2.0, 11.0, 0.001)
ADVANTAGES = (-2.0, -1.0, 1.0, 3.0, 1.0, -1.0, -1.0, -1.0)


def batch_of(ratios, advantages):
    old_log_prob = torch.full((1, len(ratios)), math.log(0.01))
    mask = torch.ones(1, len(ratios), dtype=torch.bool)
    return row(*advantages), None, old_log_prob, old_log_prob + row(*ratios).log(), mask


def expected_gradient(ratio, advantage, beta1, beta2):
    if advantage < 0 and ratio < 0.8:
        return beta1 * 0.8 * advantage
    if advantage > 0 and ratio > 1.28:
        return beta2 * 1.28 * advantage
    return 0.0 if advantage < 0 and ratio > 10 else ratio * advantage


@pytest.mark.parametrize("beta1, beta2", [(0.75, 1.0), (0.5, 1.0), (0.3, 0.0)])
def test_ce_gppo_by_hand(beta1, beta2):
    """d(-loss * tokens) / d ln prob: A r inside the clip, A beta bound beyond, however far; none above 10."""
    found = token_gradients("ce_gppo", batch_of(RATIOS, ADVANTAGES), ce_gppo_beta1=beta1, ce_gppo_beta2=beta2)
    expected = [expected_gradient(r, a, beta1, beta2) for r, a in zip(RATIOS, ADVANTAGES, strict=True)]
    torch.testing.assert_close(found, row(*expected))


def test_an_infinite_bound_leaves_all_gradients_finite():
    """No token is clipped from above, so the gradients are those of PPO's loss without an upper bound."""
    batch = batch_of(RATIOS, ADVANTAGES)
    found = token_gradients("ce_gppo", batch, clip=(0.2, math.inf, 10.0))
    expected = [
        ratio * advantage if advantage > 0 else expected_gradient(ratio, advantage, 0.75, 1.0)
        for ratio, advantage in zip(RATIOS, ADVANTAGES, strict=True)
    ]
    torch.testing.assert_close(found, row(*expected))


def test_the_loss_and_its_metrics_by_hand():
    """Each token's loss is -A times 0.6 (0.75 * 0.8), 0.9, 1.2, 1.28, 0.5, 2, 10 and 0.6."""
    outputs = loss_of("ce_gppo", batch_of(RATIOS, ADVANTAGES))
    values = (0.6, 0.9, 1.2, 1.28, 0.5, 2.0, 10.0, 0.6)
    expected = sum(-a * value for a, value in zip(ADVANTAGES, values, strict=True)) / 8
    assert outputs.loss.item() == pytest.approx(expected, rel=1e-5)
    assert outputs.metrics["actor/pg_clipfrac_low"] == pytest.approx(2 / 8)
    # as PPO counts them: one above 1.28, and a negative one above 10
    assert outputs.metrics["actor/pg_clipfrac_high"] == pytest.approx(2 / 8)
    assert outputs.metrics["actor/ppo_kl"].item() == pytest.approx(-sum(map(math.log, RATIOS)) / 8, rel=1e-5)


@pytest.mark.parametrize("agg", ["token-mean", "seq-mean-token-sum"])
def test_without_the_kept_gradients_it_is_ppo(agg):
    """With beta 0 clipped tokens have the loss 0 in place of PPO's constant: the gradients are PPO's."""
    advantages, entropys, old_log_prob, log_prob, mask = random_batch(spread=1.5)
    config = actor_config(agg=agg)

    def loss(x):
        batch = (advantages, entropys, old_log_prob, x, mask)
        return [loss_of("ce_gppo", batch, agg=agg, ce_gppo_beta1=0.0, ce_gppo_beta2=0.0).loss]

    vanilla = gradient(lambda x: compute_policy_loss_vanilla(old_log_prob, x, advantages, mask, agg, config), log_prob)
    torch.testing.assert_close(gradient(loss, log_prob), vanilla)


def test_ratios_beyond_the_range_of_numbers_keep_their_gradient():
    """Log ratios of -100 and 100, where exp has no gradient in float32: 0.75 * 0.8 and 1.28."""
    log_prob, old_log_prob = row(-101.0, -1.0), row(-1.0, -101.0)
    batch = (row(-1.0, 1.0), None, old_log_prob, log_prob, torch.ones(1, 2, dtype=torch.bool))
    torch.testing.assert_close(token_gradients("ce_gppo", batch), row(-0.6, 1.28))


def test_rollout_weights_are_multiplied_in():
    batch = random_batch()
    weights = torch.rand(batch[0].shape)
    found = token_gradients("ce_gppo", batch, {"rollout_is_weights": weights})
    plain = token_gradients("ce_gppo", batch)
    assert plain.any()
    torch.testing.assert_close(found, weights * plain)
