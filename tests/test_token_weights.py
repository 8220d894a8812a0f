# SPDX-License-Identifier: Apache-2.0
"""STEER's token weights against an independent float64 reference, hand-worked cases and properties."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from losses import CLIP, exact_inputs, loss_inputs, random_batch, squares
from verl.trainer.ppo.core_algos import (
    ENTROPY_CHANGE_ESTIMATORS,
    ENTROPY_CONTROL_MODES,
    TOKEN_WEIGHT_MAPS,
    ClipRatios,
    EntropyChangeRange,
    compute_token_weights,
    entropy_change_range,
    estimate_entropy_change,
    exact_entropy_change,
    map_to_token_weights,
    ppo_clipped,
    weighted_change,
)


def reference_change(advantage, entropy, old_log_prob, log_prob, squares, squares_log, estimator):
    """The table of estimators, one token at a time, in Python's float64; signed."""
    if estimator != "exact" and log_prob == -math.inf:
        log_prob = -1e3  # a probability of 0
    values = (advantage, entropy, old_log_prob, log_prob)
    if not all(math.isfinite(value) for value in values):
        return 0.0
    if estimator == "exact":
        ratio = math.exp(log_prob - old_log_prob)
        sampled = math.exp(log_prob) * (log_prob + entropy)
        change = ratio * advantage * (sampled - squares_log - squares * entropy)
        return 0.0 if clipped_by_hand(advantage, ratio) else -change
    prob = min(max(math.exp(log_prob), 1e-8), 1 - 1e-8)
    old_prob = min(max(math.exp(old_log_prob), 1e-8), 1.0)
    change = advantage / old_prob * prob * (1 - prob) * (math.log(max(math.exp(log_prob), 1e-8)) + entropy)
    if estimator == "squared":
        change *= 1 - prob
    if estimator == "clip_aware":
        return 0.0 if clipped_by_hand(advantage, math.exp(log_prob - old_log_prob)) else -change
    return -change


def clipped_by_hand(advantage, ratio):
    low, high, c = CLIP
    return (advantage > 0 and ratio > 1 + high) or (advantage < 0 and (ratio < 1 - low or ratio > c))


def reference_weights(changes, mask, low, high, linear):
    """Both maps, one token at a time, in Python's float64."""
    valid = [change for change, m in zip(changes, mask, strict=True) if m]
    if not valid:
        return [0.0] * len(changes)
    smallest, largest = min(valid), max(valid)
    weights = []
    for change, m in zip(changes, mask, strict=True):
        if not m:
            weights.append(0.0)
        elif not linear:
            decay = -math.log(low) / max(largest, -smallest, 0.02)
            weights.append(min(high, max(low, math.exp(-decay * change))))
        elif largest == smallest:
            weights.append((low + high) / 2)
        else:
            weights.append(high - (high - low) * (change - smallest) / (largest - smallest))
    return weights


def against_reference(
    advantages, entropys, old_log_prob, log_prob, mask, estimator, low, high, linear, mode="symmetric"
):
    weights = compute_token_weights(
        advantages, entropys, old_log_prob, log_prob, mask, low, high, linear, mode,
        estimator=estimator, clip=CLIP, current_entropys=entropys, **squares(advantages),
    )  # fmt: skip
    columns = (advantages, entropys, old_log_prob, log_prob, *squares(advantages).values())
    changes = [
        abs(change) if mode == "symmetric" else -change
        for token in zip(*(column.double().flatten().tolist() for column in columns), strict=True)
        for change in [reference_change(*token, estimator)]
    ]
    expected = reference_weights(changes, mask.flatten().tolist(), low, high, linear)
    assert weights.dtype == torch.float32 and weights.shape == advantages.shape
    torch.testing.assert_close(
        weights.flatten().double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-5
    )
    return weights


@pytest.mark.parametrize(
    "linear, low, high", [(True, 0.8, 1.2), (False, 0.8, 1.0), (False, 0.1, 0.9), (True, 0.5, 0.5)]
)
@pytest.mark.parametrize("mode", ENTROPY_CONTROL_MODES)
@pytest.mark.parametrize("estimator", ENTROPY_CHANGE_ESTIMATORS)
def test_weights_match_reference(estimator, linear, low, high, mode):
    for seed in range(5):
        against_reference(*random_batch(seed=seed), estimator, low, high, linear, mode)


@pytest.mark.parametrize("estimator", ENTROPY_CHANGE_ESTIMATORS[:3])
@pytest.mark.parametrize("linear", [True, False])
def test_probabilities_below_the_margin_count_as_the_margin(estimator, linear):
    """ln prob too, which would make the rarest tokens the largest changes of their micro-batch."""
    batch = random_batch()
    *_, old_log_prob, log_prob, mask = batch
    log_prob[:, 0], old_log_prob[:, 0], mask[:, 0] = (
        torch.tensor([-18.0, -19.0, -25.0, -40.0, -80.0, -200.0]),
        -19,
        True,
    )
    against_reference(*batch, estimator, 0.8, 1.2 if linear else 1.0, linear)


def test_asymmetric_weights_by_hand():
    """Changes 0.2, -0.1, 0 and -0.2 of the entropy: the one that lowers it most gets the smallest weight."""
    change, mask = torch.tensor([[0.2, -0.1, 0.0, -0.2, 9.0]]), torch.tensor([[1, 1, 1, 1, 0]])
    measured = weighted_change(change.clone(), "asymmetric")
    linear = map_to_token_weights(measured, mask, 0.9, 1.0)
    torch.testing.assert_close(linear, torch.tensor([[1.0, 0.925, 0.95, 0.9, 0.0]]))
    exponential = map_to_token_weights(measured, mask, 0.64, 1.5, linear=False)
    torch.testing.assert_close(exponential, torch.tensor([[1.5, 0.8, 1.0, 0.64, 0.0]]))  # 1 / 0.64 exceeds 1.5
    with pytest.raises(ValueError, match="mode='both': expected one of symmetric, asymmetric"):
        weighted_change(change, "both")


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("estimator", ENTROPY_CHANGE_ESTIMATORS)
def test_weights_of_bf16_inputs_are_computed_in_float32(estimator, linear):
    *tensors, mask = random_batch()
    rounded = [tensor.bfloat16() for tensor in tensors]
    against_reference(*rounded, mask, estimator, 0.8, 1.0, linear)


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("estimator", ENTROPY_CHANGE_ESTIMATORS)
def test_infinite_and_nan_inputs_count_as_no_change(estimator, linear):
    advantages, entropys, old_log_prob, log_prob, mask = random_batch()
    for row, bad in enumerate((torch.nan, torch.inf, -torch.inf)):
        advantages[row, 0] = bad
        entropys[row, 1] = bad
        log_prob[row, 2] = torch.nan if bad > 0 else bad
        old_log_prob[row, 3] = torch.nan
    mask[:3, :4] = True
    weights = against_reference(advantages, entropys, old_log_prob, log_prob, mask, estimator, 0.8, 1.0, linear)
    assert weights.isfinite().all() and (weights[:2, :4] == 1.0).all() and (weights[2, [0, 1, 3]] == 1.0).all()


def test_garbage_in_masked_tokens_changes_nothing():
    advantages, entropys, old_log_prob, log_prob, mask = random_batch()
    clean = compute_token_weights(advantages, entropys, old_log_prob, log_prob, mask)
    for value in (torch.nan, torch.inf, 1e30):
        dirty = [t.masked_fill(~mask, value) for t in (advantages, entropys, old_log_prob, log_prob)]
        assert torch.equal(compute_token_weights(*dirty, mask), clean)


def test_estimate_by_hand():
    """A = 2, pi_old = 0.4, pi = 0.5, H = 1: 2 / 0.4 * 0.25 * (ln 0.5 + 1) = 1.25 * 0.306853 = 0.383566."""
    token = [torch.tensor([[x]]) for x in (2.0, 1.0, math.log(0.4), math.log(0.5))]
    inputs = loss_inputs(*token)
    assert estimate_entropy_change(inputs).item() == pytest.approx(0.3835660, abs=1e-6)
    assert estimate_entropy_change(inputs, "squared").item() == pytest.approx(0.3835660 / 2, abs=1e-6)
    # ratio 1.25 lies beyond 1 + 0.2 and within 1 + 0.28
    assert estimate_entropy_change(inputs, "clip_aware", ClipRatios(0.2, 0.2, 10.0)).item() == 0.0
    assert estimate_entropy_change(inputs, "clip_aware", CLIP).item() == pytest.approx(0.3835660, abs=1e-6)


def test_near_certain_token_keeps_its_digits():
    """1 - pi = 1e-7 is lost when float32 computes 1 - exp(ln pi)."""
    token = [torch.tensor([[x]]) for x in (1.0, 1.0, -1e-7, -1e-7)]
    assert estimate_entropy_change(loss_inputs(*token)).item() == pytest.approx(1e-7, rel=1e-5)


def test_old_probabilities_stay_within_the_margin():
    """pi_old = e^-25 = 1.4e-11 counts as 1e-8, and e^0.5, which is none, as 1: 2 / pi_old * 0.25 * (ln 0.5 + 1)."""
    for old_log_prob, old_prob in ((-25.0, 1e-8), (0.5, 1.0)):
        token = [torch.tensor([[x]]) for x in (2.0, 1.0, old_log_prob, math.log(0.5))]
        assert estimate_entropy_change(loss_inputs(*token)).item() == pytest.approx(
            2 / old_prob * 0.25 * 0.3068528, rel=1e-5
        )


def test_the_exact_estimates_ratio_is_that_of_upstreams_loss():
    """Its log is held within -20 and 20: a ratio of e^-30 counts as e^-20, one of e^100 is clipped and not infinite.

    H = ln 4, pi = 1/2, sums of 0.3 and -0.4: the change is -w (0.5 (ln 0.5 + ln 4) - (0.3 ln 4 - 0.4)).
    """
    advantages, log_ratio = torch.tensor([[1.0, -1.0, 1.0, -1.0]]), torch.tensor([[-30.0, 100.0, 30.0, 30.0]])
    log_prob = torch.full((1, 4), math.log(0.5))
    sums = torch.full((1, 4), 0.3), torch.full((1, 4), -0.4)
    entropys = torch.full((1, 4), math.log(4.0))
    bracket = 0.5 * math.log(2) - (0.3 * math.log(4) - 0.4)
    inputs = exact_inputs(advantages, entropys, log_prob - log_ratio, log_prob, *sums)
    found = exact_entropy_change(inputs, CLIP)
    expected = torch.tensor([[-math.exp(-20) * bracket, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0.0)
    # Without a clip there: above e^20 too.
    found = exact_entropy_change(inputs, ClipRatios(1.0, math.inf, math.inf))
    expected = bracket * torch.tensor([[-math.exp(-20), math.exp(20), -math.exp(20), math.exp(20)]])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0.0)


def test_exact_estimate_by_hand():
    """Two actions of probability 0.8 and 0.2 at an old probability of 0.64 and A = 2: the ratio 1.25 times 2 is 2.5.

    H = 0.500402; 0.8 (ln 0.8 + H) = 0.221807; 0.64 (ln 0.8 + H) + 0.04 (ln 0.2 + H) = 0.133084; the change is
    -2.5 * (0.221807 - 0.133084) = -0.221807: a likely action rewarded lowers the entropy.
    """
    pi = torch.tensor([0.8, 0.2], dtype=torch.float64)
    entropy = -(pi * pi.log()).sum()
    token = [torch.full((1, 1), float(x)) for x in (2.0, entropy, math.log(0.64), math.log(0.8))]
    sums = [torch.full((1, 1), float(x)) for x in ((pi**2).sum(), (pi**2 * pi.log()).sum())]
    inputs = exact_inputs(*token, *sums)
    assert exact_entropy_change(inputs, CLIP).item() == pytest.approx(-0.2218071, abs=1e-6)
    assert exact_entropy_change(inputs, ClipRatios(0.2, 0.2, 10.0)).item() == 0.0  # clipped
    token[0] = -token[0]
    inputs = exact_inputs(*token, *sums)
    assert exact_entropy_change(inputs, CLIP).item() == pytest.approx(0.2218071, abs=1e-6)


def test_exact_estimate_names_what_is_missing():
    *tensors, mask = random_batch()
    fields = {"current_entropys": tensors[1], **squares(mask)}
    for missing in fields:
        given = {name: value for name, value in fields.items() if name != missing}
        with pytest.raises(ValueError, match=f"{missing}=None: entropy_change_estimator=exact expects it"):
            compute_token_weights(*tensors, mask, estimator="exact", **given)


def test_range_by_hand():
    """Of 5, 1, 4, 2, 3 the place (5 - 1) * 0.7 = 2.8, rounded down, has 3."""
    change = torch.tensor([[5.0, 1.0, 99.0], [4.0, 2.0, 3.0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert entropy_change_range(change, mask, 0.7) == (1.0, 5.0, 3.0)
    assert entropy_change_range(change, mask) == (1.0, 5.0, None)
    smallest, largest, at_quantile = entropy_change_range(change, torch.zeros_like(mask), 0.7)
    assert smallest == torch.inf and largest == -torch.inf and at_quantile.isnan()
    assert entropy_change_range(-change, mask) == (-5.0, -1.0, None)


def test_threshold_map_by_hand():
    """Ten changes 1 to 10 in some order: the quantile 0.8 is at the place 7.2, which is 8, so 9 and 10 exceed it."""
    change = torch.tensor([[3.0, 10.0, 1.0, 8.0, 5.0, 7.0, 9.0, 2.0, 4.0, 6.0, 50.0]])
    mask = (change < 50).int()
    weights = map_to_token_weights(change, mask, 0.7, 1.0, token_weight_map="threshold", quantile=0.8)
    expected = [[1.0, 0.7, 1.0, 1.0, 1.0, 1.0, 0.7, 1.0, 1.0, 1.0, 0.0]]
    torch.testing.assert_close(weights, torch.tensor(expected))


@pytest.mark.parametrize("quantile, held_back", [(0.0, 9), (0.5, 5), (1.0, 0)])
def test_threshold_map_at_its_ends(quantile, held_back):
    change = torch.arange(10.0)[None]
    weights = map_to_token_weights(change, torch.ones(1, 10), 0.5, 1.0, token_weight_map="threshold", quantile=quantile)
    assert (weights == 0.5).sum() == held_back


def test_threshold_map_holds_nothing_back_where_all_is_equal():
    weights = map_to_token_weights(torch.ones(2, 3), torch.ones(2, 3), 0.5, 1.0, token_weight_map="threshold")
    assert (weights == 1).all()


@pytest.mark.parametrize(
    "mapping, expected", [("linear", [1.2, 1.2, 1.0, 0.8, 0.8]), ("threshold", [1.2, 1.2, 1.2, 0.8, 0.8])]
)
def test_a_given_range_measures_the_changes(mapping, expected):
    """From 1 to 3 with 2.5 at the quantile: what is outside gets the weight of the nearer end."""
    change = torch.tensor([[0.0, 1.0, 2.0, 3.0, 9.0]])
    given = EntropyChangeRange(1.0, 3.0, 2.5)
    for bounds in (given, EntropyChangeRange(*map(torch.tensor, given))):
        weights = map_to_token_weights(change, torch.ones(1, 5), token_weight_map=mapping, change_range=bounds)
        torch.testing.assert_close(weights, torch.tensor([expected]))


def test_a_given_range_measures_the_changes_in_the_exponential_map():
    """The largest change is 2: 1 gets sqrt(0.64), and 4 no less than the minimum."""
    weights = map_to_token_weights(
        torch.tensor([[0.0, 1.0, 2.0, 4.0]]),
        torch.ones(1, 4),
        0.64,
        1.0,
        token_weight_map="exponential",
        change_range=EntropyChangeRange(0.0, 2.0),
    )
    torch.testing.assert_close(weights, torch.tensor([[1.0, 0.8, 0.64, 0.64]]))


def test_linear_map_by_hand():
    """Changes 1, 2, 5 with weights from 1.2 down to 0.8: 1.2, 1.2 - 0.4 / 4 = 1.1, 0.8."""
    weights = map_to_token_weights(torch.tensor([[1.0, 2.0, 5.0, 9.0]]), torch.tensor([[1, 1, 1, 0]]), 0.8, 1.2, True)
    torch.testing.assert_close(weights, torch.tensor([[1.2, 1.1, 0.8, 0.0]]))


def test_linear_map_of_changes_that_hardly_differ():
    """A spread of 1e-40 is below the smallest normal number; 0.4 by it would be infinite, and 0 times that NaN."""
    weights = map_to_token_weights(torch.tensor([[0.0, 1e-40]]), torch.ones(1, 2), 0.8, 1.2, True)
    spread = torch.finfo(torch.float32).tiny
    torch.testing.assert_close(weights, torch.tensor([[1.2, 1.2 - 0.4 * 1e-40 / spread]]))
    far_apart = map_to_token_weights(torch.tensor([[0.0, 1e-40]]), torch.ones(1, 2), 0.8, 1e3, True)
    assert far_apart[0, 0] == 1e3 and far_apart.isfinite().all()


def test_changes_outside_a_range_without_extent_have_the_weight_of_its_nearer_end():
    change_range = EntropyChangeRange(torch.tensor(2.0), torch.tensor(2.0))
    weights = map_to_token_weights(torch.tensor([[1.0, 2.0, 3.0]]), torch.ones(1, 3), change_range=change_range)
    torch.testing.assert_close(weights, torch.tensor([[1.2, 1.0, 0.8]]))
    equal = map_to_token_weights(torch.tensor([[1.0, 3.0]]), torch.ones(1, 2), 0.9, 0.9, change_range=change_range)
    torch.testing.assert_close(equal, torch.tensor([[0.9, 0.9]]))


def test_exponential_map_by_hand():
    """Changes 0, 1, 2 with the minimum 0.64: 1, sqrt(0.64) = 0.8, 0.64."""
    weights = map_to_token_weights(torch.tensor([[0.0, 1.0, 2.0]]), torch.ones(1, 3), 0.64, 1.0, False)
    torch.testing.assert_close(weights, torch.tensor([[1.0, 0.8, 0.64]]))


def test_exponential_map_leaves_small_changes_alone():
    """The largest change is 0.01, half of the floor 0.02: its weight is sqrt(0.64) = 0.8, not 0.64."""
    weights = map_to_token_weights(torch.tensor([[0.0, 0.01]]), torch.ones(1, 2), 0.64, 1.0, False)
    torch.testing.assert_close(weights, torch.tensor([[1.0, 0.8]]))


@pytest.mark.parametrize("linear, expected", [(True, 1.0), (False, 1.0)])
def test_zero_advantages_hold_nothing_back(linear, expected):
    _, entropys, old_log_prob, log_prob, mask = random_batch()
    weights = compute_token_weights(torch.zeros_like(entropys), entropys, old_log_prob, log_prob, mask, linear=linear)
    assert torch.equal(weights, mask.float() * expected)


@pytest.mark.parametrize("linear, expected", [(True, 1.0), (False, 0.8)])
def test_one_token_and_equal_estimates(linear, expected):
    """The only change is both smallest and largest: the mean of the bounds, or the exponential map's minimum."""
    for shape in ((1, 1), (2, 3)):
        full = [torch.full(shape, x) for x in (2.0, 1.0, math.log(0.4), math.log(0.5))]
        weights = compute_token_weights(*full, torch.ones(shape), linear=linear)
        torch.testing.assert_close(weights, torch.full(shape, expected))


@pytest.mark.parametrize("mapping", TOKEN_WEIGHT_MAPS)
def test_no_valid_token_gives_zeros(mapping):
    *tensors, mask = random_batch()
    assert not compute_token_weights(*tensors, torch.zeros_like(mask), token_weight_map=mapping).any()


def test_unknown_estimator_is_refused():
    *tensors, mask = random_batch()
    with pytest.raises(ValueError, match="estimator='best': expected one of released, clip_aware, squared, exact"):
        compute_token_weights(*tensors, mask, estimator="best")


def test_clipped_by_hand():
    """Ratios 1.3, 1.3, 0.7, 0.7, 11, 11 with advantages of either sign; epsilon 0.2 below, 0.28 above, c = 10."""
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 0.0]])
    ratio = torch.tensor([[1.3, 1.3, 0.7, 0.7, 11.0, 11.0, 11.0]])
    above, below = ppo_clipped(loss_inputs(advantages, None, torch.zeros(1, 7), ratio.log()), CLIP)
    assert above.tolist() == [[True, False, False, False, True, True, False]]
    assert below.tolist() == [[False, False, False, True, False, False, False]]


batches = st.builds(
    random_batch,
    shape=st.tuples(st.integers(1, 5), st.integers(1, 9)),
    seed=st.integers(0, 10_000),
    spread=st.floats(0.0, 3.0),
)
maps = st.one_of(
    st.tuples(st.floats(0.05, 1.0), st.floats(1.0, 2.0), st.just(True)),
    st.tuples(st.floats(0.05, 0.9), st.floats(0.9, 1.0), st.just(False)),
)


@settings(max_examples=60)
@given(batches, maps, st.sampled_from(ENTROPY_CHANGE_ESTIMATORS))
def test_weights_are_bounded_and_fall_with_the_estimate(batch, bounds, estimator):
    *tensors, mask = batch
    fields = {"current_entropys": tensors[1], **squares(mask)}
    weights = compute_token_weights(*tensors, mask, *bounds, estimator=estimator, **fields)
    low, high, _ = bounds
    assert (weights[mask] >= low - 1e-6).all() and (weights[mask] <= high + 1e-6).all() and not weights[~mask].any()
    order = estimate_entropy_change(loss_inputs(*batch, **fields), estimator)[mask].argsort()
    assert (weights[mask][order].diff() <= 1e-6).all()


@settings(max_examples=60)
@given(batches, maps, st.sampled_from((None, *TOKEN_WEIGHT_MAPS)), st.integers(0, 4), st.integers(0, 1000))
def test_padding_and_order_do_not_matter(batch, bounds, mapping, extra, seed):
    *tensors, mask = batch
    weights = compute_token_weights(*tensors, mask, *bounds, token_weight_map=mapping)
    padded = [torch.nn.functional.pad(t, (extra, extra), value=-1.0) for t in tensors]
    padded_mask = torch.nn.functional.pad(mask, (extra, extra), value=False)
    width = weights.shape[1]
    padded_weights = compute_token_weights(*padded, padded_mask, *bounds, token_weight_map=mapping)
    assert torch.equal(padded_weights[:, extra : extra + width], weights)
    rows = torch.randperm(len(mask), generator=torch.Generator().manual_seed(seed))
    shuffled = compute_token_weights(*(t[rows] for t in tensors), mask[rows], *bounds, token_weight_map=mapping)
    assert torch.equal(shuffled, weights[rows])
