# SPDX-License-Identifier: Apache-2.0
"""`loss_mode=entropic`: EntroPIC's loss and controller by hand."""

import math

import pytest
import torch
from loss_properties import check_loss, loss_of, random_fields, row, token_gradients
from verl.steer.config import PolicyLossConfig
from verl.steer.methods.adaptive_entropy import AdaptiveEntropyCoefficient
from verl.steer.methods.entropic import EntroPICCoefficient
from verl.steer.methods.registry import POLICY_LOSSES
from verl.steer.methods.step_state import STATE_FILE
from verl.trainer.ppo.core_algos import LossInputs

#: Likely tokens are the first three: ln 0.97, 0.96, 0.99 and 0.95, 0.5.
PROBS = (0.97, 0.96, 0.99, 0.94, 0.5)
ADVANTAGES = (2.0, -1.0, 0.0, 1.0, -1.0)


def batch_of(ratios=(1.0,) * 5):
    log_prob = row(*PROBS).log()
    return row(*ADVANTAGES), None, log_prob - row(*ratios).log(), log_prob, torch.ones(1, 5, dtype=torch.bool)


def test_loss_by_hand_on_policy():
    """alpha = 0.25: A (1 + 0.25) for a likely token with A > 0, A (1 - 0.25) with A < 0, A for the unlikely ones."""
    outputs = loss_of("entropic", batch_of(), {"entropy_coeff": 0.25})
    expected = row(2.5, -0.75, 0.0, 1.0, -1.0)
    torch.testing.assert_close(token_gradients("entropic", batch_of(), {"entropy_coeff": 0.25}), expected)
    assert outputs.loss.item() == pytest.approx(-expected.mean().item())
    assert outputs.metrics["actor/likely_share"] == pytest.approx(3 / 5)
    wide = token_gradients("entropic", batch_of(), {"entropy_coeff": 0.25}, entropic_probability=0.9)
    torch.testing.assert_close(wide, row(2.5, -0.75, 0.0, 1.25, -1.0))


def test_the_controlled_part_has_no_clip():
    """At a ratio of 2 PPO leaves no gradient for A = 2; alpha * ratio * |A| = 0.25 * 2 * 2 stays."""
    found = token_gradients("entropic", batch_of((2.0, 1.0, 1.0, 1.0, 1.0)), {"entropy_coeff": 0.25})
    torch.testing.assert_close(found, row(1.0, -0.75, 0.0, 1.0, -1.0))


def test_a_ratio_ends_at_exp_20():
    """As in verl's loss. The first token, with A = 2, has alpha * ratio * |A| = 0.25 * exp(20) * 2."""
    outputs = loss_of("entropic", batch_of((math.exp(30), 1.0, 1.0, 1.0, 1.0)), {"entropy_coeff": 0.25})
    assert outputs.loss.item() == pytest.approx(-0.5 * math.exp(20) / 5, rel=1e-4)


def test_rollout_weights_multiply_both_parts():
    weights = torch.full((1, 5), 3.0)
    fields = {"entropy_coeff": 0.25}
    weighted = loss_of("entropic", batch_of(), fields | {"rollout_is_weights": weights}).loss
    torch.testing.assert_close(weighted, 3 * loss_of("entropic", batch_of(), fields).loss)


def test_controller_by_hand(tmp_path):
    """Errors of entropy minus target 0.1, -0.2 and 0.4: K_p e + K_i times their sum so far, at most 1."""
    options = PolicyLossConfig(loss_mode="entropic", target_entropy=0.5, target_kp=2.0, target_ki=0.5)
    controller = EntroPICCoefficient.from_options(options)
    assert controller.step(0.6) == pytest.approx(2 * 0.1 + 0.5 * 0.1)
    assert controller.step(0.3) == pytest.approx(-2 * 0.2 + 0.5 * -0.1)
    controller.save(tmp_path)
    resumed = EntroPICCoefficient.from_options(options)
    resumed.load(tmp_path)
    assert controller.step(0.9) == resumed.step(0.9) == pytest.approx(2 * 0.4 + 0.5 * 0.3)
    assert controller.step(5.0) == 1.0 and controller.step(-5.0) == -1.0


def test_the_number_of_another_loss_is_left(tmp_path, caplog):
    """A coefficient is no sum of errors."""
    AdaptiveEntropyCoefficient(0.2, 1.0, 3.0, value=2.0).save(tmp_path)
    controller = EntroPICCoefficient(0.5, 1.0, 0.01)
    controller.load(tmp_path)
    assert controller.value == 0.0
    assert f"{tmp_path / STATE_FILE} is of loss_mode=adaptive_entropy: with entropic it starts" in caplog.text
    (tmp_path / STATE_FILE).write_text("0.3")  # as an earlier version wrote it
    controller.load(tmp_path)
    assert controller.value == 0.3


def test_an_entropy_that_is_not_finite_stays_without_effect():
    controller = EntroPICCoefficient(0.5, 1.0, 0.01)
    assert controller.step(math.nan) == controller.step(math.inf) == 0.0
    assert controller.step(0.6) == pytest.approx(0.1 + 0.01 * 0.1)


def test_the_controllers_default_options():
    options = PolicyLossConfig(loss_mode="entropic", target_entropy=0.5)
    assert EntroPICCoefficient.from_options(options) == EntroPICCoefficient(0.5, 1.0, 0.01)


def test_a_missing_coefficient_is_named():
    log_prob = row(-1.0)
    with pytest.raises(
        ValueError, match="entropy_coeff=None: loss_mode=entropic expects trainer.v1.trainer_mode=steer"
    ):
        POLICY_LOSSES["entropic"].compute(LossInputs(log_prob, log_prob, log_prob, log_prob), None)


def test_properties():
    check_loss("entropic", {"entropy_coeff": 0.3})
    check_loss("entropic", random_fields("rollout_is_weights", entropy_coeff=-0.3), entropic_probability=0.1)
