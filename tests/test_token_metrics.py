# SPDX-License-Identifier: Apache-2.0
"""Metrics of which tokens an update moves, by hand and by their properties."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from losses import CLIP, NoHostSynchronisation, actor_config, loss_inputs, micro_batch, random_batch, steer_loss
from verl.steer import loss as loss_module
from verl.steer.loss import ppo_loss
from verl.steer.methods.quadrant import in_quadrant
from verl.steer.token_metrics import PROBABILITY_BINS, QUADRANTS, token_metrics
from verl.trainer.ppo.core_algos import estimate_entropy_change, ppo_clipped
from verl.utils import tensordict_utils as tu
from verl.utils.metric import AggregationType


def by_hand():
    """Ten tokens, the last two not valid."""
    probs = torch.tensor([[0.05, 0.11, 0.3, 0.51, 0.6, 0.91, 0.95, 0.2, 0.99, 0.01]])
    advantages = torch.tensor([[1.0, -1.0, 1.0, 1.0, -1.0, 1.0, -1.0, 0.0, 1.0, -1.0]])
    above = torch.tensor([[1, 0, 1, 0, 0, 1, 0, 0, 1, 0]]).bool()
    below = torch.tensor([[0, 1, 0, 0, 1, 0, 1, 0, 0, 1]]).bool()
    mask = torch.tensor([[1] * 8 + [0] * 2])
    change = torch.tensor([[1.0, 2.0, 1.0, 3.0, 2.0, 4.0, 7.0, 0.0, 100.0, 100.0]])
    weights = torch.tensor([[1.0, 0.95, 0.9, 0.85, 0.8, 1.2, 1.0, 1.0, 0.0, 0.0]])
    return advantages, probs.log(), above, below, mask, change, weights


def metrics_by_hand(advantages, old_log_prob, above, below, mask, *rest):
    """`token_metrics` of `by_hand`, whose current log-probs nothing reads."""
    inputs = loss_inputs(advantages, None, old_log_prob, old_log_prob, mask)
    return token_metrics(inputs, None if above is None else (above, below), *rest)


def test_the_metrics_by_hand():
    found = {name: value.item() for name, value in metrics_by_hand(*by_hand()).items()}
    eighth = {
        "pg_clipfrac_high": 3, "pg_clipfrac_low": 3,
        "pg_clipfrac_high/prob_below_0.1": 1, "pg_clipfrac_high/prob_0.1_to_0.5": 1,
        "pg_clipfrac_high/prob_0.5_to_0.9": 0, "pg_clipfrac_high/prob_above_0.9": 1,
        "pg_clipfrac_low/prob_below_0.1": 0, "pg_clipfrac_low/prob_0.1_to_0.5": 1,
        "pg_clipfrac_low/prob_0.5_to_0.9": 1, "pg_clipfrac_low/prob_above_0.9": 1,
        "quadrant/positive_likely/tokens": 2, "quadrant/positive_unlikely/tokens": 2,
        "quadrant/negative_likely/tokens": 2, "quadrant/negative_unlikely/tokens": 1,
        "token_weights_below_0.9": 2,
    }  # fmt: skip
    eighth |= {
        "quadrant/positive_likely/change": 7, "quadrant/positive_unlikely/change": 2,
        "quadrant/negative_likely/change": 9, "quadrant/negative_unlikely/change": 2,
    }  # fmt: skip
    expected = {f"actor/{name}": count / 8 for name, count in eighth.items()}
    assert found == pytest.approx(expected)


def metrics_of(batch):
    inputs = loss_inputs(*batch)
    change = estimate_entropy_change(inputs, "released", CLIP)
    return token_metrics(inputs, ppo_clipped(inputs, CLIP), change, (-change).exp())


@settings(max_examples=30)
@given(st.integers(0, 10_000))
def test_bins_and_quadrants_share_everything_out(seed):
    batch = random_batch(seed=seed)
    advantages, *_, mask = batch
    found, valid = metrics_of(batch), mask.bool()
    for name, clipped in zip(("high", "low"), ppo_clipped(loss_inputs(*batch), CLIP), strict=True):
        total = sum(found[f"actor/pg_clipfrac_{name}/prob_{bin}"] for bin in PROBABILITY_BINS)
        torch.testing.assert_close(total, clipped[valid].float().mean())
    tokens, change = (
        sum(found[f"actor/quadrant/{name}/{kind}"] for name in QUADRANTS) for kind in ("tokens", "change")
    )
    torch.testing.assert_close(tokens, (advantages[valid] != 0).float().mean())
    torch.testing.assert_close(change, estimate_entropy_change(loss_inputs(*batch), "released", CLIP)[valid].mean())


def test_padding_and_order_change_nothing():
    batch = random_batch(seed=1)
    expected = metrics_of(batch)
    padded = [torch.cat([values, torch.full_like(values[:, :3], 0)], 1).flip(0) for values in batch]
    for name, value in metrics_of(padded).items():
        torch.testing.assert_close(value, expected[name])


def test_bfloat16_and_float32_go_into_the_same_bins():
    advantages, old_log_prob, *rest = by_hand()
    # Those that are clear of the bounds in either.
    clear = [0, 2, 4, 6]
    for dtype in (torch.bfloat16, torch.float32):
        cut = [values[:, clear] for values in (advantages, old_log_prob.to(dtype), *rest)]
        found = metrics_by_hand(*cut)
        assert found["actor/pg_clipfrac_high/prob_below_0.1"] == 0.25
        assert found["actor/pg_clipfrac_low/prob_above_0.9"] == 0.25


@pytest.mark.parametrize("empty", ["mask", "advantages"])
def test_without_tokens_or_advantages_all_is_zero(empty):
    advantages, old_log_prob, above, below, mask, change, weights = by_hand()
    if empty == "mask":
        mask = mask * 0
    else:
        advantages, change, above, below = advantages * 0, change * 0, above & False, below & False
        weights = torch.ones_like(weights)
    found = metrics_by_hand(advantages, old_log_prob, above, below, mask, change, weights)
    assert all(value == 0 for value in found.values())


def test_a_log_prob_that_is_not_finite_leaves_the_others_alone():
    advantages, old_log_prob, *rest = by_hand()
    expected = metrics_by_hand(advantages, old_log_prob, *rest)
    for broken in (math.nan, -math.inf, math.inf):
        # On a token that is not valid, and on one that is.
        other = old_log_prob.clone()
        other[0, 9] = broken
        found = metrics_by_hand(advantages, other, *rest)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        other[0, 0] = broken
        assert all(value.isfinite() for value in metrics_by_hand(advantages, other, *rest).values())


def test_what_is_not_given_is_not_told():
    names = metrics_by_hand(*by_hand()[:5]).keys()
    assert "actor/token_weights_below_0.9" not in names and not any(name.endswith("/change") for name in names)
    assert len(names) == 2 * (1 + len(PROBABILITY_BINS)) + len(QUADRANTS)
    advantages, old_log_prob, _, _, mask, *_ = by_hand()
    names = metrics_by_hand(advantages, old_log_prob, None, None, mask).keys()
    assert names == {f"actor/quadrant/{name}/tokens" for name in QUADRANTS}


def test_the_quadrants_are_those_of_the_loss():
    advantages, old_log_prob, _, _, mask, *_ = by_hand()
    found = metrics_by_hand(*by_hand()[:5])
    for name in QUADRANTS:
        inside = in_quadrant(name, loss_inputs(advantages, old_log_prob, old_log_prob, old_log_prob), 0.5)
        assert found[f"actor/quadrant/{name}/tokens"] == (inside & mask.bool()).sum() / mask.sum()


def test_the_metrics_stay_on_the_device():
    batch = [tensor.to("meta") for tensor in random_batch(seed=2)]
    with NoHostSynchronisation():
        found = metrics_of(batch)
    assert all(value.ndim == 0 and not value.requires_grad for value in found.values())


def test_steers_loss_has_them():
    batch = random_batch(seed=3)
    _, metrics = steer_loss(batch, actor_config())
    inputs = loss_inputs(*batch)
    expected = token_metrics(inputs, ppo_clipped(inputs, CLIP))
    assert all(torch.equal(metrics[name], expected[name]) for name in expected)
    assert 0 < metrics["actor/token_weights_below_0.9"] < 1
    assert {f"actor/quadrant/{name}/change" for name in QUADRANTS} <= metrics.keys()


@pytest.mark.parametrize("loss_mode", ["vanilla", "quadrant"])
def test_other_losses_have_them_where_the_trainer_asks(loss_mode):
    data, output = micro_batch()
    config = actor_config(loss_mode)
    plain_loss, plain = ppo_loss(config, dict(output), data)
    tu.assign_non_tensor(data, token_metrics=True)
    loss, metrics = ppo_loss(config, dict(output), data)
    assert loss == plain_loss
    added = metrics.keys() - plain.keys()
    weights = {"actor/token_weights_below_0.9"} if loss_mode == "quadrant" else set()
    assert added >= weights and len(added - weights) == 2 * (1 + len(PROBABILITY_BINS)) + 2 * len(QUADRANTS)
    assert all(metrics[name].aggregation is AggregationType.MEAN for name in added)
    inputs = loss_module.loss_inputs(output, data)
    total = sum(metrics[f"actor/quadrant/{name}/change"].aggregate() for name in QUADRANTS)
    assert total == pytest.approx(float(estimate_entropy_change(inputs)[inputs.response_mask].mean()))


@pytest.mark.parametrize("loss_mode", ["gspo", "cispo", "kl_cov", "dynamic_clip"])
def test_a_clip_that_is_not_ppos_is_not_counted_as_ppos(loss_mode):
    """The dynamic clip counts its own, by two of the names."""
    data, output = micro_batch()
    config = actor_config(loss_mode, kl_cov_ratio=0.5)
    _, plain = ppo_loss(config, dict(output), data)
    tu.assign_non_tensor(data, token_metrics=True)
    _, metrics = ppo_loss(config, dict(output), data)
    assert {name.split("/")[1] for name in metrics.keys() - plain.keys()} == {"quadrant"}
    own = {"actor/pg_clipfrac_high", "actor/pg_clipfrac_low"} if loss_mode == "dynamic_clip" else set()
    assert {name for name in metrics if "pg_clipfrac_high" in name or "pg_clipfrac_low" in name} - {
        "actor/pg_clipfrac_lower"
    } == own
    assert {name: metrics[name].aggregate() for name in own} == {name: plain[name].aggregate() for name in own}


def test_without_entropies_there_are_shares_of_tokens_only():
    data, output = micro_batch(with_entropy=False)
    tu.assign_non_tensor(data, token_metrics=True)
    _, metrics = ppo_loss(actor_config("vanilla"), {"log_probs": output["log_probs"]}, data)
    assert "actor/quadrant/positive_likely/tokens" in metrics
    assert "actor/quadrant/positive_likely/change" not in metrics
