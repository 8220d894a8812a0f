# SPDX-License-Identifier: Apache-2.0
"""Rare cases of metrics, the audit and the vocabulary's reductions: bounds, bfloat16, small temperatures."""

import math
from functools import partial

import pytest
import torch
from loss_properties import loss_of, row
from losses import loss_inputs
from test_entropy_audit import Queue
from test_interventions import advantages_of, registered_estimators  # noqa: F401 - a fixture
from test_siren import MASK, penalty
from transfer_queue import KVBatchMeta
from verl.steer.audit import step as step_entropy_audit
from verl.steer.audit.scores import covariance_estimate
from verl.steer.engine.vocab_reductions import vocab_reductions
from verl.steer.token_metrics import token_metrics
from verl.steer.validation_metrics import bootstrap_metric, sampling_metrics
from verl.trainer.ppo import metric_utils
from verl.trainer.ppo.metric_utils import calc_maj_val


def test_the_bins_and_quadrants_are_those_of_the_old_policy():
    """A token that the old policy gave 0.05 and the new one gives 0.6: unlikely, and below 0.1 where it is clipped."""
    one = torch.ones(1, 1)
    inputs = loss_inputs(one, None, row(0.05).log(), row(0.6).log())
    found = token_metrics(inputs, (one.bool(), ~one.bool()), one)
    assert found["actor/quadrant/positive_unlikely/tokens"] == 1 and found["actor/quadrant/positive_likely/tokens"] == 0
    assert found["actor/pg_clipfrac_high/prob_below_0.1"] == 1


def test_a_token_as_probable_as_a_bound_is_above_it():
    """0.5 is likely, as a probability of the loss `quadrant` is; its bin begins there."""
    one = torch.ones(1, 1)
    log_prob = torch.full((1, 1), math.log(0.5))
    found = token_metrics(loss_inputs(one, None, log_prob, log_prob), (one.bool(), ~one.bool()))
    assert found["actor/quadrant/positive_likely/tokens"] == 1
    assert found["actor/pg_clipfrac_high/prob_0.5_to_0.9"] == 1


def test_advantages_in_bf16():
    one = torch.ones(1, 2)
    inputs = loss_inputs(row(1.0, -1.0).bfloat16(), None, row(0.6, 0.6).log(), row(0.6, 0.6).log())
    found = token_metrics(inputs, None, one)
    assert found["actor/quadrant/negative_likely/tokens"] == 0.5


def test_a_validation_without_a_right_answer_has_no_share_of_different_ones():
    metrics = sampling_metrics(["a"] * 2, ["x"] * 2, {"acc": [0, 0], "pred": ["p", "q"]})
    assert metrics["val-aux/a/distinct_right"] == metrics["val-aux/a/distinct_share"] == 0.0


def test_the_number_of_different_right_answers_is_a_mean_over_problems():
    """Three of the first problem, none of two others: 1, where half of them have none."""
    values = {"acc": [1, 1, 1, 0, 0, 0, 0, 0, 0], "pred": [*"abcdefghi"]}
    metrics = sampling_metrics(["a"] * 9, ["x"] * 3 + ["y"] * 3 + ["z"] * 3, values)
    assert metrics["val-aux/a/distinct_right"] == metrics["val-aux/a/distinct_share"] == 1.0


def test_a_vote_may_be_none():
    """Of a grader that finds no answer; counted as verl counts it."""
    data = [{"val": value, "pred": pred} for pred, value in (("a", 1.0), (None, 0.0), (None, 0.5), ("b", 1.0))]
    reduce_fns = [partial(calc_maj_val, vote_key="pred", val_key="val")]
    settings = {"n_bootstrap": 60, "seed": 42}
    assert bootstrap_metric(data, 3, reduce_fns, **settings) == metric_utils.bootstrap_metric(
        data, 3, reduce_fns, **settings
    )


def test_the_share_of_micro_batches_with_a_peak():
    """1 of a micro-batch with two such responses, 0 of one with none: the anchor is a mean over those with 1."""
    assert penalty(None)[0].metrics["actor/peak_share"] == 1.0
    assert penalty(None, entropys=torch.ones(3, 5))[0].metrics["actor/peak_share"] == 0.0
    assert penalty(None, mask=torch.zeros_like(MASK))[0].metrics["actor/peak_share"] == 0.0


def test_tokens_without_an_advantage_keep_a_weight_of_one():
    """What the audit and the metrics tell of them; their loss is 0 whatever their weight."""
    ones = torch.ones(1, 3)
    batch = (row(1.0, 0.0, -1.0), None, -ones, -ones, ones.bool())
    weights = loss_of("positive_advantage", batch, positive_advantage_weight=0.3).token_weights
    torch.testing.assert_close(weights, row(0.3, 1.0, 1.0))


def test_the_likelihood_of_bf16_log_probs_is_computed_in_float32():
    """257 tokens of -1 against 256 of which one is -0.5: -1 and -0.998, so that the second is likelier.

    In bfloat16 their sums, -257 and -255.5, are -256 both, and the first is likelier by its length. With beta 0.5 the
    likelier one has 1 - 0.5 / 2 = 0.75 of its reward, and half of the difference to the other is 0.125.
    """
    log_prob, mask = -torch.ones(2, 257), torch.ones(2, 257)
    log_prob[1, 0], mask[1, -1] = -0.5, 0
    config = {"norm_adv_by_std_in_grpo": False, "unlikeliness_beta": 0.5}
    found = advantages_of("unlikeliness", [1.0, 1.0], mask, ["a"] * 2, config, old_log_probs=log_prob.bfloat16())
    torch.testing.assert_close(found, torch.tensor([[0.125], [-0.125]]) * mask)


@pytest.mark.parametrize("temperature", [1e-6, torch.tensor(1e-6)])
def test_small_temperatures_count_as_they_are(temperature):
    """Logits 1e-6 apart at a temperature of 1e-6: 1 / (1 + e) and its complement."""
    results = vocab_reductions(torch.tensor([[0.0, 1e-6]], dtype=torch.float64), torch.tensor([1]), temperature)
    assert results.log_prob.item() == pytest.approx(-math.log1p(math.exp(-1)), rel=1e-5)


def test_a_pass_without_gradient_may_ask_to_write_over_the_logits():
    """There they are a leaf, whose values nothing overwrites."""
    logits = torch.randn(2, 5)
    before = logits.clone()
    results = vocab_reductions(logits, torch.tensor([0, 1]), inplace_backward=True)
    assert results.log_prob.isfinite().all() and torch.equal(logits, before)


def test_the_covariance_of_bf16_is_computed_in_float32():
    """-1.5 less -1.4980 is -0.0020 and not, as in bfloat16, -0.0039 or 0."""
    found = covariance_estimate(torch.tensor([-1.5]).bfloat16(), torch.tensor([1.0]).bfloat16(), -1.498, 0.0)
    assert found.dtype == torch.float32 and found.item() == pytest.approx(0.002, rel=1e-4)


def test_the_pass_of_the_audit_has_the_batchs_micro_batches(monkeypatch):
    """Where the batch names a size for each GPU."""
    queue = Queue(lambda old_logits, logits, actions, advantages: logits)
    monkeypatch.setattr(step_entropy_audit, "tq", queue)
    more = {"micro_batch_size_per_gpu": 3, "mini_batch_size": 5}
    step_entropy_audit.audit_step(KVBatchMeta(partition_id="train", keys=["a"], tags=[{}], extra_info=more), queue, 0.7)
    flags = {"calculate_entropy": True, "compute_loss": False, "temperature": 0.7}
    assert queue.calls == [flags | {"micro_batch_size_per_gpu": 3}]


def test_the_estimates_of_a_step_are_the_old_policys_whatever_became_of_it(monkeypatch):
    """The same after an update to a uniform policy and after none."""
    found = []
    for after in (lambda old_logits, logits, *_: logits, lambda old_logits, logits, *_: 0 * logits):
        queue = Queue(after)
        monkeypatch.setattr(step_entropy_audit, "tq", queue)
        keep = lambda estimates, change: found.append(estimates) or {}  # noqa: E731
        monkeypatch.setattr(step_entropy_audit, "score_estimates", keep)
        batch = KVBatchMeta(partition_id="train", keys=["a"], tags=[{}], extra_info={})
        step_entropy_audit.audit_step(batch, queue, 0.7)
    assert found[0].keys() == found[1].keys() and all(torch.equal(found[0][name], found[1][name]) for name in found[0])
