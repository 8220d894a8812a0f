# SPDX-License-Identifier: Apache-2.0
"""The entropy of the nucleus, by hand and by plain loops, and as an output of the engine."""

import math

import pytest
import torch
from test_engine import outputs_and_gradient
from verl.steer.engine import nucleus
from verl.steer.engine.nucleus import nucleus_entropy

PROBS = (0.15, 0.5, 0.05, 0.3)


def entropy_of(weights):
    return -sum(w / sum(weights) * math.log(w / sum(weights)) for w in weights)


@pytest.mark.parametrize(
    "top_p, members", [(0.4, [0.5]), (0.51, [0.5, 0.3]), (0.79, [0.5, 0.3]), (0.81, [0.5, 0.3, 0.15]), (1.0, PROBS)]
)
def test_by_hand(top_p, members):
    found = nucleus_entropy(torch.tensor([PROBS]).log() + 3.0, top_p)
    torch.testing.assert_close(found, torch.tensor([entropy_of(members)]))


def test_gradient_by_hand():
    """With q = 0.625 and 0.375 in the nucleus, dH / dlogit = -q (ln q + H) there, and 0 elsewhere."""
    logits = torch.tensor([PROBS]).log().requires_grad_()
    nucleus_entropy(logits, 0.7).sum().backward()
    entropy = entropy_of([0.625, 0.375])
    expected = [0.0, -0.625 * (math.log(0.625) + entropy), 0.0, -0.375 * (math.log(0.375) + entropy)]
    torch.testing.assert_close(logits.grad, torch.tensor([expected]))


def by_loops(logits, top_p, temperature):
    """The same of one token, in Python's floats."""
    weights = [math.exp(logit / temperature) for logit in logits]
    ordered, members = sorted(weights, reverse=True), []
    while sum(members) < top_p * sum(weights):
        members.append(ordered[len(members)])
    return entropy_of(members)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_and_temperatures(monkeypatch, dtype):
    """Chunks of two tokens, the last of one; a temperature for each row."""
    monkeypatch.setattr(nucleus, "CHUNK_LOGITS", 40)
    torch.manual_seed(0)
    logits = (2 * torch.randn(3, 5, 17)).to(dtype).requires_grad_()
    temperature = torch.tensor([[0.5], [1.0], [2.0]])
    found = nucleus_entropy(logits, 0.8, temperature)
    rows = zip(logits.tolist(), temperature.tolist(), strict=True)
    expected = [[by_loops(token, 0.8, t) for token in row] for row, (t,) in rows]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor(expected))
    found.sum().backward()
    assert logits.grad.dtype == dtype and torch.equal(logits.grad.any(-1), found > 0)


def test_impossible_actions_and_certain_tokens():
    logits = torch.tensor([[0.0, -math.inf, 0.0], [50.0, 0.0, -math.inf]]).requires_grad_()
    found = nucleus_entropy(logits, 1.0)
    torch.testing.assert_close(found, torch.tensor([math.log(2.0), 0.0]), atol=1e-6, rtol=1e-6)
    found.sum().backward()
    assert logits.grad.isfinite().all()


def test_impossible_actions_are_in_no_nucleus():
    """However the probabilities' sum rounds, of many tokens."""
    torch.manual_seed(0)
    logits = torch.randn(500, 9)
    logits[:, 4] = -math.inf
    others = torch.cat((logits[:, :4], logits[:, 5:]), -1)
    torch.testing.assert_close(nucleus_entropy(logits, 1.0), nucleus_entropy(others, 1.0))


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("temperature", [1.0, torch.tensor([0.5, 1.0, 2.0, 1.3])], ids=["1", "each"])
def test_the_engine_returns_it(packed, temperature):
    """A nucleus of all actions has upstream's entropy and its gradient, beside that of the log-prob."""
    ours, our_gradient = outputs_and_gradient(True, packed, temperature, nucleus_p=1.0)
    theirs, their_gradient = outputs_and_gradient(False, packed, temperature, calculate_entropy=True)
    torch.testing.assert_close(ours["nucleus_entropy"], theirs["entropy"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-4, atol=1e-6)
    few, _ = outputs_and_gradient(True, packed, temperature, nucleus_p=0.5)
    assert (few["nucleus_entropy"] < ours["nucleus_entropy"]).all()
