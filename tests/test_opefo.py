# SPDX-License-Identifier: Apache-2.0
"""`loss_mode=opefo`: weights by hand, and that they cancel the first-order change of the entropy."""

import math

import pytest
import torch
from loss_properties import check_loss, loss_of, random_fields, row, token_gradients
from losses import actor_config
from verl.steer.methods.opefo import balancing_lambda, sign_weights
from verl.steer.methods.registry import POLICY_LOSSES
from verl.trainer.ppo.core_algos import LossInputs


def test_weights_by_hand():
    """Changes of 1 and 2 up, 6 and 3 down: lambda = (9 - 3) / (9 + 3) = 1/2; 3 * 1.5 = 9 * 0.5."""
    change = row(1.0, -6.0, 0.0, 2.0, -3.0)
    assert balancing_lambda(change) == 0.5
    torch.testing.assert_close(sign_weights(change, 0.5), row(1.5, 0.5, 1.0, 1.5, 0.5))


@pytest.mark.parametrize("change, weight", [(row(2.0, 3.0), 0.0), (row(-2.0, -3.0), 0.0), (row(0.0, 0.0), 1.0)])
def test_weights_of_one_sign(change, weight):
    """Changes that nothing can cancel get a weight of 0."""
    torch.testing.assert_close(sign_weights(change, balancing_lambda(change)), torch.full_like(change, weight))


#: Distributions over three actions, the action sampled in each, and its advantage; two states rise in entropy.
STATES = [((0.7, 0.2, 0.1), 0, 1.0), ((0.7, 0.2, 0.1), 2, 1.0), ((0.5, 0.4, 0.1), 0, -2.0), ((0.6, 0.3, 0.1), 1, -1.0)]


def change_of(probs, action, advantage, ratio=1.0):
    """The first-order change of the entropy by a step on the logits, by its definition as a sum over the actions."""
    entropy = -sum(p * math.log(p) for p in probs)
    steps = [ratio * advantage * ((i == action) - p) for i, p in enumerate(probs)]
    return sum(-p * (math.log(p) + entropy) * step for p, step in zip(probs, steps, strict=True))


def inputs_of(states):
    log_prob = row(*(math.log(probs[action]) for probs, action, _ in states))
    advantages = row(*(advantage for *_, advantage in states))
    fields = {
        "current_entropys": row(*(-sum(p * math.log(p) for p in probs) for probs, *_ in states)),
        "sum_pi_squared": row(*(sum(p * p for p in probs) for probs, *_ in states)),
        "sum_pi_squared_log_pi": row(*(sum(p * p * math.log(p) for p in probs) for probs, *_ in states)),
    }
    return (advantages, None, log_prob, log_prob.clone(), torch.ones_like(log_prob).bool()), fields


def test_loss_by_hand():
    """Each token's gradient is its advantage times 1 + lambda, or 1 - lambda where its update lowers the entropy."""
    changes = [change_of(*state) for state in STATES]
    up, down = sum(c for c in changes if c > 0), -sum(c for c in changes if c < 0)
    strength = (down - up) / (down + up)
    weights = [1 + strength if c > 0 else 1 - strength for c in changes]
    assert min(up, down) > 0 and abs(strength) > 0.1
    assert sum(w * c for w, c in zip(weights, changes, strict=True)) == pytest.approx(0.0, abs=1e-12)
    batch, fields = inputs_of(STATES)
    expected = row(*(w * state[2] for w, state in zip(weights, STATES, strict=True)))
    torch.testing.assert_close(token_gradients("opefo", batch, fields), expected)
    outputs = loss_of("opefo", batch, fields)
    assert outputs.metrics["actor/opefo_lambda"] == pytest.approx(strength, rel=1e-5)
    assert outputs.loss.item() == pytest.approx(-expected.mean().item(), rel=1e-5)


def test_a_lambda_that_stays_the_same():
    batch, fields = inputs_of(STATES)
    weights = [1.1 if change_of(*state) > 0 else 0.9 for state in STATES]
    expected = row(*(w * state[2] for w, state in zip(weights, STATES, strict=True)))
    torch.testing.assert_close(token_gradients("opefo", batch, fields, opefo_lambda=0.1), expected)
    assert loss_of("opefo", batch, fields, opefo_lambda=0.1).metrics["actor/opefo_lambda"] == pytest.approx(0.1)


def test_clipped_tokens_do_not_count():
    """A token above the ratio 1.28 has no gradient: without it the three others balance."""
    batch, fields = inputs_of(STATES)
    advantages, _, old_log_prob, log_prob, mask = batch
    old_log_prob = old_log_prob - row(0.0, math.log(1.5), 0.0, 0.0)
    changes = [change_of(*state) for i, state in enumerate(STATES) if i != 1]
    expected = -sum(changes) / sum(map(abs, changes))
    found = loss_of("opefo", (advantages, None, old_log_prob, log_prob, mask), fields).metrics["actor/opefo_lambda"]
    assert found == pytest.approx(expected, rel=1e-5)


def test_changes_count_as_the_tokens_do_in_the_loss():
    """Two responses, of three tokens and of one, with rollout weights: what the loss adds up cancels."""
    (advantages, _, log_prob, _, _), fields = inputs_of(STATES)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    rollout_is_weights = torch.tensor([[0.5, 2.0, 1.0], [3.0, 1.0, 1.0]])

    def in_rows(values):
        return torch.cat([values, values[:, :2]], 1).view(2, 3)

    inputs = LossInputs(
        in_rows(log_prob), in_rows(log_prob), in_rows(advantages), mask, rollout_is_weights=rollout_is_weights,
        **{name: in_rows(values) for name, values in fields.items()},
    )  # fmt: skip
    changes = torch.tensor([change_of(*state) for state in STATES])
    counted = changes * torch.tensor([0.5, 2.0, 1.0, 3.0])
    for agg, shares in (("token-mean", torch.ones(4)), ("seq-mean-token-mean", torch.tensor([1 / 3] * 3 + [1.0]))):
        outputs = POLICY_LOSSES["opefo"].compute(inputs, actor_config("opefo", agg=agg))
        weights = sign_weights(changes, outputs.metrics["actor/opefo_lambda"])
        assert float((weights * counted * shares).sum()) == pytest.approx(0.0, abs=1e-7)


def test_missing_sums_are_named():
    log_prob = row(-1.0)
    with pytest.raises(ValueError, match="current_entropys=None"):
        POLICY_LOSSES["opefo"].compute(LossInputs(log_prob, log_prob, log_prob, log_prob), actor_config("opefo"))


def test_properties():
    check_loss("opefo", random_fields("current_entropys", "sum_pi_squared", "sum_pi_squared_log_pi"))
