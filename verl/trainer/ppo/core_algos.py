# SPDX-License-Identifier: Apache-2.0
"""verl's core algorithms plus STEER: stabilising token-level entropy change by reweighting (arXiv 2510.10150).

A policy-gradient step on a sampled token changes the entropy of the policy in that token's state. STEER estimates
that change from four factors (PPO's clipping, the advantage, the token's probability, the state's entropy) and
multiplies the token's loss by a weight that falls as the estimate grows, so that no update collapses the entropy or
blows it up.

    signed_entropy_change               by how much does the update raise or lower the entropy at each token?
    estimate_entropy_change             its magnitude, which is what the weights follow
    entropy_change_range                what is small and what is large among these estimates?
    map_to_token_weights                from that estimate to a weight for each token
    compute_token_weights               these together
    compute_policy_loss_with_entropy    the policy loss `entropy_control`: one of upstream's losses, each token weighted

Notation, for a token a sampled in a state s: prob = pi(a|s) under the policy being updated, old_prob = pi_old(a|s)
under the policy that the batch was scored with, ratio = prob / old_prob, entropys = H(pi_old(.|s)) in nats. Every
tensor is (batch, response_length), and arithmetic is in float32 whatever the model's dtype.

The other interventions that this fork compares STEER with are in `verl.steer.methods`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode
from verl.steer.token_metrics import token_metrics

from verl_steer import upstream

_upstream = upstream(globals())

ENTROPY_CHANGE_ESTIMATORS = ("released", "clip_aware", "squared", "exact")
TOKEN_WEIGHT_MAPS = ("linear", "exponential", "threshold")
TOKEN_WEIGHT_NORMALIZERS = ("micro_batch", "global", "ema")

#: Upstream's losses that multiply each token's loss by `rollout_is_weights`; `geo_mean`, which has one loss for a whole
#: response, multiplies that by the geometric mean of the weights. Only `bypass_mode` leaves them out.
BASE_LOSSES = ("vanilla", "gspo", "cispo", "sapo", "geo_mean", "gpg", "dppo_tv", "dppo_kl", "clip_cov", "kl_cov", "dro")

#: Losses from which PPO's dual clip takes gradients away, where `ppo_clipped` tells: upstream's, and this fork's that
#: are built on it.
PPO_CLIPPED_LOSSES = ("vanilla", "adaptive_entropy", "entropy_shaped_advantage", "high_entropy_tokens", "quadrant")

#: Estimators that are 0 where PPO's dual clip takes the gradient away.
PPO_CLIPPED_ESTIMATORS = ("clip_aware", "exact")

#: Probabilities stay this far from 0 and 1, as in the authors' release.
PROBABILITY_MARGIN = 1e-8

#: The exponential map takes the largest change to be at least this: where nothing changes much, nothing is held back.
ENTROPY_CHANGE_FLOOR = 0.02


@torch.no_grad()
def ppo_clipped(
    advantages: torch.Tensor,
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    clip_ratio_low: float,
    clip_ratio_high: float,
    clip_ratio_c: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens whose gradient PPO's dual clip (arXiv 1912.09729) takes away.

    Args:
        advantages, old_log_prob, log_prob: (batch, response_length).
        clip_ratio_low: a negative advantage has no gradient below the ratio 1 - clip_ratio_low.
        clip_ratio_high: a positive advantage has no gradient above the ratio 1 + clip_ratio_high.
        clip_ratio_c: a negative advantage has no gradient above this ratio.

    Returns:
        Clipped from above and clipped from below, both boolean (batch, response_length).
    """
    log_ratio = log_prob.float() - old_log_prob.float()
    log_low = math.log1p(-clip_ratio_low) if clip_ratio_low < 1 else -math.inf
    positive, negative = advantages > 0, advantages < 0
    above = (positive & (log_ratio > math.log1p(clip_ratio_high))) | (negative & (log_ratio > math.log(clip_ratio_c)))
    return above, negative & (log_ratio < log_low)


@torch.no_grad()
def signed_entropy_change(
    advantages: torch.Tensor,
    entropys: torch.Tensor,
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    estimator: str = "released",
    clip_ratio_low: float = 0.2,
    clip_ratio_high: float = 0.2,
    clip_ratio_c: float = 3.0,
    *,
    sum_pi_squared: torch.Tensor | None = None,
    sum_pi_squared_log_pi: torch.Tensor | None = None,
) -> torch.Tensor:
    """Change of each state's entropy by the update of its token: omega of arXiv 2510.10150, per unit step.

    `released`: -A / old_prob * prob (1 - prob) (ln prob + H), the numerics of the authors' release.
    `clip_aware`: the same, and 0 where PPO's clip takes the gradient away (the paper's text, version 4).
    `squared`: (1 - prob)^2 in place of (1 - prob) (the paper's first version).
    `exact`: `exact_entropy_change`.

    Args:
        advantages, old_log_prob, log_prob: (batch, response_length).
        entropys: entropy of the policy in each token's state, in nats, (batch, response_length); for `exact` that of
            the policy being updated.
        estimator: one of `ENTROPY_CHANGE_ESTIMATORS`.
        clip_ratio_low, clip_ratio_high, clip_ratio_c: as in `ppo_clipped`; `clip_aware` and `exact` read them.
        sum_pi_squared, sum_pi_squared_log_pi: as in `exact_entropy_change`, which alone reads them.

    Returns:
        The estimate, finite, float32 (batch, response_length): above 0 where the entropy rises. Where an input is not
        finite, so that the formula has no finite value, it is 0.

    Raises:
        ValueError: if the estimator is unknown, or is `exact` and a sum over the vocabulary is missing.
    """
    if estimator not in ENTROPY_CHANGE_ESTIMATORS:
        raise ValueError(f"estimator={estimator!r}: expected one of {', '.join(ENTROPY_CHANGE_ESTIMATORS)}")
    clip = (clip_ratio_low, clip_ratio_high, clip_ratio_c)
    if estimator == "exact":
        if sum_pi_squared is None or sum_pi_squared_log_pi is None:
            raise ValueError("sum_pi_squared or sum_pi_squared_log_pi is None: estimator=exact expects both")
        change = exact_entropy_change(
            advantages, entropys, old_log_prob, log_prob, sum_pi_squared, sum_pi_squared_log_pi, *clip
        )
        return change.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    log_prob = log_prob.float()
    # In place wherever the memory is this function's own: on a CPU fresh memory costs more than the arithmetic.
    prob = log_prob.exp().clamp_(PROBABILITY_MARGIN, 1 - PROBABILITY_MARGIN)
    # 1 - prob by way of expm1: float32 has no number between 1 - 6e-8 and 1, where certain tokens are.
    minus_other_prob = torch.expm1(log_prob).clamp_(PROBABILITY_MARGIN - 1, -PROBABILITY_MARGIN)
    old_prob = old_log_prob.float().exp().clamp_(PROBABILITY_MARGIN, 1.0)
    change = (advantages.float() / old_prob).mul_(prob).mul_(minus_other_prob).mul_(log_prob + entropys.float())
    if estimator == "squared":
        change.mul_(minus_other_prob.neg_())
    if estimator == "clip_aware":
        above, below = ppo_clipped(advantages, old_log_prob, log_prob, *clip)
        _zero_where(above | below, change)
    return change.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)


def estimate_entropy_change(*args: Any, **kwargs: Any) -> torch.Tensor:
    """Magnitude of `signed_entropy_change`, whose arguments it takes: |omega|, at least 0, float32 of their shape."""
    return signed_entropy_change(*args, **kwargs).abs_()


@torch.no_grad()
def exact_entropy_change(
    advantages: torch.Tensor,
    entropys: torch.Tensor,
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    sum_pi_squared: torch.Tensor,
    sum_pi_squared_log_pi: torch.Tensor,
    clip_ratio_low: float = 0.2,
    clip_ratio_high: float = 0.2,
    clip_ratio_c: float = 3.0,
) -> torch.Tensor:
    """First-order change of a state's entropy when PPO's loss of one sampled token moves its logits, per unit step.

    With a logit of its own for each action a' of the state, the step on the sampled action a changes the logits by
    w (1[a' = a] - pi(a')), where w = I * ratio * A and I is 0 where PPO's clip takes the gradient away. As
    dH / dlogit(a') = -pi(a') (ln pi(a') + H), the entropy changes by

        -w [ prob (ln prob + H) - sum over a' of pi(a')^2 (ln pi(a') + H) ].

    Args:
        advantages, old_log_prob, log_prob: (batch, response_length).
        entropys: H of the policy being updated in each token's state, in nats, (batch, response_length).
        sum_pi_squared: sum of pi^2 over the vocabulary, (batch, response_length).
        sum_pi_squared_log_pi: sum of pi^2 ln pi over the vocabulary, in nats, (batch, response_length).
        clip_ratio_low, clip_ratio_high, clip_ratio_c: as in `ppo_clipped`.

    Returns:
        The change with its sign, float32 (batch, response_length).
    """
    log_prob, entropys = log_prob.float(), entropys.float()
    ratio = (log_prob - old_log_prob.float()).clamp_(-20.0, 20.0).exp_()
    sampled = log_prob.exp().mul_(log_prob + entropys)
    expected = (entropys * sum_pi_squared.float()).add_(sum_pi_squared_log_pi.float())
    change = ratio.mul_(advantages.float()).mul_(expected - sampled)
    above, below = ppo_clipped(advantages, old_log_prob, log_prob, clip_ratio_low, clip_ratio_high, clip_ratio_c)
    return _zero_where(above | below, change)


def _zero_where(condition: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """`values` in place, 0 where the boolean condition holds, and NaN where besides they are not finite."""
    # On a CPU torch multiplies by bytes many times as fast as it fills by, selects by or converts booleans.
    return values.mul_((~condition).view(torch.uint8))


class EntropyChangeRange(NamedTuple):
    """What is small and what is large among the estimates of some set of tokens: numbers or scalar tensors."""

    smallest: torch.Tensor | float
    largest: torch.Tensor | float
    #: The estimate at a given quantile; None where no mapping asks for it.
    at_quantile: torch.Tensor | float | None = None


@torch.no_grad()
def entropy_change_range(
    entropy_change: torch.Tensor, response_mask: torch.Tensor, quantile: float | None = None
) -> EntropyChangeRange:
    """Smallest and largest estimate among the valid tokens and, if asked for, the one at a quantile.

    Args:
        entropy_change: at least 0 and finite, any shape.
        response_mask: 1 or True on valid tokens, of the same shape.
        quantile: between 0 and 1; of n sorted estimates it names the one at the place (n - 1) * quantile, rounded
            down.

    Returns:
        Scalar tensors. Without a valid token they are infinite, 0 and NaN.
    """
    mask = response_mask.to(entropy_change.dtype)
    at_quantile = None
    if quantile is not None:
        values = torch.where(response_mask.bool(), entropy_change, torch.nan).flatten()
        at_quantile = torch.nanquantile(values, quantile, interpolation="lower")
    return EntropyChangeRange(_smallest(entropy_change, mask), (entropy_change * mask).amax(), at_quantile)


def _smallest(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Smallest of the finite `values` where the mask, of numbers, is 1; infinite if it is 0 everywhere."""
    beyond = mask.reciprocal().sub_(1.0)  # 0 on valid tokens, infinite on others
    return beyond.add_(values).amin()


@torch.no_grad()
def map_to_token_weights(
    entropy_change: torch.Tensor,
    response_mask: torch.Tensor,
    token_weight_min: float = 0.8,
    token_weight_max: float = 1.2,
    linear: bool = True,
    *,
    token_weight_map: str | None = None,
    quantile: float = 0.8,
    change_range: EntropyChangeRange | None = None,
) -> torch.Tensor:
    """Weights that fall as the estimated entropy change grows.

    Linear: from `token_weight_max` at the smallest change to `token_weight_min` at the largest; all equal gives their
    mean. Exponential: exp(-k change) with k so that the largest change gets `token_weight_min`, that largest change
    being no less than `ENTROPY_CHANGE_FLOOR`. Threshold: `token_weight_min` above the change at the quantile,
    `token_weight_max` up to it.

    Args:
        entropy_change: at least 0 and finite, float32 (batch, response_length).
        response_mask: 1 or True on valid tokens, (batch, response_length).
        token_weight_min: the weight of the token with the largest change.
        token_weight_max: the weight of the token with the smallest change in the linear map; the upper bound in the
            exponential one; the weight of all tokens up to the quantile in the threshold map.
        linear: the linear map, else the exponential one, where `token_weight_map` is None.
        token_weight_map: one of `TOKEN_WEIGHT_MAPS`.
        quantile: as in `entropy_change_range`; only the threshold map reads it.
        change_range: what the changes are measured by; None: the range of the valid tokens given. Changes beyond it
            get the weight of its nearer end.

    Returns:
        Weights, float32 (batch, response_length), 0 on tokens that are not valid.
    """
    if token_weight_map is None:
        token_weight_map = "linear" if linear else "exponential"
    if change_range is None:
        change_range = entropy_change_range(
            entropy_change, response_mask, quantile if token_weight_map == "threshold" else None
        )

    def scalar(bound: Any) -> torch.Tensor:
        return entropy_change.new_full((), bound) if isinstance(bound, float) else bound

    largest = scalar(change_range.largest)
    if token_weight_map == "linear":
        smallest = scalar(change_range.smallest)
        spread = largest - smallest
        slope = (token_weight_min - token_weight_max) / spread.clamp_min(torch.finfo(spread.dtype).tiny)
        # All equal are halfway. Without a valid token the smallest is infinite.
        smallest, slope = smallest.where(spread > 0, 0.0), slope.where(spread > 0, 0.0)
        start = torch.where(spread > 0, token_weight_max, (token_weight_min + token_weight_max) / 2)
        weights = (entropy_change - smallest).mul_(slope).add_(start)
    elif token_weight_map == "exponential":
        decay = -math.log(token_weight_min) / largest.clamp_min(ENTROPY_CHANGE_FLOOR)
        weights = (-decay * entropy_change).exp_()
    else:
        weights = torch.where(entropy_change > scalar(change_range.at_quantile), token_weight_min, token_weight_max)
    return weights.clamp_(token_weight_min, token_weight_max).mul_(response_mask)


@torch.no_grad()
def compute_token_weights(
    advantages: torch.Tensor,
    entropys: torch.Tensor,
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    response_mask: torch.Tensor,
    token_weight_min: float = 0.8,
    token_weight_max: float = 1.2,
    linear: bool = True,
    *,
    estimator: str = "released",
    clip_ratio_low: float = 0.2,
    clip_ratio_high: float = 0.2,
    clip_ratio_c: float = 3.0,
    sum_pi_squared: torch.Tensor | None = None,
    sum_pi_squared_log_pi: torch.Tensor | None = None,
    token_weight_map: str | None = None,
    quantile: float = 0.8,
    change_range: EntropyChangeRange | None = None,
) -> torch.Tensor:
    """STEER's weight of each token's loss (arXiv 2510.10150); no gradient flows through it.

    Args:
        advantages, entropys, old_log_prob, log_prob: (batch, response_length), as in `estimate_entropy_change`.
        response_mask: 1 or True on valid tokens, (batch, response_length).
        token_weight_min, token_weight_max, linear: as in `map_to_token_weights`.
        estimator, clip_ratio_low, clip_ratio_high, clip_ratio_c: as in `estimate_entropy_change`.
        sum_pi_squared, sum_pi_squared_log_pi: as in `estimate_entropy_change`.
        token_weight_map, quantile, change_range: as in `map_to_token_weights`.

    Returns:
        Weights, float32 (batch, response_length), 0 on tokens that are not valid. They depend on the valid tokens
        only, not on padding or order.

    Raises:
        ValueError: if the estimator is unknown, or is `exact` and a sum over the vocabulary is missing.
    """
    entropy_change = estimate_entropy_change(
        advantages,
        entropys,
        old_log_prob,
        log_prob,
        estimator,
        clip_ratio_low,
        clip_ratio_high,
        clip_ratio_c,
        sum_pi_squared=sum_pi_squared,
        sum_pi_squared_log_pi=sum_pi_squared_log_pi,
    )
    return map_to_token_weights(
        entropy_change,
        response_mask,
        token_weight_min,
        token_weight_max,
        linear,
        token_weight_map=token_weight_map,
        quantile=quantile,
        change_range=change_range,
    )


class _LeaveMetricsOnDevice(TorchFunctionMode):
    """Keeps upstream's losses from waiting for the device: they read their metrics with `.item()`, one by one."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.item:
            return args[0]
        return func(*args, **(kwargs or {}))


def reweighted_policy_loss(
    base_loss: str,
    token_weights: torch.Tensor,
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    loss_agg_mode: str,
    config: Any,
    rollout_is_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, Any]]:
    """One of upstream's policy losses, each token's loss multiplied by its weight.

    Args:
        base_loss: one of `BASE_LOSSES`.
        token_weights: without gradient, (batch, response_length).
        old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config: upstream's arguments.
        rollout_is_weights: upstream's weights for off-policy rollouts, multiplied in, (batch, response_length).

    Returns:
        The loss, a scalar with gradient, and upstream's metrics, scalar tensors on the loss's device.
    """
    if rollout_is_weights is not None:
        token_weights = token_weights * rollout_is_weights
    with _LeaveMetricsOnDevice():
        return _upstream.get_policy_loss_fn(base_loss)(
            old_log_prob.float(),
            log_prob.float(),
            advantages.float(),
            response_mask,
            loss_agg_mode,
            config,
            token_weights,
        )


@torch.no_grad()
def token_weight_metrics(
    token_weights: torch.Tensor, entropy_change: torch.Tensor, mask: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Scalars over the valid tokens of one micro-batch, left on the device.

    Args:
        token_weights, entropy_change: 0 on tokens that are not valid, (batch, response_length).
        mask: of numbers, 1 on valid tokens, (batch, response_length).

    Returns:
        Mean, minimum and maximum of the weights, mean and maximum of the estimated entropy change. Without a valid
        token means are 0, the minimum is infinite and the maxima are 0, so that they leave a reduction over
        micro-batches alone.
    """
    count = mask.sum().clamp_min(1)
    return {
        "actor/token_weights_mean": token_weights.sum() / count,
        "actor/token_weights_min": _smallest(token_weights, mask),
        "actor/token_weights_max": token_weights.amax(),
        "actor/entropy_change_mean": entropy_change.sum() / count,
        "actor/entropy_change_max": entropy_change.amax(),
    }


@_upstream.register_policy_loss("entropy_control")
def compute_policy_loss_with_entropy(
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: torch.Tensor | None = None,
    entropys: torch.Tensor | None = None,
    current_entropys: torch.Tensor | None = None,
    sum_pi_squared: torch.Tensor | None = None,
    sum_pi_squared_log_pi: torch.Tensor | None = None,
    change_range: EntropyChangeRange | None = None,
) -> tuple[torch.Tensor, dict[str, Any]]:
    """STEER (arXiv 2510.10150): upstream's dual-clip PPO loss or another of `BASE_LOSSES`, each token times its weight.

    Args:
        old_log_prob, log_prob, advantages: (batch, response_length).
        response_mask: 1 or True on valid tokens, (batch, response_length).
        loss_agg_mode: how token losses become one; see upstream's `agg_loss`.
        config: `ActorConfig`; `policy_loss` holds STEER's options, `clip_ratio*` the clip.
        rollout_is_weights: upstream's weights for off-policy rollouts, multiplied in, (batch, response_length).
        entropys: entropy of the old policy in each token's state, in nats, (batch, response_length).
        current_entropys: the same of the policy being updated; the estimator `exact` reads it in place of `entropys`.
        sum_pi_squared, sum_pi_squared_log_pi: as in `exact_entropy_change`.
        change_range: what the estimates are measured by; None: the range of this micro-batch.

    Returns:
        The loss, a scalar with gradient, and metrics, scalar tensors on the loss's device.

    Raises:
        ValueError: if what the estimator needs is missing, or the range that the normalizer needs.
    """
    options, clip = config.policy_loss, clip_ratios(config)
    if options.entropy_change_estimator == "exact":
        entropys = current_entropys
    if entropys is None:
        raise ValueError("entropys=None: loss_mode=entropy_control expects the entropy of each response token")
    if options.token_weight_normalizer != "micro_batch" and change_range is None:
        raise ValueError(
            f"change_range=None: token_weight_normalizer={options.token_weight_normalizer} expects the engine to "
            "give the range of the mini-batch"
        )
    with torch.no_grad():
        # Numbers once: upstream's losses multiply by it again and again too.
        mask = response_mask.float()
        entropy_change = estimate_entropy_change(
            advantages,
            entropys,
            old_log_prob,
            log_prob,
            options.entropy_change_estimator,
            *clip,
            sum_pi_squared=sum_pi_squared,
            sum_pi_squared_log_pi=sum_pi_squared_log_pi,
        )
        token_weights = map_to_token_weights(
            entropy_change,
            mask,
            options.token_weight_min,
            options.token_weight_max,
            token_weight_map=options.token_weight_map,
            quantile=options.token_weight_quantile,
            change_range=change_range,
        )
        entropy_change.mul_(mask)
        clipped = clipped_by_loss(config, advantages, old_log_prob, log_prob)
        steer_metrics = token_weight_metrics(token_weights, entropy_change, mask)
        steer_metrics |= token_metrics(advantages, old_log_prob, *clipped, mask, entropy_change, token_weights)
    loss, metrics = reweighted_policy_loss(
        options.base_loss,
        token_weights,
        old_log_prob,
        log_prob,
        advantages,
        mask,
        loss_agg_mode,
        config,
        rollout_is_weights,
    )
    return loss, metrics | steer_metrics


def base_loss_of(policy_loss: Any) -> str:
    """Name of the loss whose gradients tokens get: STEER's base loss, else the loss itself."""
    return policy_loss.base_loss if policy_loss.loss_mode == "entropy_control" else policy_loss.loss_mode


def clips_as_ppo(policy_loss: Any) -> bool:
    """Whether a loss, `policy_loss` of the actor's configuration, takes gradients away where `ppo_clipped` tells."""
    return base_loss_of(policy_loss) in PPO_CLIPPED_LOSSES


def clipped_by_loss(
    config: Any, advantages: torch.Tensor, old_log_prob: torch.Tensor, log_prob: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
    """`ppo_clipped` with the clip of an `ActorConfig`; None and None where its loss does not clip as PPO does."""
    if not clips_as_ppo(config.policy_loss):
        return None, None
    return ppo_clipped(advantages, old_log_prob, log_prob, *clip_ratios(config))


def clip_ratios(config: Any) -> tuple[float, float, float]:
    """(clip_ratio_low, clip_ratio_high, clip_ratio_c) as upstream's vanilla loss resolves them."""
    low, high = config.clip_ratio_low, config.clip_ratio_high
    return (
        config.clip_ratio if low is None else low,
        config.clip_ratio if high is None else high,
        config.get("clip_ratio_c", 3.0),
    )


# They register themselves, and take from this module what is above.
from verl.steer.methods import advantages as _advantages  # noqa: E402, F401
from verl.steer.methods import losses as _losses  # noqa: E402, F401
