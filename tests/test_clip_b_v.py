# SPDX-License-Identifier: Apache-2.0
"""Clip_B and Clip_V: the tokens that they clip, against loops over small vocabularies, and their properties."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from configurations import validated
from hypothesis import given, settings
from hypothesis import strategies as st
from losses import actor_config, gradient
from small_engine import make_engine, mini_batches
from test_interventions import advantages_of
from verl.steer.loss import ppo_loss
from verl.steer.methods.clip_b_v import clip_v_tokens, discriminant_score
from verl.steer.methods.registry import POLICY_LOSSES
from verl.trainer.ppo.core_algos import ClipRatios, LossInputs, compute_policy_loss_vanilla, exact_entropy_change
from verl.utils import tensordict_utils as tu


def states(shape=(4, 25), vocabulary=7, seed=0):
    """Policies of states, and an action sampled in each: log-probs (batch, length, vocabulary) and indices."""
    generator = torch.Generator().manual_seed(seed)
    log_pi = (2.5 * torch.randn(*shape, vocabulary, generator=generator)).log_softmax(-1)
    action = torch.multinomial(log_pi.exp().flatten(0, -2), 1, generator=generator).view(shape)
    return log_pi, action


def inputs_of(log_pi, action, advantages, mask, old_shift=0.0):
    """What the engine computes of these policies; the old policy's log-probs differ by a shift."""
    pi = log_pi.exp()
    log_prob = log_pi.gather(-1, action.unsqueeze(-1)).squeeze(-1)
    sums = (-(pi * log_pi).sum(-1), pi.square().sum(-1), (pi.square() * log_pi).sum(-1))
    return LossInputs(log_prob + old_shift, log_prob, advantages, mask, None, *sums)


def random_inputs(seed=0, shape=(4, 25)):
    log_pi, action = states(shape, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    advantages = torch.randn(shape, generator=generator)
    mask = torch.rand(shape, generator=generator) < 0.8
    return log_pi, action, advantages, mask


def scores_by_loop(log_pi):
    """S of every action, and its mean under the policy, for one state."""
    entropy = -sum(math.exp(x) * x for x in log_pi)
    scores = [math.exp(x) * (entropy + x) for x in log_pi]
    return scores, sum(math.exp(x) * s for x, s in zip(log_pi, scores, strict=True))


def deviation(values):
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))


def clip_v_by_loop(log_pi, action, advantages, mask, mu, share):
    lacks = {}
    for place in np.ndindex(*action.shape):
        if mask[place]:
            scores, expected = scores_by_loop(log_pi[place].double().tolist())
            lacks[place] = expected - scores[action[place]]
    _, spread = deviation(list(lacks.values()))
    found = [place for place, lack in lacks.items() if advantages[place] < 0 and lack > mu * spread]
    found.sort(key=lambda place: -lacks[place])
    clipped = torch.zeros_like(mask)
    for place in found[: max(int(share * len(lacks)), 1)]:
        clipped[place] = True
    return clipped


@pytest.mark.parametrize(
    ("advantages", "mu", "share", "expected"),
    [
        ([-1, -1, -1, -1], 1.8, 0.5, [False, True, True, False]),
        ([-1, -1, -1, -1], 1.8, 0.25, [False, True, False, False]),
        ([-1, -1, -1, -1], 1.8, 0.1, [False, True, False, False]),
        ([-1, 1, -1, -1], 1.8, 0.25, [False, False, True, False]),
        ([-1, -1, -1, -1], 1.9, 0.5, [False] * 4),
    ],
)
def test_clip_v_by_hand(advantages, mu, share, expected):
    """Four states of two actions, of which the sampled one has a probability of 0.5, 0.1, 0.2 and 0.9.

    The entropies are 0.6931, 0.3251, 0.5004 and 0.3251. S = pi (ln pi + H) is 0, -0.1978, -0.2218 and 0.1978, its mean
    under the policy 0, 0.1582, 0.1331 and 0.1582. So E[S] - S is 0, 0.3560, 0.3549 and -0.0396, with a standard
    deviation of 0.1881, of which 1.8 are 0.3386 and 1.9 are 0.3574.
    """
    pi = torch.tensor([0.5, 0.1, 0.2, 0.9], dtype=torch.float64)
    log_pi = torch.stack([pi, 1 - pi], -1).log().unsqueeze(0)
    action, mask = torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.bool)
    inputs = inputs_of(log_pi, action, torch.tensor([advantages]), mask)
    found = discriminant_score(inputs.log_prob, inputs.current_entropys)
    torch.testing.assert_close(found, torch.tensor([[0.0, -0.1978, -0.2218, 0.1978]]), atol=5e-5, rtol=0)
    assert clip_v_tokens(inputs, mu, share)[0].tolist() == expected


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.sampled_from([0.5, 1.0, 2.0]), st.sampled_from([0.0001, 0.05, 1.0]))
def test_clip_v_against_a_loop(seed, mu, share):
    batch = random_inputs(seed)
    found = clip_v_tokens(inputs_of(*batch), mu, share)
    assert torch.equal(found, clip_v_by_loop(*batch, mu, share))


def test_clip_v_clips_something_and_not_everything():
    """So that the comparison above compares."""
    batch = random_inputs()
    counts = [int(clip_v_tokens(inputs_of(*batch), 0.5, share).sum()) for share in (0.0001, 0.05, 1.0)]
    assert counts[0] == 1 < counts[1] < counts[2] < int(batch[3].sum()) / 2


@pytest.mark.parametrize("share", [0.0001, 1.0])
def test_clipped_tokens_lower_the_entropy_most(share):
    """E[S] - S, times |A|, is what a negative token lowers the entropy by to first order, at a ratio of 1."""
    log_pi, action, _, mask = random_inputs()
    inputs = inputs_of(log_pi, action, -torch.ones(mask.shape), mask)
    clipped = clip_v_tokens(inputs, 1.0, share)
    change = exact_entropy_change(inputs, ClipRatios(0.2, 0.28, 10.0))
    assert clipped.any() and (change[clipped].max() < change[mask & ~clipped].min())


def test_clip_v_takes_the_gradient_of_the_clipped_tokens_only():
    log_pi, action, advantages, mask = random_inputs()
    inputs = inputs_of(log_pi, action, advantages, mask, old_shift=0.1)
    config = actor_config("clip_v", clip_v_mu=0.5, clip_v_max_share=0.05)
    clipped = clip_v_tokens(inputs, 0.5, 0.05)

    def loss(x):
        inputs.log_prob = x
        outputs = POLICY_LOSSES["clip_v"].compute(inputs, config)
        return outputs.loss, outputs.metrics

    _, metrics = loss(inputs.log_prob)
    assert metrics["actor/clip_v_share"].item() == pytest.approx(int(0.05 * mask.sum()) / mask.sum().item())
    log_prob, old = inputs.log_prob, inputs.old_log_prob
    vanilla = gradient(lambda x: compute_policy_loss_vanilla(old, x, advantages, mask, "token-mean", config), log_prob)
    assert vanilla[clipped].all()
    torch.testing.assert_close(gradient(loss, log_prob), vanilla.masked_fill(clipped, 0.0))


def test_clip_v_does_not_depend_on_padding_or_garbage():
    log_pi, action, advantages, mask = random_inputs()
    inputs = inputs_of(log_pi, action, advantages, mask)
    expected = clip_v_tokens(inputs, 0.5, 0.05)
    names = ("log_prob", "old_log_prob", "advantages", "current_entropys", "sum_pi_squared", "sum_pi_squared_log_pi")
    padded = {
        name: torch.nn.functional.pad(getattr(inputs, name).masked_fill(~mask, -7.0), (0, 3), value=-9.0)
        for name in names
    }
    found = clip_v_tokens(LossInputs(response_mask=torch.nn.functional.pad(mask, (0, 3)), **padded), 0.5, 0.05)
    assert torch.equal(found, torch.nn.functional.pad(expected, (0, 3)))


@pytest.mark.parametrize("case", ["no token", "no advantage", "positive", "one token"])
def test_clip_v_clips_nothing(case):
    """Of a single token the deviation is 0."""
    log_pi, action, advantages, mask = random_inputs()
    advantages = {"no advantage": torch.zeros_like(advantages), "positive": advantages.abs()}.get(case, advantages)
    if case == "one token":
        mask, advantages = torch.zeros_like(mask), -advantages.abs()
        lack = inputs_of(log_pi, action, advantages, mask)
        lack = (
            lack.current_entropys * lack.sum_pi_squared
            + lack.sum_pi_squared_log_pi
            - discriminant_score(lack.log_prob, lack.current_entropys)
        )
        mask.view(-1)[lack.argmax()] = True
    mask = torch.zeros_like(mask) if case == "no token" else mask
    inputs = inputs_of(log_pi, action, advantages, mask)
    assert not clip_v_tokens(inputs, 0.0, 1.0).any()
    outputs = POLICY_LOSSES["clip_v"].compute(inputs, actor_config("clip_v", clip_v_mu=0.0))
    assert outputs.metrics["actor/clip_v_share"] == 0 and torch.equal(outputs.token_weights, mask.float())


def test_the_score_of_bf16_inputs_is_computed_in_float32():
    inputs = inputs_of(*random_inputs())
    half = inputs.log_prob.bfloat16(), inputs.current_entropys.bfloat16()
    found = discriminant_score(*half)
    assert found.dtype == torch.float32
    assert torch.equal(found, discriminant_score(*(values.float() for values in half)))


def test_clip_v_of_bf16_inputs_is_computed_in_float32():
    inputs = inputs_of(*random_inputs())
    names = [name for name in vars(inputs) if getattr(inputs, name) is not None and name != "response_mask"]
    half = {name: getattr(inputs, name).bfloat16() for name in names}
    whole = {name: value.float() for name, value in half.items()}
    config = actor_config("clip_v", clip_v_mu=0.5, clip_v_max_share=0.05)
    losses = [
        POLICY_LOSSES["clip_v"].compute(LossInputs(response_mask=inputs.response_mask, **fields), config).loss
        for fields in (half, whole)
    ]
    assert losses[0].dtype == torch.float32 and torch.equal(*losses)


@pytest.mark.parametrize("missing", ["current_entropys", "sum_pi_squared", "sum_pi_squared_log_pi"])
def test_missing_inputs_are_named(missing):
    inputs = inputs_of(*random_inputs())
    setattr(inputs, missing, None)
    with pytest.raises(ValueError, match=f"{missing}=None: loss_mode=clip_v expects it"):
        POLICY_LOSSES["clip_v"].compute(inputs, actor_config("clip_v"))


REWARDS = [1.0, -1.0, 1.0, -1.0]


def clip_b_by_loop(score, advantages, mask, mu):
    mean, spread = deviation([value for value, m in zip(score.flatten().tolist(), mask.flatten(), strict=True) if m])
    clipped = torch.zeros_like(mask, dtype=torch.bool)
    for place in np.ndindex(*score.shape):
        clipped[place] = bool(mask[place]) and advantages[place] < 0 and score[place] - mean < -mu * spread
    return clipped


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.sampled_from([0.5, 1.0, 2.5]))
def test_clip_b_against_a_loop(seed, mu):
    log_pi, action, _, mask = random_inputs(seed)
    inputs = inputs_of(log_pi, action, None, mask)
    config = {"clip_b_mu": mu, "norm_adv_by_std_in_grpo": True}
    fields = {"old_log_probs": inputs.log_prob, "entropy": inputs.current_entropys}
    mask = mask.int()
    found = advantages_of("clip_b", REWARDS, mask, ["a"] * 4, config, **fields)
    # Of two right and two wrong answers the advantages are 1 and -1 over the unbiased deviation, sqrt(4/3).
    plain = torch.tensor(REWARDS)[:, None] * mask / (math.sqrt(4 / 3) + 1e-6)
    score = inputs.log_prob.double().exp() * (inputs.log_prob.double() + inputs.current_entropys.double())
    clipped = clip_b_by_loop(score, plain, mask, mu)
    torch.testing.assert_close(found, plain.masked_fill(clipped, 0.0))


def test_clip_b_by_hand():
    """Scores of five tokens, 0.5 (H + ln 0.5), are 1 four times and -4 once: mean 0, deviation 2.

    The last token of the wrong answer is 2 deviations below the mean; that of a right answer would stay.
    """
    log_prob = torch.full((2, 3), 0.5).log()
    entropy = torch.tensor([[2.0, 2.0, 77.0], [2.0, 2.0, -8.0]]) - math.log(0.5)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    fields = {"old_log_probs": log_prob, "entropy": entropy}
    config = {"norm_adv_by_std_in_grpo": False}
    for mu, kept in ((2.5, 1.0), (2.1, 1.0), (1.9, 0.0)):
        found = advantages_of("clip_b", [1.0, -1.0], mask, ["a", "a"], config | {"clip_b_mu": mu}, **fields)
        torch.testing.assert_close(found, torch.tensor([[1.0, 1.0, 0.0], [-1.0, -1.0, -kept]]))
    found = advantages_of("clip_b", [-1.0, 1.0], mask, ["a", "a"], config | {"clip_b_mu": 1.9}, **fields)
    torch.testing.assert_close(found, torch.tensor([[-1.0, -1.0, 0.0], [1.0, 1.0, 1.0]]))


def test_clip_b_clips_nothing_where_the_scores_are_almost_the_same():
    """exp(-33) (1 - 33) and the wrong answer's exp(-32) (1 - 32): their deviation of 1.2e-13 is rounding."""
    fields = {"old_log_probs": torch.tensor([[-33.0], [-32.0]]), "entropy": torch.ones(2, 1)}
    config = {"norm_adv_by_std_in_grpo": False, "clip_b_mu": 0.0}
    found = advantages_of("clip_b", [1.0, -1.0], torch.ones(2, 1), ["a", "a"], config, **fields)
    assert found.flatten().tolist() == [1.0, -1.0]


def test_clip_b_of_bf16_inputs_is_computed_in_float32():
    log_pi, action, _, mask = random_inputs()
    inputs, mask = inputs_of(log_pi, action, None, mask), mask.int()
    half = {"old_log_probs": inputs.log_prob.bfloat16(), "entropy": inputs.current_entropys.bfloat16()}
    whole = {name: value.float() for name, value in half.items()}
    found = [
        advantages_of("clip_b", REWARDS, mask, ["a"] * 4, {"clip_b_mu": 1.0}, **fields) for fields in (half, whole)
    ]
    assert (found[0] == 0)[mask.bool()].any() and torch.equal(*found)


def test_clip_v_asks_for_the_sums_over_the_vocabulary():
    actor = validated("clip_v", "actor_rollout_ref.actor.fsdp_config.one_pass_reductions=false")[
        0
    ].actor_rollout_ref.actor
    assert actor.calculate_entropy and actor.calculate_sum_pi_squared and actor.fsdp_config.one_pass_reductions


@pytest.mark.parametrize(
    "name, override, message",
    [
        (
            "clip_v",
            "actor_rollout_ref.model.use_fused_kernels=true",
            "expected false with loss_mode=clip_v, which reads",
        ),
        (
            "clip_v",
            "trainer.v1.trainer_mode=sync",
            "trainer_mode=sync: expected steer with policy_loss.loss_mode=clip_v",
        ),
        (
            "clip_b",
            "++algorithm.rollout_correction.bypass_mode=true",
            "algorithm.adv_estimator=clip_b: expected another",
        ),
        ("clip_b", "algorithm.clip_b_mu=-1", "algorithm.clip_b_mu=-1: expected a finite number of at least 0"),
    ],
)
def test_what_a_run_lacks_is_named(name, override, message):
    # hardware=cpu has the batched manager, which has its own error without the trainer of this fork.
    manager = "actor_rollout_ref.rollout.agent.agent_loop_manager_class=null"
    with pytest.raises(ValueError, match=message):
        validated(name, override, manager)


def test_an_engine_gives_clip_v_its_sums(one_rank, model_folder):
    """Without a threshold the tokens clipped are the negative ones whose score is below its mean: a part of them."""
    engine = make_engine(model_folder)
    batch = mini_batches(calculate_sum_pi_squared=True)[0]
    tu.assign_non_tensor(batch, calculate_entropy=True)
    loss = partial(ppo_loss, config=actor_config("clip_v", clip_v_mu=0.0, clip_v_max_share=1.0))
    with engine.train_mode():
        metrics = engine.train_batch(batch, loss)["metrics"]
    negative = (batch["advantages"].values() < 0)[batch["response_mask"].values() == 1].float().mean()
    assert 0 < metrics["actor/clip_v_share"].aggregate() < negative
