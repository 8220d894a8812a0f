# SPDX-License-Identifier: Apache-2.0
"""Archer: which tokens are above their response's quantile, the two clips, and the two weights of the KL loss."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_properties import loss_of, row, token_gradients
from losses import actor_config, gradient, micro_batch, random_batch
from verl.steer.loss import ppo_loss
from verl.steer.methods.registry import POLICY_LOSSES
from verl.steer.methods.response_quantile import above_response_quantile
from verl.trainer.ppo.core_algos import LossInputs, compute_policy_loss_vanilla, kl_penalty
from verl.workers.utils.padding import no_padding_2_padding


def test_tokens_above_the_quantile_by_hand():
    """Six tokens: the quantile 0.8 is the value of index 4, and only the greatest lies above. Three: that of index 1.

    Each response has its own: the second one's entropies are all smaller. Three tokens of it and all of a third
    response aren't valid.
    """
    values = torch.tensor([[5.0, 1.0, 6.0, 2.0, 4.0, 3.0], [0.3, 0.1, 0.2, 9.0, 9.0, 9.0], [9.0] * 6])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0] * 6])
    assert above_response_quantile(values, mask, 0.8).tolist() == [
        [False, False, True, False, False, False],
        [True, False, False, False, False, False],
        [False] * 6,
    ]
    assert above_response_quantile(values, mask, 0.4).sum(-1).tolist() == [3, 2, 0]
    assert not above_response_quantile(values, mask, 1.0).any()


def test_a_quantile_whose_place_is_rounded_down():
    """90 * 0.7 is 62.99... in float64: above the value of index 63 are 27 of 91."""
    assert int(90 * 0.7) == 62
    values = torch.arange(91.0)[None]
    assert above_response_quantile(values, torch.ones(1, 91), 0.7).sum() == 27


@settings(max_examples=60)
@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.33, 0.5, 0.8, 0.95, 1.0]))
def test_the_quantile_is_numpys(seed, quantile):
    """torch's `nanquantile`, which waits for a device, interpolates; the tokens above are the same, ties included."""
    _, entropys, _, _, mask = random_batch(seed=seed, shape=(5, 17))
    entropys = (4 * entropys).round() / 4
    bounds = entropys.double().masked_fill(~mask, torch.nan).nanquantile(quantile, dim=-1, keepdim=True)
    assert torch.equal(above_response_quantile(entropys, mask, quantile), mask & (entropys > bounds + 1e-9))


def test_archer_by_hand():
    """Four tokens of entropy 1 and one of 2, at ratios 1.3 and 1.6 (A = 1), 0.7 and 0.4 (A = -1).

    Clips 0.2 and 0.5: of the tokens of entropy 1 all are clipped; one of entropy 2 only at 1.6 and 0.4.
    """
    cases = {(1.3, 1.0): 1.3, (1.6, 1.0): 0.0, (0.7, -1.0): -0.7, (0.4, -1.0): 0.0, (1.6, -1.0): -1.6}
    for (ratio, advantage), of_reasoning in cases.items():
        entropys = row(1.0, 1.0, 2.0, 1.0, 1.0)
        old_log_prob = torch.full((1, 5), math.log(0.1))
        log_prob = old_log_prob + math.log(ratio)
        mask = torch.ones(1, 5, dtype=torch.bool)
        batch = (torch.full((1, 5), advantage), entropys, old_log_prob, log_prob, mask)
        of_knowledge = -1.6 if (ratio, advantage) == (1.6, -1.0) else 0.0
        expected = row(of_knowledge, of_knowledge, of_reasoning, of_knowledge, of_knowledge)
        torch.testing.assert_close(token_gradients("archer", batch), expected)
        metrics = loss_of("archer", batch).metrics
        assert metrics["actor/high_entropy_share"].item() == pytest.approx(0.2)


def test_archers_loss_of_clipped_knowledge_by_hand():
    """Ratio 0.4, A = -1: 0.8 of four clipped tokens and 0.5 of the fifth; with a clip of 0.7, 0.4 of the four."""
    old_log_prob = torch.full((1, 5), math.log(0.1))
    mask = torch.ones(1, 5, dtype=torch.bool)
    batch = (-torch.ones(1, 5), row(1.0, 1.0, 2.0, 1.0, 1.0), old_log_prob, old_log_prob + math.log(0.4), mask)
    assert loss_of("archer", batch).loss.item() == pytest.approx((4 * 0.8 + 0.5) / 5)
    assert loss_of("archer", batch, archer_clip_knowledge=0.7).loss.item() == pytest.approx((4 * 0.4 + 0.5) / 5)


@pytest.mark.parametrize("agg", ["token-mean", "seq-mean-token-mean"])
def test_equal_clips_give_ppo(agg):
    advantages, entropys, old_log_prob, log_prob, mask = random_batch(spread=1.5)
    config = actor_config(clip=(0.3, 0.3, 10.0), agg=agg)
    clips = {"archer_clip_knowledge": 0.3, "archer_clip_reasoning": 0.3}

    def loss(x):
        return [loss_of("archer", (advantages, entropys, old_log_prob, x, mask), agg=agg, **clips).loss]

    expected = gradient(lambda x: compute_policy_loss_vanilla(old_log_prob, x, advantages, mask, agg, config), log_prob)
    assert expected.any()
    torch.testing.assert_close(gradient(loss, log_prob), expected)


def test_the_kl_weights_of_both_kinds():
    entropys, log_prob = row(1.0, 1.0, 2.0, 1.0, 1.0), row(-1.0, -2.0, -1.0, -2.0, -1.0)
    inputs = LossInputs(log_prob, log_prob, torch.ones(1, 5), torch.ones(1, 5), entropys)
    compute = POLICY_LOSSES["archer"].compute
    assert compute(inputs, actor_config("archer")).kl_weights.tolist() == [[1.0, 1.0, 0.0, 1.0, 1.0]]
    weights = compute(inputs, actor_config("archer", archer_kl_reasoning=0.25)).kl_weights
    assert weights.tolist() == [[1.0, 1.0, 0.25, 1.0, 1.0]]


@pytest.mark.parametrize(("scale", "dtype"), [(0.0, torch.float32), (0.5, torch.float32), (0.5, torch.bfloat16)])
def test_the_kl_loss_has_the_weights(scale, dtype):
    """kl_loss_coef times the mean over all tokens of weight times KL, whose gradient they scale as well.

    The arithmetic is in float32 also of log-probs in bfloat16.
    """
    data, output = micro_batch()
    data["ref_log_prob"] = (data["old_log_probs"] * 0.9).to(dtype)
    output["log_probs"] = output["log_probs"].to(dtype)
    config = actor_config("archer", archer_kl_reasoning=scale)
    without, _ = ppo_loss(config, dict(output), data)
    for name, value in (("use_kl_loss", True), ("kl_loss_coef", 0.5), ("kl_loss_type", "low_var_kl")):
        object.__setattr__(config, name, value)
    loss, metrics = ppo_loss(config, dict(output), data)
    batch = data.select("ref_log_prob", "response_mask", "entropy").to_padded_tensor()
    reasoning = above_response_quantile(batch["entropy"], batch["response_mask"], 0.8)
    log_prob = no_padding_2_padding(output["log_probs"], data)
    kl = kl_penalty(log_prob.float(), batch["ref_log_prob"].float(), "low_var_kl")
    weighted = torch.where(reasoning, scale, 1.0) * kl * batch["response_mask"]
    assert reasoning.any() and not torch.equal(weighted, kl * batch["response_mask"])
    expected = weighted.sum() / batch["response_mask"].sum()
    torch.testing.assert_close(metrics["kl_loss"].values[0], expected.item())
    torch.testing.assert_close(loss - without, 0.5 * expected)
