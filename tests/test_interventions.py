# SPDX-License-Identifier: Apache-2.0
"""The losses and advantage estimators of other papers, each against an example worked by hand, and their properties."""

import math
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_properties import check_loss, loss_of, row, token_gradients
from losses import actor_config, random_batch
from omegaconf import OmegaConf
from tensordict import TensorDict
from verl.steer import trainer as trainer_steer
from verl.steer.audit.scores import AuditOptions
from verl.steer.config import ADVANTAGE_OPTIONS, PolicyLossConfig
from verl.steer.methods.adaptive_entropy import AdaptiveEntropyCoefficient
from verl.steer.methods.advantages import ESTIMATORS as REGISTERED
from verl.steer.methods.advantages import advantage_estimator, bind_estimator, estimator_fields
from verl.steer.methods.dynamic_clip import dynamic_clip_bounds
from verl.steer.methods.gtpo import entropy_weighted_rewards
from verl.steer.methods.quadrant import in_quadrant
from verl.steer.methods.registry import POLICY_LOSSES, policy_loss
from verl.steer.methods.unlikeliness import UnlikelinessOptions
from verl.steer.options import from_config, option
from verl.steer.token_metrics import QUADRANTS
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.core_algos import LossInputs, compute_policy_loss_vanilla, get_adv_estimator_fn

LOSSES = ("adaptive_entropy", "entropy_shaped_advantage", "dynamic_clip", "high_entropy_tokens", "quadrant")
LOSSES += ("archer", "bapo", "ce_gppo")
ESTIMATORS = tuple(REGISTERED)


def on_policy(advantages, probs, entropys):
    """A batch of one response at a ratio of 1."""
    log_prob = row(*probs).log()
    return row(*advantages), row(*entropys), log_prob, log_prob.clone(), torch.ones(1, len(probs), dtype=torch.bool)


# The losses, by hand.


def test_entropy_shaped_advantage_by_hand():
    """0.4 * 0.5 = 0.2 is less than |A| / 2 = 0.5; 0.4 * 3 = 1.2 is more than 0.5, and than 0.3 where A = -0.6."""
    batch = on_policy(advantages=(1.0, 1.0, -0.6, 0.0), probs=(0.5,) * 4, entropys=(0.5, 3.0, 3.0, 3.0))
    found = token_gradients("entropy_shaped_advantage", batch)
    torch.testing.assert_close(found, row(1.2, 1.5, -0.3, 0.0))
    metrics = loss_of("entropy_shaped_advantage", batch).metrics
    assert metrics["actor/advantage_bonus_mean"] == pytest.approx((0.2 + 0.5 + 0.3) / 4)
    found = token_gradients("entropy_shaped_advantage", batch, advantage_entropy_alpha=0.1, advantage_entropy_kappa=4.0)
    torch.testing.assert_close(found, row(1.05, 1.25, -0.45, 0.0))


def test_dynamic_clip_bounds_by_hand():
    """At old_prob 0.8: 1/2 + 1/2 sqrt(1 - 0.64 / 0.8) = 0.723607 and 1/2 + 1/2 sqrt(1 + 0.8 / 0.8) = 1.207107.

    At 0.01 the lower root is not there, and the upper bound is 1/2 + 1/2 sqrt(81) = 5.
    """
    lower, upper = dynamic_clip_bounds(row(0.8, 0.01).log(), 0.16, 0.2)
    torch.testing.assert_close(lower, row(0.7236068, 0.5))
    torch.testing.assert_close(upper, row(1.2071068, 5.0))


@given(st.floats(1e-4, 1.0), st.floats(0.01, 0.5))
def test_dynamic_clip_bounds_are_where_the_constraint_is_met(old_prob, epsilon):
    """|(r - 1) r old_prob| = epsilon at the upper bound, and at the lower unless it stays below epsilon everywhere."""
    lower, upper = (bound.item() for bound in dynamic_clip_bounds(torch.tensor(old_prob).log(), epsilon, epsilon))
    assert (upper - 1) * upper * old_prob == pytest.approx(epsilon, rel=1e-3)
    if old_prob > 4.01 * epsilon:
        assert (1 - lower) * lower * old_prob == pytest.approx(epsilon, rel=1e-2)
    else:
        assert lower == pytest.approx(0.5, abs=0.03)


def test_dynamic_clip_by_hand():
    """At old_prob 0.01 ratios from 0.5 to 5 keep their gradient, -A * ratio; beyond, in A's direction, they have none.

    With c = 10 a ratio of 11 has none either way.
    """
    ratios = row(4.0, 6.0, 0.6, 0.4, 6.0, 0.4, 11.0)
    advantages = row(1.0, 1.0, -1.0, -1.0, -1.0, 1.0, -1.0)
    old_log_prob = torch.full((1, 7), math.log(0.01))
    batch = (advantages, None, old_log_prob, old_log_prob + ratios.log(), torch.ones(1, 7, dtype=torch.bool))
    found = token_gradients("dynamic_clip", batch)
    torch.testing.assert_close(found, row(4.0, 0.0, -0.6, 0.0, -6.0, 0.4, 0.0))
    outputs = loss_of("dynamic_clip", batch)
    assert outputs.loss.item() == pytest.approx((-4 - 5 + 0.6 + 0.5 + 6 - 0.4 + 10) / 7)
    assert outputs.metrics["actor/pg_clipfrac_high"] == pytest.approx(2 / 7)
    assert outputs.metrics["actor/pg_clipfrac_low"] == pytest.approx(1 / 7)
    assert outputs.metrics["actor/ppo_kl"] == pytest.approx(-ratios.log().mean().item())


def test_dynamic_clip_has_a_ceiling():
    """At old_prob 0.001 the upper bound is 14.65; positive tokens end at 10 or, where it is greater, at c."""
    old_log_prob = torch.full((1, 3), math.log(0.001))
    log_prob = old_log_prob + row(9.0, 11.0, 4.0).log()
    batch = (row(1.0, 1.0, -1.0), None, old_log_prob, log_prob, torch.ones(1, 3, dtype=torch.bool))
    for c, expected in ((3.0, (9.0, 0.0, 0.0)), (12.0, (9.0, 11.0, -4.0))):
        torch.testing.assert_close(token_gradients("dynamic_clip", batch, clip=(0.2, 0.28, c)), row(*expected))


def test_dynamic_clip_multiplies_rollout_weights_in():
    batch = random_batch()
    weighted = loss_of("dynamic_clip", batch, {"rollout_is_weights": torch.full_like(batch[0], 2.0)}).loss
    torch.testing.assert_close(weighted, 2 * loss_of("dynamic_clip", batch).loss)


def test_high_entropy_tokens_by_hand():
    """A fifth of ten tokens are the two of entropies 10 and 9; a token that is not valid is none of the ten.

    The loss is the mean over the two, so that each has 10 / 2 times the gradient of a mean over all ten.
    """
    entropys = row(3.0, 10.0, 1.0, 8.0, 5.0, 7.0, 9.0, 2.0, 4.0, 6.0, 50.0)
    log_prob = torch.full((1, 11), -1.0)
    batch = (torch.ones(1, 11), entropys, log_prob, log_prob, entropys < 50)
    found = token_gradients("high_entropy_tokens", batch)
    torch.testing.assert_close(found, 5 * ((entropys == 9) | (entropys == 10)).float())
    outputs = loss_of("high_entropy_tokens", batch)
    assert outputs.loss.item() == pytest.approx(-1.0)
    assert outputs.metrics["actor/high_entropy_share"] == pytest.approx(0.2)
    assert outputs.metrics["actor/high_entropy_threshold"] == 9
    assert (token_gradients("high_entropy_tokens", batch, high_entropy_share=1.0) != 0).sum() == 10
    metrics = loss_of("high_entropy_tokens", (*batch[:4], torch.zeros_like(batch[4]))).metrics
    assert metrics["actor/high_entropy_share"] == metrics["actor/high_entropy_threshold"] == 0


@pytest.mark.parametrize("share", [0.2, 0.28])
@pytest.mark.parametrize("count", [1, 5, 25, 36, 199])
def test_high_entropy_tokens_are_the_share_rounded_up(count, share):
    """The loss is the mean over them, found by a plain sort; at a ratio of 1 it is the mean of -A.

    0.28 * 25 is just above 7 in float64.
    """
    generator = torch.Generator().manual_seed(count)
    advantages, entropys = torch.randn(2, 1, count, generator=generator)
    log_prob, mask = torch.full((1, count), -1.0), torch.ones(1, count, dtype=torch.bool)
    outputs = loss_of("high_entropy_tokens", (advantages, entropys, log_prob, log_prob, mask), high_entropy_share=share)
    number = -(-count * round(100 * share) // 100)
    chosen = sorted(zip(entropys[0].tolist(), advantages[0].tolist(), strict=True))[-number:]
    assert outputs.metrics["actor/high_entropy_share"] == pytest.approx(number / count)
    assert outputs.loss.item() == pytest.approx(-sum(advantage for _, advantage in chosen) / number, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_high_entropy_tokens_are_those_of_trl_which_averages_over_all(seed):
    """TRL 1.16 keeps entropies of at least the 0.8-quantile, interpolated, and divides by the number of all tokens."""
    advantages, entropys, old_log_prob, log_prob, mask = batch = random_batch(seed=seed)
    outputs = loss_of("high_entropy_tokens", batch)
    in_order = sorted(entropys[mask].tolist())
    place = 0.8 * (len(in_order) - 1)
    below = int(place)
    threshold = in_order[below] + (place - below) * (in_order[below + 1] - in_order[below])
    total, kept = 0.0, 0
    for entropy, advantage, log_ratio in zip(
        entropys[mask].tolist(), advantages[mask].tolist(), (log_prob - old_log_prob)[mask].tolist(), strict=True
    ):
        ratio = math.exp(log_ratio)
        if entropy >= threshold:
            kept += 1
            total -= min(ratio * advantage, min(max(ratio, 0.8), 1.28) * advantage)
    assert outputs.metrics["actor/high_entropy_share"] == pytest.approx(kept / len(in_order))
    assert outputs.loss.item() * kept / len(in_order) == pytest.approx(total / len(in_order), rel=1e-4, abs=1e-6)


def test_high_entropy_tokens_are_those_that_trls_own_code_chooses():
    """Where TRL is installed too, such as by `pip install --no-deps trl==1.16.0`; on one process."""
    trl = pytest.importorskip("trl", reason="TRL is not in this environment")
    alone = SimpleNamespace(gather=lambda values: values, pad_across_processes=lambda values, **_: values)
    for length in range(1, 60):
        batch = random_batch(seed=length, shape=(2, length))
        _, entropys, old_log_prob, log_prob, mask = batch
        expected = trl.GRPOTrainer.get_high_entropy_mask(SimpleNamespace(accelerator=alone), entropys, mask, 0.8)
        inputs = LossInputs(
            old_log_prob, old_log_prob.clone().requires_grad_(), torch.ones_like(entropys), mask, entropys
        )
        inputs.current_entropys = entropys
        loss = POLICY_LOSSES["high_entropy_tokens"].compute(inputs, actor_config("high_entropy_tokens")).loss
        (slope,) = torch.autograd.grad(loss, inputs.log_prob)
        assert torch.equal(slope != 0, expected)


def test_high_entropy_tokens_are_ranked_by_the_policy_being_updated():
    """The old policy's entropies are in the reverse order."""
    log_prob, ones = torch.full((1, 10), -1.0), torch.ones(1, 10)
    entropys = torch.arange(10.0)[None]
    inputs = LossInputs(log_prob, log_prob.clone().requires_grad_(), ones, ones.bool(), 9 - entropys, entropys)
    loss = POLICY_LOSSES["high_entropy_tokens"].compute(inputs, actor_config("high_entropy_tokens")).loss
    (slope,) = torch.autograd.grad(loss, inputs.log_prob)
    torch.testing.assert_close(slope, -0.5 * (entropys >= 8))


@pytest.mark.parametrize("place, quadrant", list(enumerate(QUADRANTS)))
def test_quadrants_by_hand(quadrant, place):
    """H = ln 2: likely is from exp(-H) = 0.5 on. One token in each quadrant, one without advantage."""
    batch = on_policy((1.0, 1.0, -1.0, -1.0, 0.0), (0.6, 0.4, 0.6, 0.4, 0.6), (math.log(2.0),) * 5)
    expected = row(1.0, 1.0, -1.0, -1.0, 0.0)
    expected[0, place] *= 0.3
    found = token_gradients("quadrant", batch, quadrant=quadrant, quadrant_weight=0.3)
    torch.testing.assert_close(found, expected)
    metrics = loss_of("quadrant", batch, quadrant=quadrant).metrics
    assert metrics["actor/quadrant_share"] == pytest.approx(0.2)


def test_quadrants_are_those_of_the_policy_being_updated():
    """A token that the old policy gave 0.4 and the new one gives 0.6."""
    ones = torch.ones(1, 1)
    inputs = LossInputs(row(0.4).log(), row(0.6).log(), ones, ones, torch.zeros(1, 1))
    assert in_quadrant("positive_likely", inputs, 0.5).all()
    assert not in_quadrant("positive_unlikely", inputs, 0.5).any()


def test_a_fixed_probability_bounds_the_quadrants():
    log_prob = row(0.69, 0.7001, 0.9).log()
    inputs = LossInputs(log_prob, log_prob, torch.ones(1, 3), torch.ones(1, 3), torch.zeros(1, 3))
    inside = in_quadrant("positive_likely", inputs, 0.7)
    assert inside.tolist() == [[False, True, True]]
    # As likely as the bound: ln 1 is exact.
    certain = LossInputs(torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1, 1), torch.zeros(1, 1))
    assert in_quadrant("positive_likely", certain, 1.0).all()


@settings(max_examples=30)
@given(st.integers(0, 10_000))
def test_each_token_with_an_advantage_is_in_one_quadrant(seed):
    advantages, entropys, old_log_prob, log_prob, mask = random_batch(seed=seed)
    inputs = LossInputs(old_log_prob, log_prob, advantages, mask, entropys)
    counts = sum(in_quadrant(name, inputs).int() for name in QUADRANTS)
    assert torch.equal(counts, (advantages != 0).int())


def test_adaptive_entropy_by_hand():
    """PPO's loss minus 0.01 times the mean entropy, which has a gradient."""
    advantages, entropys, old_log_prob, log_prob, mask = batch = random_batch()
    config = actor_config()
    vanilla, _ = compute_policy_loss_vanilla(old_log_prob, log_prob, advantages, mask, "token-mean", config)
    found = loss_of("adaptive_entropy", batch, {"entropy_coeff": 0.01}).loss
    torch.testing.assert_close(found, vanilla - 0.01 * entropys[mask].mean())
    leaf = entropys.clone().requires_grad_()
    loss = loss_of("adaptive_entropy", (advantages, leaf, *batch[2:]), {"entropy_coeff": 0.01}).loss
    (slope,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(slope, -0.01 * mask / mask.sum())


def test_an_entropy_that_is_not_finite_leaves_the_coefficient():
    controller = AdaptiveEntropyCoefficient(target=0.2, increment=0.1, maximum=0.3, value=0.2)
    assert controller.step(math.nan) == 0.0 and controller.value == 0.2


def test_adaptive_entropy_names_what_is_missing():
    advantages, entropys, old_log_prob, log_prob, mask = random_batch()
    inputs = LossInputs(old_log_prob, log_prob, advantages, mask, entropys, entropys)
    with pytest.raises(ValueError, match="entropy_coeff=None: loss_mode=adaptive_entropy expects trainer.v1"):
        POLICY_LOSSES["adaptive_entropy"].compute(inputs, actor_config())


def test_the_adaptive_coefficient_by_hand(tmp_path):
    """Below the target of 0.2 it rises by 1 a step up to 3; above it falls, not below 0, and the bonus is off."""
    controller = AdaptiveEntropyCoefficient(target=0.2, increment=1.0, maximum=3.0)
    below = [controller.step(0.1) for _ in range(5)]
    assert below == [0.0, 1.0, 2.0, 3.0, 3.0]
    assert [controller.step(0.5), controller.step(0.1)] == [0.0, 2.0]
    controller.save(tmp_path)
    resumed = AdaptiveEntropyCoefficient(target=0.2, increment=1.0, maximum=3.0)
    resumed.load(tmp_path)
    assert resumed.value == controller.value == 3.0
    lower = AdaptiveEntropyCoefficient(target=0.2, increment=1.0, maximum=1.5)
    lower.load(tmp_path)
    assert lower.step(0.1) == 1.5
    assert [controller.step(0.5) for _ in range(9)] == [0.0] * 9 and controller.value == 0.0


def test_the_adaptive_bonus_is_on_at_the_target_itself():
    """Where the coefficient falls already."""
    controller = AdaptiveEntropyCoefficient(target=0.2, increment=1.0, maximum=3.0, value=2.0)
    assert controller.step(0.2) == 2.0 and controller.value == 1.0


def test_the_adaptive_coefficient_is_that_of_trl_which_switches_it_a_step_later():
    """TRL 1.16's rule, one update a step: it changes alike, but applies where the entropy before is at most the target.

    Where an entropy equals the target, which none does here, it rises in TRL.
    """
    controller = AdaptiveEntropyCoefficient(target=0.2, increment=0.1, maximum=0.3)
    coefficient, previous, differences = 0.0, math.inf, 0
    for entropy in (0.3, 0.15, 0.1, 0.12, 0.05, 0.25, 0.3, 0.19, 0.18):
        found = controller.step(entropy)
        applied_by_trl = coefficient if previous <= 0.2 else 0.0
        if (entropy <= 0.2) == (previous <= 0.2):
            assert found == pytest.approx(applied_by_trl)
        differences += found != pytest.approx(applied_by_trl)
        coefficient = min(coefficient + 0.1, 0.3) if entropy <= 0.2 else max(coefficient - 0.1, 0.0)
        previous = entropy
        assert controller.value == pytest.approx(coefficient)
    assert differences == 2  # at 0.25, the first above the target, and at 0.19, the first below it again


# The losses' properties.


@pytest.mark.parametrize("mode", LOSSES)
def test_properties(mode):
    check_loss(mode, {"entropy_coeff": 0.01} if mode == "adaptive_entropy" else {})


@pytest.mark.parametrize(
    "mode, field",
    [
        ("archer", "entropys"),
        ("entropy_shaped_advantage", "entropys"),
        ("high_entropy_tokens", "current_entropys"),
        ("quadrant", "entropys"),
    ],
)
def test_missing_entropys_are_named(mode, field):
    advantages, _, old_log_prob, log_prob, mask = random_batch()
    with pytest.raises(ValueError, match=f"^{field}=None: loss_mode={mode} expects"):
        POLICY_LOSSES[mode].compute(LossInputs(old_log_prob, log_prob, advantages, mask), actor_config(mode))


# The advantage estimators, by hand.


def advantages_of(name, rewards, mask, index, config=None, **fields):
    """An estimator on outcome rewards, which stand on the last column as verl's do."""
    token_level_rewards = torch.zeros(mask.shape)
    token_level_rewards[:, -1] = torch.tensor(rewards)
    bind_estimator(name, fields)
    advantages, returns = get_adv_estimator_fn(name)(
        token_level_rewards=token_level_rewards,
        response_mask=mask,
        index=np.array(index, dtype=object),
        config=config,
    )
    assert torch.equal(advantages, returns) and advantages.shape == mask.shape
    return advantages


@pytest.mark.parametrize(
    "name, config, right, wrong",
    [
        ("psr", None, 1.5, 0.0),
        ("nsr", None, 0.0, -3.0),
        ("w_reinforce", None, 0.1, -1.0),
        ("w_reinforce", {"positive_weight": 0.5}, 0.5, -1.0),
    ],
)
@pytest.mark.parametrize("reward_of_wrong", [-1.0, 0.0])
def test_positive_and_negative_reinforcement_by_hand(name, config, right, wrong, reward_of_wrong):
    """Two tokens of the right answer, one of the wrong: 3 / 2 and -3 / 1, so that a mean over three is one over each.

    Both classes count in W-REINFORCE.
    """
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    found = advantages_of(name, [1.0, reward_of_wrong], mask, ["a", "a"], config)
    torch.testing.assert_close(found, torch.tensor([[right, right, 0.0], [wrong, 0.0, 0.0]]))


@pytest.mark.parametrize("name", ["psr", "nsr"])
def test_a_mean_over_all_tokens_is_the_mean_over_one_class(name):
    """Without an answer of the class all advantages are 0."""
    mask = (torch.arange(5) < torch.tensor([[5], [2], [3], [1]])).int()
    found = advantages_of(name, [1.0, 1.0, 0.0, 0.0], mask, ["a", "a", "b", "b"])
    assert found.sum() / mask.sum() == pytest.approx(1.0 if name == "psr" else -1.0)
    assert not advantages_of(name, [0.0 if name == "psr" else 1.0] * 4, mask, ["a", "a", "b", "b"]).any()


def test_unlikeliness_by_hand():
    """Mean log-probs -2, -3 and -1 of three right answers, -4.5 of a wrong one: ranks 2, 1, 3 and 0 of 4, beta 0.5.

    The rewards become 1 - 0.5 * 2/4 = 0.75, 1 - 0.5 * 1/4 = 0.875, 1 - 0.5 * 3/4 = 0.625 and -1. By the sum of the
    log-probs, -4, -3 and -2, the first would be less likely than the second.
    """
    log_prob = torch.tensor([[-1.5, -2.5], [-3.0, 5.0], [-1.0, -1.0], [-4.0, -5.0]])
    mask = torch.tensor([[1, 1], [1, 0], [1, 1], [1, 1]])
    config = {"unlikeliness_beta": 0.5, "norm_adv_by_std_in_grpo": False}
    found = advantages_of("unlikeliness", [1.0, 1.0, 1.0, -1.0], mask, ["a"] * 4, config, old_log_probs=log_prob)
    expected = torch.tensor([0.75, 0.875, 0.625, -1.0])
    expected = (expected - expected.mean())[:, None] * mask
    torch.testing.assert_close(found, expected)


def test_a_likely_wrong_answer_keeps_its_reward():
    """Log-probs -3, -2 and -1 of two right answers and a wrong one, beta 0.3: 1, 1 - 0.3 * 1/3 = 0.9, and -1."""
    config = {"unlikeliness_beta": 0.3, "norm_adv_by_std_in_grpo": False}
    log_prob = torch.tensor([[-3.0], [-2.0], [-1.0]])
    found = advantages_of("unlikeliness", [1.0, 1.0, -1.0], torch.ones(3, 1), ["a"] * 3, config, old_log_probs=log_prob)
    torch.testing.assert_close(found, torch.tensor([[0.7], [0.6], [-1.3]]))


def test_unlikeliness_ranks_within_a_prompt_and_never_twice():
    """Two prompts of two right answers each: the likelier gets 1 - 1/4 * 1/2, the other keeps 1.

    Of two that are equally likely the first counts as the likelier.
    """
    log_prob = torch.tensor([[-1.0], [-5.0], [-2.0], [-5.0]])
    config = {"norm_adv_by_std_in_grpo": False}
    found = advantages_of(
        "unlikeliness", [1.0] * 4, torch.ones(4, 1), ["a", "b", "a", "b"], config, old_log_probs=log_prob
    )
    torch.testing.assert_close(found, torch.tensor([[-0.0625], [-0.0625], [0.0625], [0.0625]]))


def test_unlikeliness_does_not_count_padding():
    """verl fills a batch up with responses without a valid token: they rank nowhere, and their log-prob is 0."""
    log_prob, mask = torch.tensor([[-1.0], [0.0], [-2.0]]), torch.tensor([[1], [0], [1]])
    config = {"norm_adv_by_std_in_grpo": False, "unlikeliness_beta": 0.5}
    found = advantages_of("unlikeliness", [1.0, 0.0, 1.0], mask, ["a"] * 3, config, old_log_probs=log_prob)
    # 1 - 0.5 * 1/2 and 1, above the group's mean with the padding's 0, as in upstream's GRPO.
    torch.testing.assert_close(found, torch.tensor([[0.75 - 1.75 / 3], [0.0], [1.0 - 1.75 / 3]]))


#: Two right answers of two and one tokens, two wrong ones of two and one tokens.
ENTROPYS = torch.tensor([[1.0, 2.0], [3.0, 9.0], [1.0, 4.0], [4.0, 9.0]])
MASK = torch.tensor([[1, 1], [1, 0], [1, 1], [1, 0]])
REWARDS = [1.0, 1.0, -1.0, -1.0]


def test_entropy_weighted_rewards_by_hand():
    """Share 0.2. First place: right ones 0.8 + 0.2 * 2 * (1/4, 3/4), wrong ones 0.8 + 0.2 * 2 * (1, 1/4) / (5/4).

    At the second place one of each is left and gets the whole share: 1 and -1.
    """
    found = entropy_weighted_rewards(
        ENTROPYS, MASK.bool(), torch.tensor([True, True, False, False]), ["a"] * 4, {"entropy_reward_share": 0.2}
    )
    torch.testing.assert_close(found, torch.tensor([[0.9, 1.0], [1.1, 0.0], [-1.12, -1.0], [-0.88, 0.0]]))


def test_entropies_have_a_floor():
    """Of two wrong answers one is certain: 1 / H of 0 counts as 1 / 0.0001, beside 1 / 0.01 of the other.

    0.8 + 0.2 * 2 * (10000, 100) / 10100.
    """
    entropys = torch.tensor([[0.0], [0.01]])
    found = entropy_weighted_rewards(
        entropys, entropys >= 0, torch.tensor([False, False]), ["a"] * 2, {"entropy_reward_share": 0.2}
    )
    torch.testing.assert_close(found, -torch.tensor([[0.8 + 0.4 * 10000 / 10100], [0.8 + 0.4 * 100 / 10100]]))


def test_gtpo_by_hand():
    """The rewards above of the right answers minus their mean over three tokens, 1, by their standard deviation.

    That is sqrt((0.1² + 0 + 0.1²) / 3); of the wrong answers the mean is -1, and 0.12 is in place of 0.1.
    """
    found = advantages_of("gtpo", REWARDS, MASK, ["a"] * 4, {"entropy_reward_share": 0.2}, entropy=ENTROPYS)
    end = math.sqrt(3 / 2)
    # verl adds 1e-6 to the standard deviation, 0.08.
    torch.testing.assert_close(
        found, torch.tensor([[-end, 0.0], [end, 0.0], [-end, 0.0], [end, 0.0]]), rtol=2e-5, atol=2e-6
    )


def test_gtpo_of_both_classes_together_by_hand():
    """The rewards above minus their mean over the six tokens, 0, by their standard deviation over them."""
    config = {"entropy_reward_share": 0.2, "entropy_reward_by_class": False}
    found = advantages_of("gtpo", REWARDS, MASK, ["a"] * 4, config, entropy=ENTROPYS)
    rewards = torch.tensor([[0.9, 1.0], [1.1, 0.0], [-1.12, -1.0], [-0.88, 0.0]])
    spread = math.sqrt((0.81 + 1 + 1.21 + 1.2544 + 1 + 0.7744) / 6)
    torch.testing.assert_close(found, rewards / spread)


def test_grpo_s_by_hand():
    """Mean entropies 1.5, 3, 2.5, 4. Right: 0.8 + 0.4 * (1.5, 3) / 4.5; wrong: 0.8 + 0.4 * (4, 2.5) / 6.5 negated."""
    rewards = torch.tensor([0.9333333, 1.0666667, -1.0461538, -0.9538462])

    def estimate(**config):
        config = {"entropy_reward_share": 0.2, "norm_adv_by_std_in_grpo": False, **config}
        return advantages_of("grpo_s", REWARDS, MASK, ["a"] * 4, config, entropy=ENTROPYS)

    # The means of the two classes are 1 and -1.
    torch.testing.assert_close(estimate(), (rewards - torch.tensor([1.0, 1.0, -1.0, -1.0]))[:, None] * MASK)
    together = estimate(entropy_reward_by_class=False)
    torch.testing.assert_close(together, (rewards - rewards.mean())[:, None] * MASK)
    normed = estimate(entropy_reward_by_class=False, norm_adv_by_std_in_grpo=True)
    torch.testing.assert_close(normed, ((rewards - rewards.mean()) / rewards.std())[:, None] * MASK)


def test_a_response_without_tokens_has_no_part_in_its_class():
    """Of three right answers one has no valid token: the other two are standardised to -1 and 1 by √2."""
    mask = torch.tensor([[1.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
    entropys = torch.tensor([[1.0, 1.0], [2.0, 2.0], [9.0, 9.0]])
    found = advantages_of("grpo_s", [1.0] * 3, mask, ["a"] * 3, entropy=entropys)
    end = math.sqrt(0.5)
    # verl adds 1e-6 to the standard deviation, 0.047.
    torch.testing.assert_close(found, torch.tensor([[-end, -end], [end, end], [0.0, 0.0]]), rtol=5e-5, atol=0)


@pytest.mark.parametrize("share", [0.1, 0.35, 0.6, 0.9])
def test_the_tokens_of_the_only_right_answer_have_no_advantage_in_gtpo(share):
    entropys = 3 * torch.rand(1, 500, generator=torch.Generator().manual_seed(0))
    found = advantages_of("gtpo", [1.0], torch.ones(1, 500), ["a"], {"entropy_reward_share": share}, entropy=entropys)
    assert not found.any()


# The estimators' properties.


@settings(max_examples=40)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 6), st.integers(0, 10_000))
def test_shared_out_rewards_sum_to_the_rewards(prompts, responses, width, seed):
    """At each place the right answers to a prompt get 1 each between them, the wrong ones -1."""
    generator = torch.Generator().manual_seed(seed)
    batch = prompts * responses
    entropys = 3 * torch.rand(batch, width, generator=generator)
    valid = torch.rand(batch, width, generator=generator) < 0.7
    right = torch.rand(batch, generator=generator) < 0.5
    index = np.arange(batch) % prompts
    found = entropy_weighted_rewards(entropys, valid, right, index, {"entropy_reward_share": 0.6})
    assert not found[~valid].any()
    for prompt in range(prompts):
        for outcome, sign in ((right, 1), (~right, -1)):
            chosen = torch.tensor(index == prompt) & outcome
            torch.testing.assert_close(found[chosen].sum(0), sign * valid[chosen].sum(0).float())


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators_do_not_depend_on_order_padding_or_other_prompts(name):
    generator = torch.Generator().manual_seed(0)
    entropy, old_log_probs = torch.rand(12, 6, generator=generator), -torch.rand(12, 6, generator=generator)
    mask = (torch.arange(6) < torch.randint(1, 7, (12, 1), generator=generator)).int()
    rewards = torch.where(torch.rand(12, generator=generator) < 0.5, 1.0, -1.0).tolist()
    index = [f"prompt {i % 3}" for i in range(12)]

    def estimate(rows, extra=0):
        pad = partial(torch.nn.functional.pad, pad=(0, extra))
        fields = {"entropy": pad(entropy[rows]), "old_log_probs": pad(old_log_probs[rows], value=-7.0)}
        found = advantages_of(name, [rewards[i] for i in rows], pad(mask[rows]), [index[i] for i in rows], **fields)
        assert not found[pad(mask[rows]) == 0].any()
        return found

    whole = estimate(list(range(12)))
    assert whole.any()
    order = torch.randperm(12, generator=generator).tolist()
    torch.testing.assert_close(estimate(order), whole[order])
    torch.testing.assert_close(estimate(list(range(12)), extra=3)[:, :6], whole)
    one_prompt = list(range(0, 12, 3))
    # PSR and NSR count the tokens of a class in the whole batch.
    if name not in ("psr", "nsr"):
        torch.testing.assert_close(estimate(one_prompt), whole[one_prompt])


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators_survive_empty_and_certain_responses(name):
    """No valid token in one response, no entropy anywhere."""
    mask = torch.tensor([[1, 1], [0, 0], [1, 0]])
    fields = {"entropy": torch.zeros(3, 2), "old_log_probs": torch.zeros(3, 2)}
    found = advantages_of(name, [1.0, -1.0, 1.0], mask, ["a", "a", "a"], **fields)
    assert found.isfinite().all() and not found[mask == 0].any()


PENALISED = {"use_kl_in_reward": True, "norm_adv_by_std_in_grpo": False}


@pytest.mark.parametrize("name", ["psr", "nsr", "w_reinforce", "gtpo", "grpo_s"])
def test_a_kl_penalty_makes_no_answer_right_or_wrong(name):
    """Penalties of 1.5 and of -1.5, as an estimate of the KL divergence may be, turn the sign of every reward."""
    fields = {"entropy": ENTROPYS, "old_log_probs": -ENTROPYS}
    scores = torch.tensor(REWARDS)[:, None] * torch.tensor([[0.0, 1.0]])
    expected = advantages_of(name, REWARDS, MASK, ["a"] * 4, {"norm_adv_by_std_in_grpo": False}, **fields)
    penalised = [-0.5, -0.5, 0.5, 0.5]
    found = advantages_of(name, penalised, MASK, ["a"] * 4, PENALISED, **fields, rm_scores=scores)
    assert expected.any()
    torch.testing.assert_close(found, expected, rtol=0.0, atol=0.0)


def test_unlikeliness_raises_the_penalised_rewards_of_right_answers():
    """Scores 1, 1 and -1, penalties 1.5, 0 and -1.5; log-probs -1, -2 and -3, so that ranks are 2, 1, 0 of 3.

    With beta 0.3 the factors are 1 - 0.3 * 2/3 = 0.8, 1 - 0.3 * 1/3 = 0.9 and, of the wrong answer, 1.
    """
    log_prob, mask = torch.tensor([[-1.0], [-2.0], [-3.0]]), torch.ones(3, 1)
    config, scores = PENALISED | {"unlikeliness_beta": 0.3}, torch.tensor([[1.0], [1.0], [-1.0]])
    found = advantages_of(
        "unlikeliness", [-0.5, 1.0, 0.5], mask, ["a"] * 3, config, old_log_probs=log_prob, rm_scores=scores
    )
    rewards = torch.tensor([[-0.4], [0.9], [0.5]])
    torch.testing.assert_close(found, rewards - rewards.mean())


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators_name_the_scores_that_the_trainer_must_give(name):
    fields = {"entropy": torch.ones(1, 2), "old_log_probs": torch.ones(1, 2)}
    with pytest.raises(ValueError, match=f"adv_estimator={name}: the batch has no rm_scores; expected trainer.v1"):
        advantages_of(name, [1.0], torch.ones(1, 2), ["a"], PENALISED, **fields)


def test_the_fields_that_an_estimator_reads():
    assert [estimator_fields({"adv_estimator": name}) for name in ("grpo", "psr", "gtpo")] == [(), (), ("entropy",)]
    penalised = [estimator_fields({"adv_estimator": name, **PENALISED}) for name in ("grpo", "psr", "gtpo")]
    assert penalised == [(), ("rm_scores",), ("entropy", "rm_scores")]


@pytest.mark.parametrize("name", [name for name, estimator in REGISTERED.items() if estimator.batch_fields])
def test_estimators_name_what_the_trainer_must_give(name):
    with pytest.raises(
        ValueError, match=f"adv_estimator={name}: the batch has no .*; expected trainer.v1.trainer_mode"
    ):
        advantages_of(name, [1.0], torch.ones(1, 2), ["a"])


BAND = {"entropy_lower_start": 0.6, "entropy_lower_end": 0.4, "entropy_upper_start": 0.7, "entropy_upper_end": 0.5}
AEPO = {"aepo_entropy": 0.5, "aepo_temperature_high": 1.2, "aepo_temperature_low": 0.8, "aepo_share": 0.0625}


def test_options_by_hand():
    defaults = {}
    for options in ADVANTAGE_OPTIONS:
        assert from_config(options, None) == from_config(options, {"positive_weight": None, "of_another": 1})
        defaults |= vars(from_config(options, None))
    expected = {
        "positive_weight": 0.1,
        "unlikeliness_beta": 0.25,
        "entropy_reward_share": 0.1,
        "entropy_reward_by_class": True,
        "clip_b_mu": 2.5,
    }
    assert defaults | expected | BAND | AEPO == defaults
    for bad in (-0.1, 1.5, "much", True):
        with pytest.raises(ValueError, match="algorithm.unlikeliness_beta=.*: expected a number of at least 0 and at"):
            from_config(UnlikelinessOptions, {"unlikeliness_beta": bad})


def test_options_without_their_base_and_fields_that_are_none_are_refused():
    @dataclass
    class Plain:
        share: float = option(0.5)

    with pytest.raises(TypeError, match="^Plain: expected a __post_init__ that calls resolve_options"):
        from_config(Plain, {})
    with pytest.raises(ValueError, match="^mine: rollout_log_probs: expected fields among old_log_probs, entropy"):
        advantage_estimator("mine", "rollout_log_probs")
    with pytest.raises(ValueError, match="^mine: entropies: expected fields of LossInputs, old_log_prob, "):
        policy_loss("mine", needs=("entropies",))


# The trainer's part.


@pytest.fixture(autouse=True)
def registered_estimators():
    """What a test binds to an estimator is gone after it."""
    before = dict(core_algos.ADV_ESTIMATOR_REGISTRY)
    yield
    core_algos.ADV_ESTIMATOR_REGISTRY.update(before)


@pytest.fixture
def trainer(monkeypatch):
    """The steer trainer without Ray: upstream's methods return what they were called with."""
    seen = {"arguments": {}}

    def upstream_compute_advantage(self, batch, metrics):
        with torch.no_grad():
            seen["advantages"] = advantages_without_context("gtpo", **seen["arguments"])
        return batch

    monkeypatch.setattr(trainer_steer.PPOTrainerSync, "_update_actor", lambda self, batch, metrics: batch)
    monkeypatch.setattr(trainer_steer.PPOTrainerSync, "_compute_advantage", upstream_compute_advantage)

    def fetch(keys, partition_id, select_fields):
        nested = torch.nested.as_nested_tensor(
            [row[m.bool()] for row, m in zip(ENTROPYS, MASK, strict=True)], layout=torch.jagged
        )
        scores = torch.nested.as_nested_tensor(
            [row[m.bool()] * reward for row, m, reward in zip(torch.ones(4, 2), MASK, REWARDS, strict=True)],
            layout=torch.jagged,
        )
        seen["fetched"] = (keys, partition_id, select_fields)
        fields = {"entropy": nested, "rm_scores": scores}
        return TensorDict({name: fields[name] for name in select_fields}, batch_size=4)

    monkeypatch.setattr(trainer_steer.tq, "kv_batch_get", fetch)
    built = trainer_steer.SteerTrainer.__new__(trainer_steer.SteerTrainer)
    built.batched = False
    built.step_state, built.target_entropy = None, None
    built.config = OmegaConf.create(
        {
            "algorithm": {"adv_estimator": "gtpo"},
            "trainer": {"skip_old_log_prob": False},
            "actor_rollout_ref": {
                "actor": {"calculate_sum_pi_squared": True, "policy_loss": {"loss_mode": "entropy_control"}}
            },
        }
    )
    built.entropy_audit, built.global_steps, built.total_training_steps = AuditOptions(), 1, 4
    built.seen = seen
    return built


def advantages_without_context(name, rewards=REWARDS, config=None):
    """As verl calls an estimator: what it reads of the old policy is there only if the trainer has put it there."""
    token_level_rewards = torch.zeros(MASK.shape)
    token_level_rewards[:, -1] = torch.tensor(rewards)
    return get_adv_estimator_fn(name)(
        token_level_rewards=token_level_rewards,
        response_mask=MASK,
        index=np.array(["a"] * 4, dtype=object),
        config=config,
    )[0]


def test_the_trainer_gives_an_estimator_the_old_policys_entropies(trainer):
    batch = SimpleNamespace(keys=["a_0_0"], partition_id="train", extra_info={})
    assert trainer._compute_advantage(batch, {}) is batch
    assert trainer.seen["fetched"] == (["a_0_0"], "train", ["entropy"])
    expected = advantages_of("gtpo", REWARDS, MASK, ["a"] * 4, entropy=ENTROPYS)
    torch.testing.assert_close(trainer.seen["advantages"], expected)
    trainer.seen["fetched"], trainer.config.algorithm.adv_estimator = None, "grpo"
    trainer._compute_advantage(batch, {})
    assert trainer.seen["fetched"] is None


def test_several_outputs_of_a_rollout_are_refused_by_estimators_that_would_count_each(trainer, monkeypatch):
    batch = SimpleNamespace(keys=["a_0_0", "a_0_1", "a_1_0"], partition_id="train", extra_info={})
    with pytest.raises(ValueError, match=r"adv_estimator=gtpo: expected grpo or another .* for a rollout \(a_0_1\)"):
        trainer._compute_advantage(batch, {})
    trainer._compute_advantage(SimpleNamespace(keys=["a_0_0"], partition_id="train"), {})
    monkeypatch.setattr(trainer_steer.PPOTrainerSync, "_compute_advantage", lambda self, batch, metrics: batch)
    trainer.config.algorithm.adv_estimator = "grpo"
    assert trainer._compute_advantage(batch, {}) is batch


def test_the_fields_of_a_step_are_let_go(trainer):
    trainer._compute_advantage(SimpleNamespace(keys=["a_0_0"], partition_id="train"), {})
    with pytest.raises(ValueError, match="adv_estimator=gtpo: the batch has no entropy"):
        advantages_without_context("gtpo")


def test_the_trainer_gives_an_estimator_the_scores_before_a_kl_penalty(trainer):
    batch = SimpleNamespace(keys=["a_0_0"], partition_id="train", extra_info={})
    trainer.config.algorithm.use_kl_in_reward = True
    trainer.seen["arguments"] = {"rewards": [-0.5, -0.5, 0.5, 0.5], "config": trainer.config.algorithm}
    trainer._compute_advantage(batch, {})
    assert trainer.seen["fetched"][2] == ["entropy", "rm_scores"]
    expected = advantages_of("gtpo", REWARDS, MASK, ["a"] * 4, entropy=ENTROPYS)
    torch.testing.assert_close(trainer.seen["advantages"], expected)


def test_the_trainer_gives_an_estimator_the_progress_of_the_run(trainer, monkeypatch):
    """The first of four steps; Entrocraft's band moves with it."""
    bound = {}
    monkeypatch.setattr(trainer_steer, "bind_estimator", lambda name, fields: bound.update(fields))
    monkeypatch.setattr(trainer_steer.PPOTrainerSync, "_compute_advantage", lambda self, batch, metrics: batch)
    trainer._compute_advantage(SimpleNamespace(keys=["a_0_0"], partition_id="train", extra_info={}), {})
    assert bound["progress"] == 1 / 4


def test_the_trainer_sends_the_flag_of_the_sums_and_the_coefficient(trainer):
    batch, metrics = SimpleNamespace(extra_info={}), {"actor/entropy": 0.1}
    trainer._update_actor(batch, metrics)
    assert batch.extra_info == {"calculate_sum_pi_squared": True, "token_metrics": True}
    assert "actor/entropy_coeff" not in metrics
    trainer.step_state = AdaptiveEntropyCoefficient(target=0.2, increment=1.0, maximum=3.0, value=2.0)
    trainer._update_actor(batch, metrics)
    assert batch.extra_info["entropy_coeff"] == metrics["actor/entropy_coeff"] == 2.0
    assert trainer.step_state.value == 3.0
    trainer.target_entropy, trainer.global_steps = {1: 0.05, 3: 0.4}, 2
    trainer._update_actor(batch, metrics)
    assert batch.extra_info["target_entropy"] == metrics["actor/target_entropy"] == 0.05
    assert metrics["actor/entropy_coeff"] == 0.0 and trainer.step_state.value == 2.0


def test_the_coefficients_default_options():
    options = PolicyLossConfig(loss_mode="adaptive_entropy", target_entropy=0.5)
    assert AdaptiveEntropyCoefficient.from_options(options) == AdaptiveEntropyCoefficient(0.5, 1e-4, 5e-3)
