# SPDX-License-Identifier: Apache-2.0
"""Influence through shared parameters: against autograd, torch's AdamW, and true updates of a real FSDP2 engine."""

import math
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
import torch.distributed
from hypothesis import given
from hypothesis import strategies as st
from losses import actor_config
from scipy.stats import pearsonr
from small_engine import MINI_BATCHES, ON_CPU, make_engine, mini_batches
from verl.steer.audit.one_token import one_token_effects
from verl.steer.audit.scores import AuditRequest
from verl.steer.engine import head_influence, influence
from verl.steer.engine.entropy_control import STATE_FILE
from verl.steer.loss import ppo_loss
from verl.trainer.ppo.core_algos import (
    ENTROPY_CONTROL_MODES,
    TOKEN_WEIGHT_MAPS,
    ClipRatios,
    EntropyChangeRange,
    LossInputs,
    compute_policy_loss_vanilla,
    map_to_token_weights,
    weighs_mini_batches,
)
from verl.trainer.ppo.entropy_influence import (
    AdamStep,
    ProportionalIntegral,
    bounded_weights,
    solve_multiplier,
    token_factors,
)
from verl.utils import tensordict_utils as tu
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

pytestmark = pytest.mark.usefixtures("one_rank")

CONTROL = {"entropy_change_estimator": "influence", "token_weight_map": "target"}
VANILLA = partial(ppo_loss, config=actor_config(loss_mode="vanilla"))
BAND = {"entropy_change_estimator": "influence", "token_weight_map": "band"}


# The mathematics

contributions = st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=30).map(torch.tensor)


@given(c=contributions, fraction=st.floats(-3, 3), low=st.floats(0, 0.9), high=st.floats(1.1, 5))
def test_the_weighted_contributions_have_the_wanted_sum_or_all_weights_are_at_a_bound(c, fraction, low, high):
    wanted = fraction * float(c.double().sum())
    weights = bounded_weights(c, solve_multiplier(c, wanted, low, high), low, high).double()
    assert ((weights >= np.float32(low)) & (weights <= np.float32(high))).all()
    reach = [float(torch.where(sign * c > 0, high, low).double() @ c.double()) for sign in (-1, 1)]
    assert float(weights @ c.double()) == pytest.approx(min(max(wanted, reach[0]), reach[1]), abs=1e-5)


def test_the_weights_are_the_nearest_to_one():
    """Two tokens without bounds in reach, by hand: lambda = 1 + c (wanted - sum c) / sum c^2."""
    c = torch.tensor([0.3, -0.1])
    weights = bounded_weights(c, solve_multiplier(c, 0.25, 0.0, 2.0), 0.0, 2.0)
    torch.testing.assert_close(weights, torch.tensor([1 + 0.3 * 0.05 / 0.1, 1 - 0.1 * 0.05 / 0.1]))


@given(c=contributions)
def test_tokens_without_contribution_keep_their_weight_and_change_nothing(c):
    padded = torch.cat([torch.zeros(3), c, torch.zeros(2)])
    multiplier = solve_multiplier(c, 0.1, 0.0, 2.0)
    torch.testing.assert_close(solve_multiplier(padded, 0.1, 0.0, 2.0), multiplier, rtol=1e-9, atol=0)
    assert (bounded_weights(padded, multiplier, 0.0, 2.0)[:3] == 1).all()


@pytest.mark.parametrize("c", [torch.zeros(4), torch.zeros(0)])
def test_without_any_contribution_all_weights_are_one(c):
    assert (bounded_weights(c, solve_multiplier(c, 0.1, 0.0, 2.0), 0.0, 2.0) == 1).all()


def test_the_factors_are_minus_the_gradient_of_verls_loss_by_the_log_prob():
    generator = torch.Generator().manual_seed(0)
    shape = (6, 9)
    old = -2 * torch.rand(shape, generator=generator)
    log_prob = (old + 0.5 * torch.randn(shape, generator=generator)).requires_grad_()
    advantages, mask = torch.randn(shape, generator=generator), torch.rand(shape, generator=generator) < 0.7
    weights = torch.rand(shape, generator=generator)
    config = actor_config(loss_mode="vanilla", clip=(0.2, 0.28, 1.5))
    loss, _ = compute_policy_loss_vanilla(
        old, log_prob, advantages, mask, "token-mean", config=config, rollout_is_weights=weights
    )
    (gradient,) = torch.autograd.grad(loss, log_prob)
    inputs = LossInputs(old, log_prob.detach(), advantages, mask, rollout_is_weights=weights)
    factors = token_factors(inputs, ClipRatios(0.2, 0.28, 1.5))
    torch.testing.assert_close(factors / mask.sum(), -gradient)
    assert 0 < (factors == 0).float().mean() < 1


def test_the_factors_ratio_ends_at_exp_20_on_both_sides():
    """As in verl's loss; without PPO's third clip a negative token is not clipped above."""
    old, log_prob, advantages = torch.tensor([[[0.0, -30.0]], [[-30.0, 0.0]], [[2.0, -1.0]]])
    inputs = LossInputs(old, log_prob, advantages, torch.ones(1, 2))
    found = token_factors(inputs, ClipRatios(0.2, 0.28, math.inf))
    torch.testing.assert_close(found, torch.tensor([[2 * math.exp(-20), -math.exp(20)]]), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_the_step_is_torchs(decay):
    """g . d theta of torch's optimizer is the momentum's, the decay's and the gradient's part, at each step."""
    generator = torch.Generator().manual_seed(1)
    parameter = torch.nn.Parameter(torch.randn(50, generator=generator, dtype=torch.float64))
    built = torch.optim.AdamW([parameter], lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=decay)
    for step in range(1, 6):
        loss_gradient, entropy_gradient = torch.randn(2, 50, generator=generator, dtype=torch.float64)
        group, state = built.param_groups[0], built.state.get(parameter)
        adam = AdamStep.from_group(group, step)
        u = adam.precondition(entropy_gradient, loss_gradient, state["exp_avg_sq"] if state else None)
        momentum = state["exp_avg"] if state else torch.zeros(50)
        before = parameter.detach().clone()
        predicted = -adam.gradient_scale * u @ loss_gradient - adam.momentum_scale * u @ momentum.double()
        predicted -= adam.lr * adam.decay * entropy_gradient @ before
        parameter.grad = loss_gradient
        built.step()
        assert float(entropy_gradient @ (parameter.detach() - before)) == pytest.approx(float(predicted), rel=1e-9)


def test_the_controller_by_hand():
    controller = ProportionalIntegral(1.0, 0.5, total=0.2)
    c = torch.tensor([3.0, -4.0, 0.0, 5.0])
    assert float(controller.multiplier(c, 0.1)) == pytest.approx(-(0.1 + 0.5 * 0.3) / (50 / 4) ** 0.5)
    assert controller.total == pytest.approx(0.3)
    assert float(controller.multiplier(c, math.nan)) == 0 and controller.total == pytest.approx(0.3)
    assert float(controller.multiplier(torch.zeros(3), 1.0)) == 0


# A real engine


def update(engine, batch, config, **flags):
    """Metrics of one update, and the true change of the valid tokens' mean entropy."""
    batch = batch.copy()
    tu.assign_non_tensor(batch, **flags)
    valid = batch["response_mask"].to_padded_tensor(0).bool()
    with engine.train_mode():
        before = engine.token_statistics(batch)["entropy"][valid].double().mean()
        metrics = engine.train_batch(batch, partial(ppo_loss, config=config))["metrics"]
        after = engine.token_statistics(batch)["entropy"][valid].double().mean()
    found = {
        name.removeprefix("entropy_control/"): float(metric.aggregate())
        for name, metric in metrics.items()
        if name.startswith(("entropy_control/", "actor/token_weights"))
    }
    return found, float(after - before)


@pytest.mark.parametrize(
    "agg, clip_grad, packed, dynamic, weighted",
    [
        ("token-mean", 1.0, False, False, False),
        ("token-mean", 1e-3, True, True, False),
        ("seq-mean-token-mean", 1.0, True, False, True),
        ("seq-mean-token-sum", 0.1, False, True, False),
    ],
)
def test_the_prediction_is_the_true_change(model_folder, agg, clip_grad, packed, dynamic, weighted):
    """Small steps, so that the second order is small: with momentum, weight decay, and clipping of the gradient.

    Also with weights of the rollout, from 0 to 1.8.
    """
    engine = make_engine(model_folder, packed, lr=2e-6, weight_decay=1.0, clip_grad=clip_grad)
    config = actor_config(agg=agg, **BAND, entropy_band=100.0)
    predicted, true, without_known = [], [], []
    for seed in range(4):
        for batch in mini_batches(dynamic, seed, packed):
            if weighted:
                batch["rollout_is_weights"] = 6 * (batch["entropy"] - 5)
            found, change = update(engine, batch, config)
            assert found["actor/token_weights_min"] == found["actor/token_weights_max"] == 1
            assert found["predicted_change"] == found["predicted_change_unweighted"]
            predicted.append(found["predicted_change"])
            without_known.append(found["predicted_change"] - found["known_change"])
            true.append(change)
    # A mean of 25 entropies of 5 nats has an error of about 1e-7 in float32.
    assert np.allclose(predicted[1:], true[1:], rtol=0.05, atol=5e-7)
    # Adam's first step gives a gradient of nothing but rounding the size of all others.
    assert predicted[0] == pytest.approx(true[0], rel=0.3)
    assert pearsonr(predicted[1:], true[1:])[0] > 0.999 > pearsonr(without_known[1:], true[1:])[0]


def test_a_controlled_update_changes_the_entropy_as_wanted(model_folder):
    engine = make_engine(model_folder, lr=1e-5)
    (first, second), config = mini_batches(), actor_config(**CONTROL, target_gain=1.0)
    found, _ = update(engine, first, config, target_entropy=5.0)
    plain = found["predicted_change_unweighted"]
    for shift in (-2e-5, 2e-5):
        target = None
        with engine.train_mode():
            measured = engine.measure_influence(second, VANILLA)
            target = measured.entropy + measured.known + float(measured.contributions.double().sum()) + shift
        found, change = update(engine, second, config, target_entropy=target)
        assert found["predicted_change"] == pytest.approx(found["wanted_change"], rel=1e-3, abs=1e-8)
        assert found["shortfall"] < 1e-7 and 0 <= found["actor/token_weights_min"] < 1
        # The second order and Adam's dependence on the weights are left.
        assert abs(change - found["wanted_change"]) < 0.2 * abs(plain)


def test_an_unreachable_target_is_told(model_folder):
    engine = make_engine(model_folder, lr=1e-6)
    found, _ = update(engine, mini_batches()[0], actor_config(**CONTROL), target_entropy=50.0)
    assert found["shortfall"] > 1 and found["target"] == 50
    assert found["actor/token_weights_min"] == 0 and found["actor/token_weights_max"] == 2


def test_a_band_changes_no_weight_inside_and_ends_at_its_edge_outside(model_folder):
    engine, batch = make_engine(model_folder, lr=1e-5), mini_batches()[0]
    with engine.train_mode():
        measured = engine.measure_influence(batch, VANILLA)
    unweighted = measured.known + float(measured.contributions.double().sum())
    found, _ = update(engine, batch, actor_config(**BAND, entropy_band=abs(unweighted) / 2))
    assert found["predicted_change"] == pytest.approx(unweighted / 2, rel=1e-4)
    assert found["actor/token_weights_min"] < 1


@pytest.mark.parametrize("mode", ENTROPY_CONTROL_MODES)
@pytest.mark.parametrize("name", TOKEN_WEIGHT_MAPS)
def test_steers_maps_on_the_contributions(model_folder, name, mode):
    """In units of their mean magnitude over the mini-batch."""
    engine, (batch, _) = make_engine(model_folder), mini_batches()
    options = {"token_weight_map": name, "token_weight_quantile": 0.6, "entropy_control_mode": mode}
    config = actor_config(entropy_change_estimator="influence", **options)
    with engine.train_mode():
        engine.train_batch(batch, partial(ppo_loss, config=config))
    contributions, valid = engine.measured.contributions, engine.measured.valid
    changes = contributions.abs() if mode == "symmetric" else -contributions
    changes /= contributions[valid].abs().mean()
    bounds = config.policy_loss.token_weight_min, config.policy_loss.token_weight_max
    expected = map_to_token_weights(changes, valid, *bounds, token_weight_map=name, quantile=0.6)
    assert expected[valid].std() > 0.01
    torch.testing.assert_close(batch["token_weights"].to_padded_tensor(0), expected)


@pytest.mark.parametrize("estimator", ["released", "exact", "influence"])
def test_a_plain_controller_raises_the_weights_of_tokens_that_raise_a_low_entropy(model_folder, estimator):
    engine, (batch, _) = make_engine(model_folder, lr=1e-6), mini_batches()
    options = CONTROL | {"entropy_change_estimator": estimator, "target_controller": "pi"}
    config = actor_config(**options)
    low, _ = update(engine, batch, config, target_entropy=9.0)
    assert low["multiplier"] < 0 and engine.integral_of_errors == pytest.approx(9 - low["entropy"])
    high, _ = update(engine, batch, config, target_entropy=0.1)
    assert high["multiplier"] > 0 and high["target"] == 0.1


def test_measuring_changes_neither_parameters_nor_the_optimizer(model_folder):
    engine, batches = make_engine(model_folder), mini_batches()
    loss = VANILLA
    with engine.train_mode():
        engine.train_batch(batches[0].copy(), loss)
        before = [p.detach().full_tensor().clone() for p in engine.module.parameters()]
        moments = [engine.optimizer.state[p]["exp_avg"].full_tensor().clone() for p in engine.module.parameters()]
        engine.measure_influence(batches[1].copy(), loss)
        one_token_effects(engine, batches[1], partial(plain_update, engine, loss), 2, 0)
        for parameter, value, moment in zip(engine.module.parameters(), before, moments, strict=True):
            assert torch.equal(parameter.detach().full_tensor(), value)
            assert torch.equal(engine.optimizer.state[parameter]["exp_avg"].full_tensor(), moment)


def test_each_single_token_is_measured_once(model_folder, monkeypatch):
    """Of three with an advantage all three, however many are asked for, and of none none; other ranks take part."""
    engine, batch, updates = make_engine(model_folder), mini_batches()[0], []
    monkeypatch.setattr(engine, "token_statistics", lambda data: {"entropy": torch.zeros(4, 12)})

    def update(data):
        updates.append(engine.running_range)
        engine.running_range = EntropyChangeRange(0.0, 1.0)

    def measured(count, rank=0):
        """Tokens with an effect, and updates for them, which all begin with the same range."""
        updates.clear()
        effects = one_token_effects(engine, batch, update, count, rank)
        assert set(updates) <= {None}
        return torch.nonzero(~effects.isnan()).tolist(), len(updates)

    batch["advantages"] = 0.0 * batch["advantages"]
    assert measured(8) == ([], 0)
    batch["advantages"].values()[[0, 4, 6, 13]] = 1.0  # the last of the second response, 13, is not valid
    tokens = [[0, 0], [0, 4], [1, 1]]
    assert measured(8) == (tokens, 6) and measured(3) == (tokens, 6)
    assert measured(2) == (tokens[::2], 4) and measured(1) == (tokens[:1], 2)
    monkeypatch.setattr(engine, "sum_over_ranks", lambda values: values + 5)
    assert measured(2, rank=1) == ([], 10)


def contributions_in(dtype, model_folder, measure="measure_influence"):
    """Each token's contribution to the second of two updates by a model in this type."""
    engine, (first, second) = make_engine(model_folder, dtype=dtype, lr=1e-5), mini_batches()
    with engine.train_mode():
        engine.train_batch(first.copy(), VANILLA)
        measured = getattr(engine, measure)(second.copy(), VANILLA)
    return measured.contributions[measured.valid].double()


@pytest.fixture
def saved(tmp_path, program_of_the_task):
    """Saves a model of this size with random weights, after so many steps that learn the mini-batches by heart."""

    def save(layers=2, hidden_size=128, steps=0, dtype=torch.float32):
        tokenizer = program_of_the_task["make_tokenizer"]()
        model = program_of_the_task["make_model"](tokenizer, layers, hidden_size)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        rows = [row for batch in mini_batches() for row in batch["input_ids"].unbind()]
        rows, labels = (torch.nn.utils.rnn.pad_sequence(rows, True, padding) for padding in (0, -100))
        for _ in range(steps):
            model(rows, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.to(dtype).save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        return tmp_path

    return save


@pytest.mark.parametrize("steps", [0, 30])
def test_the_step_is_a_fraction_of_the_entropy(saved, steps):
    """Of entropies of 5 and of 0.5 nats; a fixed number of nats would be too long a step for the lower one."""
    engine, batch = make_engine(saved(steps=steps), lr=1e-6), mini_batches()[0]
    with engine.train_mode():
        measured = engine.measure_influence(batch.copy(), VANILLA, refresh=2)  # which keeps the direction
        above, below = engine._statistics_at(batch.copy(), engine.direction)
    assert (measured.entropy < 1) == (steps > 0)
    change = (above["entropy"] - below["entropy"])[measured.valid].double().mean() / 2
    assert float(change) == pytest.approx(influence.ENTROPY_STEP * measured.entropy, rel=0.15)


def test_a_model_saved_in_bfloat16_is_measured_in_bfloat16(saved, monkeypatch):
    """Contributions against those of float32. Rounding to the nearest number would undo most of the step."""
    folder = saved(4, 256, dtype=torch.bfloat16)
    truth, found = (contributions_in(dtype, folder) for dtype in ("fp32", "bf16"))
    monkeypatch.setattr(influence, "round_to_bfloat16", lambda values, generator: None)
    nearest = contributions_in("bf16", folder)
    slopes = [float(truth @ measured / (truth @ truth)) for measured in (found, nearest)]
    assert slopes[0] == pytest.approx(1, abs=0.25) and slopes[1] < 0.6
    assert pearsonr(truth, found)[0] > 0.9 > 0.5 > float((found - truth).norm() / truth.norm())


def test_both_directions_round_with_the_same_numbers_and_each_update_with_others(model_folder, monkeypatch):
    """Without a step the two differ in nothing; and the parameters come back."""
    engine, batch = make_engine(model_folder, dtype="bf16"), mini_batches()[0]
    before = [influence.whole(p).clone() for p in engine.trained()]
    nowhere = influence.Direction([torch.zeros_like(influence._local(p)) for p in engine.trained()], 1.0, 1.0, 0.0, 0.0)
    found = []
    with engine.train_mode():
        for updates in (0, 1):
            monkeypatch.setattr(engine, "updates", lambda updates=updates: updates)
            above, below = engine._statistics_at(batch.copy(), nowhere)
            assert torch.equal(above["log_probs"], below["log_probs"])
            found.append(above["log_probs"])
    assert not torch.equal(*found)
    assert all(torch.equal(influence.whole(p), value) for p, value in zip(engine.trained(), before, strict=True))


def test_rounding_at_random_keeps_the_mean():
    """2^-10 above 1 is an eighth of the way to the next number of bfloat16, 2^-7 above."""
    count, way = 4096, 2**-7
    for sign in (1, -1):
        values = torch.full((count,), sign * (1 + way / 8))
        influence.round_to_bfloat16(values, torch.Generator().manual_seed(0))
        steps = (values * sign - 1) / way
        assert set(steps.tolist()) == {0.0, 1.0}
        assert abs(float(steps.mean()) - 1 / 8) < 5 * math.sqrt(1 / 8 * 7 / 8 / count)


def test_numbers_of_bfloat16_stay_and_the_same_generator_rounds_alike():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    exact = values.bfloat16().float()
    rounded = exact.clone()
    influence.round_to_bfloat16(rounded, torch.Generator().manual_seed(0))
    assert torch.equal(rounded, exact)
    first, second = values.clone(), values.clone()
    for found in (first, second):
        influence.round_to_bfloat16(found, torch.Generator().manual_seed(1))
    assert torch.equal(first, second) and torch.equal(first, first.bfloat16().float())
    assert ((first - values).abs() < 2**-7 * values.abs()).all()


def plain_update(engine, loss, data):
    return FSDPEngineWithLMHead.train_batch(engine, data, loss)


def test_the_contributions_are_the_effects_of_single_tokens(model_folder):
    engine, batches = make_engine(model_folder, lr=1e-5), mini_batches()
    loss = VANILLA
    with engine.train_mode():
        engine.train_batch(batches[0].copy(), loss)
        measured = engine.measure_influence(batches[1].copy(), loss)
        effects = one_token_effects(engine, batches[1], partial(plain_update, engine, loss), 20, 0)
    known = ~effects.isnan()
    assert known.sum() >= 15
    truth, found = effects[known].double(), measured.contributions[known].double()
    assert pearsonr(truth, found)[0] > 0.98


def test_the_heads_influence_in_bfloat16(model_folder):
    """The hidden states are in bfloat16, the arithmetic on them is not."""
    truth, found = (contributions_in(dtype, model_folder, "measure_head_influence") for dtype in ("fp32", "bf16"))
    assert pearsonr(truth, found)[0] > 0.9


def test_the_head_of_other_logits_is_refused(model_folder):
    engine, batch = make_engine(model_folder), mini_batches()[0]
    engine.module.config.final_logit_softcapping = 30.0
    with (
        engine.train_mode(),
        pytest.raises(ValueError, match="way=head: expected parameters with qwen2, which has final"),
    ):
        engine.measure_head_influence(batch, VANILLA)


def test_an_audit_leaves_out_the_head_of_other_logits(model_folder, tmp_path):
    engine, request = make_engine(model_folder), AuditRequest(1, str(tmp_path), 1000, MINI_BATCHES, influence=True)
    engine.module.get_output_embeddings().weight.requires_grad_(False)
    with engine.train_mode():
        engine.train_batch(mini_batches(entropy_audit=request)[0], VANILLA)
    columns = pd.read_parquet(tmp_path / "step_1_updates.parquet").columns
    assert "influence" in columns and "influence_head" not in columns


def test_frozen_parameters_have_no_direction(model_folder):
    engine, batch = make_engine(model_folder), mini_batches()[0]
    frozen, *_ = engine.module.parameters()
    frozen.requires_grad_(False)
    with engine.train_mode():
        engine.train_batch(batch.copy(), VANILLA)
        engine.measure_influence(batch, VANILLA, refresh=2)
    parameters = list(engine.module.parameters())
    assert [part.shape for part in engine.direction.parts] == [p.shape for p in parameters if p is not frozen]


def test_layers_that_stay_gathered_change_nothing(model_folder):
    """`reshard_after_forward=false` keeps a layer's parameters gathered between its passes."""

    def measured_and_trained(reshard):
        engine, (first, second) = make_engine(model_folder, reshard=reshard, lr=1e-3), mini_batches()
        with engine.train_mode():
            engine.train_batch(first.copy(), VANILLA)
            measured = engine.measure_influence(second.copy(), VANILLA).contributions
            engine.train_batch(second.copy(), VANILLA)
        return [measured, *(p.detach().full_tensor() for p in engine.module.parameters())]

    for found, expected in zip(measured_and_trained(False), measured_and_trained(True), strict=True):
        assert torch.equal(found, expected)


def test_statistics_have_no_nucleus(model_folder):
    """That of a loss which needs one is not computed in the audit's passes."""
    engine = make_engine(model_folder)
    with engine.train_mode():
        found = engine.token_statistics(mini_batches(nucleus_p=0.2)[0])
    assert found.keys() == {"log_probs", "entropy"}


@pytest.mark.parametrize("agg", ["token-mean", "seq-mean-token-mean"])
def test_rejected_responses_count_as_the_loss_counts_them(model_folder, agg):
    """Rejection sampling takes tokens out of `response_mask`; the loss still divides by those of `loss_mask`."""
    engine = make_engine(model_folder, lr=2e-6, weight_decay=1.0)
    config = actor_config(agg=agg, **BAND, entropy_band=100.0)
    predicted, true = [], []
    for seed in range(3):
        for batch in mini_batches(seed=seed):
            first, *others = batch["response_mask"].unbind()
            masks = [torch.zeros_like(first), *others]
            batch["response_mask"] = torch.nested.as_nested_tensor(masks, layout=torch.jagged)
            found, change = update(engine, batch, config)
            predicted.append(found["predicted_change"])
            true.append(change)
    assert np.allclose(predicted[1:], true[1:], rtol=0.05, atol=5e-7)


def test_a_mini_batch_without_a_token_is_left_alone(model_folder):
    engine, batch = make_engine(model_folder, lr=1e-5), mini_batches()[0]
    batch["response_mask"] = torch.zeros_like(batch["response_mask"])
    engine.integral_of_errors = 0.5
    pi = {"entropy_change_estimator": "exact", "token_weight_map": "target", "target_controller": "pi"}
    for options in (CONTROL, pi, {"entropy_change_estimator": "influence"}):
        config = actor_config(**options)
        with engine.train_mode():
            metrics = engine.train_batch(batch.copy(), partial(ppo_loss, config=config))["metrics"]
        assert not any(name.startswith("entropy_control/") for name in metrics)
    assert engine.integral_of_errors == 0.5


@pytest.mark.parametrize("packed, temperature, at_a_time", [(False, 1.0, 2**24), (True, 0.7, 900)])
def test_the_heads_influence_is_autograds_with_the_hidden_states_fixed(
    model_folder, monkeypatch, packed, temperature, at_a_time
):
    """Also of a few tokens at a time: of 900 logits."""
    monkeypatch.setattr(head_influence, "LOGITS_AT_A_TIME", at_a_time)
    engine, (first, second) = make_engine(model_folder, packed, lr=1e-5, weight_decay=0.5), mini_batches(packed=packed)
    tu.assign_non_tensor(second, temperature=temperature)
    with engine.train_mode():
        engine.train_batch(first.copy(), VANILLA)
        measured = engine.measure_head_influence(second.copy(), VANILLA)
        found = engine.token_statistics(second, with_hidden=True)
        inputs = engine.loss_inputs_of(second, found["log_probs"])
        shares = engine.loss_shares(second, VANILLA.keywords["config"], inputs)
    head, valid = engine.module.get_output_embeddings().weight, inputs.response_mask
    moments = engine.optimizer.state[head]
    state = {name: value.full_tensor().cpu().double() for name, value in moments.items() if value.dim()}
    weight = head.detach().full_tensor().cpu().double().requires_grad_()
    labels = second["responses"].to_padded_tensor(0)[valid]
    log_probs = (found["hidden"][valid].double() @ weight.T / temperature).log_softmax(-1)
    torch.testing.assert_close(log_probs.gather(-1, labels[:, None])[:, 0].float(), found["log_probs"][valid])
    sampled = log_probs.gather(-1, labels[:, None])[:, 0]
    entropy = -(log_probs.exp() * log_probs).sum(-1).mean()
    factors = (token_factors(inputs, ClipRatios(0.2, 0.28, 10.0)) * shares)[valid].double()
    (entropy_gradient,) = torch.autograd.grad(entropy, weight, retain_graph=True)
    (loss_gradient,) = torch.autograd.grad(-(factors * sampled).sum(), weight, retain_graph=True)
    step = AdamStep(1e-5, 0.9, 0.999, 1e-8, 0.5, 2)
    u = step.precondition(entropy_gradient, loss_gradient * engine.last_clip_factor, state["exp_avg_sq"])
    slopes = [(torch.autograd.grad(one, weight, retain_graph=True)[0] * u).sum() for one in sampled]
    expected = torch.stack(slopes) * factors * step.gradient_scale * engine.last_clip_factor
    # Where both moments are almost 0 the direction is a quotient of roundings.
    torch.testing.assert_close(
        measured.contributions[valid].double(), expected, rtol=5e-3, atol=5e-3 * expected.abs().max()
    )
    known = -step.momentum_scale * (u * state["exp_avg"]).sum() - 1e-5 * 0.5 * (entropy_gradient * weight).sum()
    assert measured.known == pytest.approx(float(known), rel=1e-2)
    assert measured.entropy == pytest.approx(float(entropy), rel=1e-5)


def test_a_run_may_be_controlled_by_the_heads_influence(model_folder):
    engine, (batch, _) = make_engine(model_folder, lr=1e-6), mini_batches()
    found, _ = update(engine, batch, actor_config(**CONTROL, influence_way="head"), target_entropy=5.3)
    assert found["predicted_change"] != found["predicted_change_unweighted"] and found["actor/token_weights_std"] > 0


def test_an_old_direction_serves_until_it_is_refreshed(model_folder):
    engine, (first, second) = make_engine(model_folder, lr=1e-5), mini_batches()
    loss = VANILLA
    with engine.train_mode():
        engine.measure_influence(first, loss, refresh=2)
        direction = engine.direction
        engine.measure_influence(second, loss, refresh=2)
        assert engine.direction is direction
        engine.measure_influence(second, loss, refresh=2)
        assert engine.direction is not direction
        engine.measure_head_influence(second, loss, refresh=2)
        engine.lr_scheduler_step()
        assert engine.direction is None and engine.head_direction is None


@pytest.mark.parametrize("way", ["parameters", "head"])
@pytest.mark.parametrize("useless", [0.0, math.inf], ids=["all rejected", "infinite"])
def test_a_useless_direction_serves_no_other_mini_batch(model_folder, way, useless):
    """The first of two mini-batches that share a direction is rejected whole, or its loss is infinite."""
    engine, (first, second) = make_engine(model_folder, lr=1e-5), mini_batches()
    config = actor_config(**CONTROL, influence_way=way, influence_refresh=2)
    if useless:
        first["advantages"] = first["advantages"] + useless
    else:
        first["response_mask"] = first["response_mask"] * 0
    update(engine, first, config, target_entropy=5.3)
    found, _ = update(engine, second, config, target_entropy=5.3)
    assert found["predicted_change_unweighted"] != 0 and found["actor/token_weights_std"] > 0


def test_a_direction_is_kept_for_other_mini_batches_only(model_folder):
    """It is as large as the parameters, and the update itself needs memory."""
    engine, (batch, _) = make_engine(model_folder), mini_batches()
    with engine.train_mode():
        engine.measure_influence(batch, VANILLA)
        engine.measure_head_influence(batch, VANILLA)
    assert engine.direction is None and engine.head_direction is None


def controlled(model_folder, half=None, dynamic=False, way="parameters"):
    """Contributions and metrics of two controlled updates."""
    engine, config, found = make_engine(model_folder, lr=1e-5), actor_config(**CONTROL, influence_way=way), []
    with engine.train_mode():
        for batch in mini_batches(dynamic, target_entropy=5.4):
            batch = batch if half is None else tu.chunk_tensordict(batch, 2)[half]
            output = engine.train_batch(batch, partial(ppo_loss, config=config))["metrics"]
            metrics = {n: float(m.aggregate()) for n, m in output.items() if n.startswith("entropy_control/")}
            found.append((engine.measured.contributions[engine.measured.valid], metrics))
    return found


def one_of_two_ranks(rank, model_folder, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    torch.save([controlled(model_folder, rank, way=way) for way in ("parameters", "head")], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@ON_CPU
def test_two_ranks_and_other_micro_batches_find_the_same(model_folder, tmp_path):
    torch.multiprocessing.spawn(one_of_two_ranks, (str(model_folder), str(tmp_path)), nprocs=2)
    halves = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for number, way in enumerate(("parameters", "head")):
        alone, dynamic = controlled(model_folder, way=way), controlled(model_folder, dynamic=True, way=way)
        for index, (contributions_alone, metrics) in enumerate(alone):
            together = torch.cat([half[number][index][0] for half in halves])
            size = contributions_alone.abs().max()
            assert (together - contributions_alone).abs().max() <= (1e-3, 1e-4)[index] * size
            # Adam's first step gives a gradient of nothing but rounding the size of all others.
            assert (dynamic[index][0] - contributions_alone).abs().max() <= (0.05, 1e-3)[index] * size
            for half in halves:
                assert half[number][index][1] == pytest.approx(metrics, rel=1e-2, abs=1e-7)


def test_the_controllers_state_is_part_of_the_checkpoint(model_folder, tmp_path):
    engine, (first, second) = make_engine(model_folder), mini_batches(target_entropy=5.4)
    config = actor_config(token_weight_map="target", target_controller="pi")
    loss = partial(ppo_loss, config=config)
    with engine.train_mode():
        engine.train_batch(first.copy(), loss)
    engine.last_clip_factor = 0.5
    engine.save_checkpoint(str(tmp_path / "actor"))
    with engine.train_mode():
        expected = engine.train_batch(second.copy(), loss)["metrics"]
    resumed = make_engine(model_folder)
    resumed.load_checkpoint(str(tmp_path / "actor"), del_local_after_load=False)
    assert resumed.integral_of_errors != 0 and resumed.last_clip_factor == 0.5
    resumed.save_checkpoint(str(tmp_path / "again"))  # before its first update
    states = [(tmp_path / folder / STATE_FILE).read_text() for folder in ("actor", "again")]
    assert states[0] == states[1]
    with resumed.train_mode():
        found = resumed.train_batch(second.copy(), loss)["metrics"]
    name = "entropy_control/multiplier"
    assert found[name].aggregate() == expected[name].aggregate()
    pairs = zip(engine.module.parameters(), resumed.module.parameters(), strict=True)
    assert all(torch.equal(p.detach().full_tensor(), q.detach().full_tensor()) for p, q in pairs)


# The audit


EXACT = {"entropy_change_estimator": "exact"}


@pytest.mark.parametrize("options", [{"loss_mode": "vanilla"}, {"linear": False}, EXACT, BAND | {"entropy_band": 1.0}])
def test_the_audit_records_each_update(model_folder, tmp_path, options):
    engine, config = make_engine(model_folder, lr=1e-5), actor_config(**options)
    one_token = 0 if weighs_mini_batches(config.policy_loss) else 2
    request = AuditRequest(3, str(tmp_path), 1000, MINI_BATCHES, influence=True, one_token=one_token)
    with engine.train_mode():
        for batch in mini_batches(entropy_audit=request):
            tu.assign_non_tensor(batch, calculate_entropy=options == EXACT, calculate_sum_pi_squared=options == EXACT)
            engine.train_batch(batch, partial(ppo_loss, config=config))
    updates = pd.read_parquet(tmp_path / "step_3_updates.parquet")
    tokens = pd.read_parquet(tmp_path / "step_3_rank_0.parquet")
    assert updates["mini_batch"].tolist() == [0, 1] and set(updates["step"]) == {3}
    assert np.allclose(updates["influence"], updates["true_change"], rtol=[0.3, 0.05], atol=5e-7)
    means = tokens.groupby("mini_batch")
    assert np.allclose(means["true_change"].mean(), updates["true_change"], atol=1e-7)
    weighted = tokens.assign(omega=tokens["weight"] * tokens["omega_exact"]).groupby("mini_batch")["omega"].mean()
    assert np.allclose(weighted, updates["exact"], atol=1e-6)
    summed = tokens.assign(c=tokens["weight"] * tokens["influence"]).groupby("mini_batch")["c"].sum()
    assert np.allclose(summed, updates["influence_without_momentum"], rtol=1e-4, atol=1e-9)
    if one_token:
        # Their size at Adam's first step is no derivative's.
        known = tokens[(tokens["mini_batch"] == 0) & tokens["one_token"].notna()]
        assert len(known) == 2 and known["one_token"].ne(0).equals(known["influence"].ne(0))
