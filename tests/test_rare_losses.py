# SPDX-License-Identifier: Apache-2.0
"""Rare cases of the losses: sizes of mini-batches, ranks, flags, bfloat16, padding and extreme ratios."""

import math

import pytest
import torch
from loss_properties import check_loss, loss_of, row, token_gradients
from losses import actor_config, micro_batch, random_batch
from test_opefo import STATES, change_of
from test_opefo import inputs_of as opefo_inputs
from verl.steer import loss as loss_module
from verl.steer.config import PolicyLossConfig
from verl.steer.loss import ppo_loss
from verl.steer.methods.bapo import find_bounds
from verl.steer.methods.quadrant import in_quadrant
from verl.steer.methods.registry import POLICY_LOSSES
from verl.trainer.ppo.core_algos import LossInputs
from verl.utils import tensordict_utils as tu
from verl.utils.metric import AggregationType
from verl.workers.utils.losses import ppo_loss as verl_ppo_loss


@pytest.mark.parametrize("mode", ["adaptive_entropy", "entropic"])
def test_ppo_loss_hands_over_the_coefficient(mode):
    """Of 0 and of 0.5: the loss falls, by half of the mean entropy with `adaptive_entropy`."""
    found = []
    for coefficient in (0.0, 0.5):
        data, output = micro_batch()
        tu.assign_non_tensor(data, entropy_coeff=coefficient)
        found.append(ppo_loss(actor_config(mode, entropic_probability=0.1), dict(output), data)[0].item())
    assert found[1] < found[0]
    if mode == "adaptive_entropy":
        entropys = loss_module.loss_inputs(output, data).current_entropys
        assert found[0] - found[1] == pytest.approx(0.5 * entropys.sum().item() / 9)


@pytest.mark.parametrize("mode", ["adaptive_entropy", "entropic"])
@pytest.mark.parametrize("agg", ["token-mean", "seq-mean-token-mean"])
def test_the_added_term_of_micro_batches_adds_up_to_that_of_the_mini_batch(mode, agg):
    """Its first row, and the other five, on one rank and on two, whose gradients are averaged."""
    advantages, entropys, old_log_prob, log_prob, mask = random_batch()
    options = {"entropic_probability": 0.2} if mode == "entropic" else {}

    def term(rows, ranks=1):
        """The loss with a coefficient less that without."""
        config = actor_config(mode, agg=agg, **options)
        config.global_batch_info.update(batch_num_tokens=mask.sum(), global_batch_size=len(mask), dp_size=ranks)
        losses = [
            POLICY_LOSSES[mode]
            .compute(
                LossInputs(
                    old_log_prob[rows], log_prob[rows], advantages[rows], mask[rows], entropys[rows], entropys[rows],
                    entropy_coeff=coefficient,
                ),
                config,
            )
            .loss
            for coefficient in (0.3, 0.0)
        ]  # fmt: skip
        return losses[0] - losses[1]

    whole = term(slice(None))
    assert whole.abs() > 1e-3
    for ranks in (1, 2):
        parts = [term(rows, ranks) for rows in (slice(1), slice(1, None))]
        torch.testing.assert_close(sum(parts) / ranks, whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("ranks, aggregation", [(2, AggregationType.SUM), (1, AggregationType.MEAN)])
def test_losses_are_added_up_as_in_verl_where_only_the_number_of_ranks_is_known(ranks, aggregation):
    """A sum over tokens needs no size of the batch."""
    data, output = micro_batch()
    tu.assign_non_tensor(data, batch_num_tokens=None, global_batch_size=None, dp_size=ranks)
    _, metrics = ppo_loss(actor_config(agg="token-sum"), dict(output), data)
    _, expected = verl_ppo_loss(actor_config("vanilla", agg="token-sum"), dict(output), data)
    assert metrics["actor/pg_loss"].aggregation is expected["actor/pg_loss"].aggregation is aggregation


@pytest.mark.parametrize("mode", ["entropy_control", "adaptive_entropy"])
def test_the_loss_is_multiplied_by_the_number_of_ranks(mode):
    """Ranks' gradients are averaged, so that with a size of the whole batch each counts as many times."""
    losses = []
    for ranks in (1, 2):
        data, output = micro_batch()
        tu.assign_non_tensor(data, dp_size=ranks, entropy_coeff=0.1)
        losses.append(ppo_loss(actor_config(mode), dict(output), data)[0])
    torch.testing.assert_close(losses[1], 2 * losses[0])


def test_the_entropy_bonus_of_bf16_entropies_is_computed_in_float32():
    losses = []
    for convert in (torch.Tensor.bfloat16, lambda values: values.bfloat16().float()):
        data, output = micro_batch()
        output["entropy"] = convert(output["entropy"])
        config = actor_config(token_weight_min=1.0, token_weight_max=1.0)
        object.__setattr__(config, "entropy_coeff", 0.5)
        losses.append(ppo_loss(config, output, data)[1]["actor/entropy_loss"].values[0])
    assert losses[0] == losses[1]


def test_the_entropies_in_the_place_of_the_old_ones_have_no_gradient():
    """As in bypass mode; the current ones have one."""
    data, output = micro_batch(with_entropy=False)
    output["entropy"].requires_grad_()
    inputs = loss_module.loss_inputs(output, data)
    assert inputs.current_entropys.requires_grad and not inputs.entropys.requires_grad
    assert torch.equal(inputs.entropys, inputs.current_entropys)


def test_steers_loss_has_the_metrics_of_its_tokens_unasked():
    """`token_metrics` asks for those of losses that estimate no entropy change."""
    data, output = micro_batch()
    _, metrics = ppo_loss(actor_config(), dict(output), data)
    assert "actor/quadrant/positive_likely/change" in metrics
    _, metrics = ppo_loss(actor_config("bapo"), dict(output), data)
    assert "actor/quadrant/positive_likely/change" not in metrics


def test_the_metrics_have_the_coefficient_of_the_kl_loss():
    data, output = micro_batch()
    data["ref_log_prob"] = data["old_log_probs"] * 0.9
    config = actor_config()
    for name, value in (("use_kl_loss", True), ("kl_loss_coef", 0.25)):
        object.__setattr__(config, name, value)
    assert ppo_loss(config, dict(output), data)[1]["kl_coef"] == 0.25


@pytest.mark.parametrize("mode", ["bapo", "ce_gppo", "dynamic_clip"])
def test_a_loss_without_weights_returns_none_where_outputs_are_requested(mode):
    """As an audited update requests them."""
    data, output = micro_batch()
    tu.assign_non_tensor(data, return_model_output=True)
    ppo_loss(actor_config(mode), output, data)
    assert output.keys() == {"log_probs", "entropy"}


def test_archers_upper_bounds_by_hand():
    """Ratio 1.25, A = 1: the four tokens of entropy 1 are clipped at 1.2, that of entropy 2 is not.

    The actor's own clip, 0.28, is no bound of either.
    """
    old_log_prob, mask = torch.full((1, 5), math.log(0.1)), torch.ones(1, 5, dtype=torch.bool)
    batch = (torch.ones(1, 5), row(1.0, 1.0, 2.0, 1.0, 1.0), old_log_prob, old_log_prob + math.log(1.25), mask)
    torch.testing.assert_close(token_gradients("archer", batch), row(0.0, 0.0, 1.25, 0.0, 0.0))
    assert loss_of("archer", batch).loss.item() == pytest.approx(-(4 * 1.2 + 1.25) / 5)


def test_bapos_bounds_do_not_depend_on_what_is_in_the_padding():
    """Ratios of e^100 and advantages that are no number."""
    advantages, _, old_log_prob, log_prob, mask = random_batch()
    expected = find_bounds(LossInputs(old_log_prob, log_prob, advantages, mask), PolicyLossConfig())
    dirty = LossInputs(
        old_log_prob.masked_fill(~mask, -100.0), log_prob.masked_fill(~mask, 0.0),
        advantages.masked_fill(~mask, math.nan), mask,
    )  # fmt: skip
    assert find_bounds(dirty, PolicyLossConfig()) == expected


def test_a_token_without_an_advantage_has_no_part_in_bapos_shares():
    """Whatever its ratio, such as e^100: shares of 1.1 and 0.9 of A = 1 and -1 alone."""
    log_ratio = row(math.log(1.1), math.log(0.9), 100.0)
    old_log_prob = row(-5.0, -5.0, -101.0)
    inputs = LossInputs(old_log_prob, old_log_prob + log_ratio, row(1.0, -1.0, 0.0), torch.ones(1, 3))
    low, high, share = find_bounds(inputs, PolicyLossConfig())
    assert (low.item(), high.item()) == pytest.approx((0.6, 1.2)) and share.item() == pytest.approx(0.55)


def test_bapos_ratios_of_bf16_log_probs_are_computed_in_float32():
    *tensors, mask = random_batch()
    half = [tensor.bfloat16() for tensor in tensors]
    found, expected = (
        find_bounds(LossInputs(old_log_prob, log_prob, advantages, mask), PolicyLossConfig())
        for advantages, _, old_log_prob, log_prob in (half, [tensor.float() for tensor in half])
    )
    assert found == expected


def test_ce_gppos_kl_is_verls_of_ratios_beyond_the_range_of_numbers():
    """Log ratios of 25 and -30 count as 20 and -20, as in verl's loss; one of 1 as it is."""
    log_ratio = row(25.0, -30.0, 1.0)
    old_log_prob = row(-40.0, -1.0, -2.0)
    batch = (row(1.0, -1.0, 1.0), None, old_log_prob, old_log_prob + log_ratio, torch.ones(1, 3).bool())
    assert loss_of("ce_gppo", batch).metrics["actor/ppo_kl"].item() == pytest.approx(-(20 - 20 + 1) / 3)


def test_ce_gppos_third_bound_is_of_negative_tokens_alone():
    """A positive one at a ratio of 11, above c = 10, without an upper bound: A times its ratio."""
    log_prob = row(-1.0, -1.0)
    batch = (row(1.0, -1.0), None, log_prob - math.log(11.0), log_prob, torch.ones(1, 2).bool())
    found = token_gradients("ce_gppo", batch, clip=(0.2, math.inf, 10.0))
    torch.testing.assert_close(found, row(11.0, 0.0))
    assert loss_of("ce_gppo", batch).loss.item() == pytest.approx((-1.28 + 10) / 2)


def test_shaped_advantages_of_bf16_are_computed_in_float32():
    """A third of an advantage, which bfloat16 rounds, unlike a half."""
    check_loss("entropy_shaped_advantage", {}, advantage_entropy_kappa=3.0)


def test_opefo_of_a_response_without_a_valid_token():
    """verl fills batches up with such responses, and rejection makes others; a share of 0 tokens is no number."""
    (advantages, _, log_prob, _, _), fields = opefo_inputs(STATES)
    empty = {name: torch.cat([values, torch.zeros_like(values)]) for name, values in fields.items()}
    mask = torch.tensor([[True] * 4, [False] * 4])
    two = [torch.cat([values, torch.zeros_like(values)]) for values in (log_prob, log_prob, advantages)]
    config = actor_config("opefo", agg="seq-mean-token-mean")
    outputs = POLICY_LOSSES["opefo"].compute(LossInputs(*two, mask, **empty), config)
    changes = [change_of(*state) for state in STATES]
    expected = -sum(changes) / sum(map(abs, changes))
    assert outputs.metrics["actor/opefo_lambda"].item() == pytest.approx(expected, rel=1e-5)
    assert outputs.loss.isfinite()


def test_the_probability_of_a_bf16_log_prob_is_computed_in_float32():
    """exp(-0.69140625) is 0.50087, above 0.5005; bfloat16 has nothing between 0.5 and 0.5039."""
    log_prob = row(-0.69140625).bfloat16()
    ones = torch.ones(1, 1)
    assert in_quadrant("positive_likely", LossInputs(log_prob, log_prob, ones, ones, ones), 0.5005).all()
