# SPDX-License-Identifier: Apache-2.0
"""verl's core algorithms plus STEER: stabilising token-level entropy change by reweighting (arXiv 2510.10150).

A policy-gradient step on a sampled token changes the entropy of the policy in that token's state. STEER estimates the
change from four factors (PPO's clipping, the advantage, the token's probability, the state's entropy) and multiplies
the token's loss by a weight that falls as the estimate grows: the tokens that change the entropy most count less.

    signed_entropy_change               how much does the update raise or lower the entropy at each token?
    weighted_change                     its magnitude, or minus the change: what the weights fall with
    entropy_change_range                the smallest and the largest of these values
    map_to_token_weights                from estimate to weight
    compute_token_weights               these steps together
    compute_policy_loss_with_entropy    the policy loss `entropy_control`: one of verl's losses, each token weighted

Notation, for a token a sampled in a state s: prob = pi(a|s) under the policy being updated, old_prob = pi_old(a|s)
under the policy that computed the old log-probs, ratio = prob / old_prob, entropys = H(pi_old(.|s)) in nats. The
arithmetic is in float32 whatever the model's dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.overrides import TorchFunctionMode

from verl_steer import upstream

_upstream = upstream(globals())

if TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """The names that `upstream` re-exports."""


#: One value for each response token of a micro-batch.
PerToken = Float[Tensor, "batch response_length"]
TokenMask = Bool[Tensor, "batch response_length"]
Scalar = Float[Tensor, ""]

ENTROPY_CHANGE_ESTIMATORS = ("released", "clip_aware", "squared", "exact")
TOKEN_WEIGHT_MAPS = ("linear", "exponential", "threshold")

#: Normalizers that change the scale of a micro-batch's estimates, all that measure them within the micro-batch, and
#: those that read a range from outside it.
RESCALING_NORMALIZERS = ("rank", "winsorised")
MICRO_BATCH_NORMALIZERS = ("micro_batch", *RESCALING_NORMALIZERS)
RANGE_NORMALIZERS = ("global", "ema")
TOKEN_WEIGHT_NORMALIZERS = (*MICRO_BATCH_NORMALIZERS, *RANGE_NORMALIZERS)

#: The quantity that lowers a weight: the magnitude of the change, or the fall of the entropy.
ENTROPY_CONTROL_MODES = ("symmetric", "asymmetric")

#: Estimator and maps of `entropy_influence`: the engine finds their weights for a whole mini-batch.
INFLUENCE = "influence"
CONTROL_MAPS = ("target", "band")

#: verl's losses that multiply each token's loss by `rollout_is_weights`. `geo_mean` has one loss for a whole response
#: and multiplies it by the geometric mean of the weights. Only `bypass_mode` ignores them.
BASE_LOSSES = ("vanilla", "gspo", "cispo", "sapo", "geo_mean", "gpg", "dppo_tv", "dppo_kl", "clip_cov", "kl_cov", "dro")

#: Fields of `LossInputs` that the first-order entropy change is computed from.
EXACT_FIELDS = ("current_entropys", "sum_pi_squared", "sum_pi_squared_log_pi")

#: Estimators that are 0 where PPO's dual clip removes the gradient.
PPO_CLIPPED_ESTIMATORS = ("clip_aware", "exact", INFLUENCE)

#: Probabilities stay this far from 0 and 1, as in the authors' release.
PROBABILITY_MARGIN = 1e-8
LOG_PROBABILITY_MARGIN = math.log(PROBABILITY_MARGIN)

#: Lower bound of the largest change in the exponential map: where all changes are small, all weights stay near 1.
ENTROPY_CHANGE_FLOOR = 0.02


class ClipRatios(NamedTuple):
    """PPO's dual clip (arXiv 1912.09729).

    A positive advantage has no gradient above the ratio 1 + high, a negative one none below 1 - low and above c.
    """

    low: float = 0.2
    high: float = 0.2
    c: float = 3.0


DEFAULT_CLIP = ClipRatios()


def clip_ratios(config: Any) -> ClipRatios:
    """The clip of an `ActorConfig`, resolved as verl's vanilla loss resolves it."""
    low, high = config.clip_ratio_low, config.clip_ratio_high
    return ClipRatios(
        config.clip_ratio if low is None else low,
        config.clip_ratio if high is None else high,
        config.get("clip_ratio_c", 3.0),
    )


class EntropyChangeRange(NamedTuple):
    """Smallest and largest `weighted_change` among some set of tokens: numbers or scalar tensors."""

    smallest: Scalar | float
    largest: Scalar | float
    #: The one at a given quantile; None unless the mapping reads it.
    at_quantile: Scalar | float | None = None


@dataclass
class LossInputs:
    """One micro-batch, as a policy loss of this fork reads it.

    Args:
        old_log_prob, log_prob: of the sampled tokens; `log_prob` has a gradient.
        advantages: of the sampled tokens.
        response_mask: 1 or True on valid tokens.
        entropys: entropy of the old policy in each token's state, in nats.
        current_entropys: the same of the policy being updated, with gradient.
        sum_pi_squared: sum of pi^2 over the vocabulary, under the policy being updated.
        sum_pi_squared_log_pi: sum of pi^2 ln pi over the vocabulary, in nats, under the policy being updated.
        rollout_is_weights: verl's weights for off-policy rollouts.
        change_range: range of a whole mini-batch's estimates, for `RANGE_NORMALIZERS`.
        entropy_coeff: this step's coefficient of an adaptive entropy bonus.
        token_weights: found for the whole mini-batch, in place of STEER's own.
        nucleus_entropys: entropy of the current policy's most probable actions, in nats, with gradient.
        entropy_anchor: entropy that a regulariser holds, in nats.
    """

    old_log_prob: PerToken
    log_prob: PerToken
    advantages: PerToken
    response_mask: PerToken | TokenMask
    entropys: PerToken | None = None
    current_entropys: PerToken | None = None
    sum_pi_squared: PerToken | None = None
    sum_pi_squared_log_pi: PerToken | None = None
    rollout_is_weights: PerToken | None = None
    change_range: EntropyChangeRange | None = None
    entropy_coeff: float | None = None
    token_weights: PerToken | None = None
    nucleus_entropys: PerToken | None = None
    entropy_anchor: float | None = None

    @property
    def log_ratio(self) -> PerToken:
        """ln of prob / old_prob, with gradient, in float32."""
        return self.log_prob.float() - self.old_log_prob.float()

    @property
    def ratio(self) -> PerToken:
        """prob / old_prob, with gradient, in float32, cut where verl cuts it: at exp(-20) and exp(20)."""
        return self.log_ratio.clamp(-20.0, 20.0).exp()

    def require(self, name: str, reason: str) -> Any:
        """The field `name`.

        Raises:
            ValueError: if it is None.
        """
        value = getattr(self, name)
        if value is None:
            raise ValueError(f"{name}=None: {reason}")
        return value


@dataclass
class LossOutputs:
    """What a policy loss of this fork returns.

    Args:
        loss: with gradient.
        metrics: scalars on the loss's device.
        token_weights: without gradient, of no meaning on tokens that are not valid; None if the loss has no weights.
        entropy_change: magnitude of the estimated entropy change, 0 on tokens that are not valid; None without STEER.
        kl_weights: multiply the tokens' KL loss, if there is one; None: all count alike.
    """

    loss: Scalar
    metrics: dict[str, Any]
    token_weights: PerToken | None = None
    entropy_change: PerToken | None = None
    kl_weights: PerToken | None = None


@torch.no_grad()
def ppo_clipped(inputs: LossInputs, clip: ClipRatios) -> tuple[TokenMask, TokenMask]:
    """Tokens whose gradient PPO's dual clip removes: clipped from above, and clipped from below."""
    log_ratio = inputs.log_ratio
    log_low = math.log1p(-clip.low) if clip.low < 1 else -math.inf
    positive, negative = inputs.advantages > 0, inputs.advantages < 0
    above = (positive & (log_ratio > math.log1p(clip.high))) | (negative & (log_ratio > math.log(clip.c)))
    return above, negative & (log_ratio < log_low)


@torch.no_grad()
def signed_entropy_change(inputs: LossInputs, estimator: str = "released", clip: ClipRatios = DEFAULT_CLIP) -> PerToken:
    """Estimated change of each state's entropy by the update of its token: omega of arXiv 2510.10150, per unit step.

    `released`: -A / old_prob * prob (1 - prob) (ln prob + H), the numerics of the authors' release.
    `clip_aware`: the same, and 0 where PPO's clip removes the gradient (the paper's text, version 4).
    `squared`: (1 - prob)^2 in place of (1 - prob) (the paper's first version).
    `exact`: `exact_entropy_change`.

    Args:
        inputs: a micro-batch; `exact` reads `current_entropys` and the sums over the vocabulary, the others `entropys`.
        estimator: one of `ENTROPY_CHANGE_ESTIMATORS`.
        clip: PPO's clip, which `clip_aware` and `exact` read.

    Returns:
        The estimate, finite: above 0 where the entropy rises. It is 0 where an input is not finite and the formula
        therefore has no finite value.

    Raises:
        ValueError: if the estimator is unknown, or `inputs` lacks a field that it reads.
    """
    if estimator not in ENTROPY_CHANGE_ESTIMATORS:
        raise ValueError(f"estimator={estimator!r}: expected one of {', '.join(ENTROPY_CHANGE_ESTIMATORS)}")
    if estimator == "exact":
        return exact_entropy_change(inputs, clip).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    entropys = inputs.require("entropys", f"the estimator {estimator} expects the entropy of each response token")
    log_prob = inputs.log_prob.float()
    # Work in place on memory that this function owns: on a CPU an allocation costs more than the arithmetic.
    prob = log_prob.exp().clamp_(PROBABILITY_MARGIN, 1 - PROBABILITY_MARGIN)
    # Compute 1 - prob by expm1: float32 has no number between 1 - 6e-8 and 1.
    minus_other_prob = torch.expm1(log_prob).clamp_(PROBABILITY_MARGIN - 1, -PROBABILITY_MARGIN)
    old_prob = inputs.old_log_prob.float().exp().clamp_(PROBABILITY_MARGIN, 1.0)
    log_prob_above_mean = log_prob.clamp_min(LOG_PROBABILITY_MARGIN).add_(entropys)  # the mean of ln prob is -H
    change = (inputs.advantages.float() / old_prob).mul_(prob).mul_(minus_other_prob).mul_(log_prob_above_mean)
    if estimator == "squared":
        change.mul_(minus_other_prob.neg_())
    if estimator == "clip_aware":
        above, below = ppo_clipped(inputs, clip)
        _zero_where(above | below, change)
    return change.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)


def estimate_entropy_change(
    inputs: LossInputs, estimator: str = "released", clip: ClipRatios = DEFAULT_CLIP
) -> PerToken:
    """|omega|, the magnitude of `signed_entropy_change`."""
    return signed_entropy_change(inputs, estimator, clip).abs_()


@torch.no_grad()
def weighted_change(change: PerToken, mode: str = "symmetric") -> PerToken:
    """The quantity that lowers a token's weight, from the signed change, which is overwritten.

    `symmetric`: the magnitude. `asymmetric`: minus the change, so that the token that lowers the entropy most has the
    smallest weight and the one that raises it most the largest; the authors' release has both.

    Raises:
        ValueError: if the mode is unknown.
    """
    if mode not in ENTROPY_CONTROL_MODES:
        raise ValueError(f"mode={mode!r}: expected one of {', '.join(ENTROPY_CONTROL_MODES)}")
    return change.abs_() if mode == "symmetric" else change.neg_()


@torch.no_grad()
def exact_entropy_change(inputs: LossInputs, clip: ClipRatios) -> PerToken:
    """First-order change of a state's entropy when PPO's loss of one sampled token moves its logits, per unit step.

    With an independent logit for each action a' of the state, the step on the sampled action a changes the logits by
    w (1[a' = a] - pi(a')), where w = I * ratio * A and I is 0 where PPO's clip removes the gradient. As
    dH / dlogit(a') = -pi(a') (ln pi(a') + H), the entropy changes by

        -w [ prob (ln prob + H) - sum over a' of pi(a')^2 (ln pi(a') + H) ],

    where H is the entropy of the policy being updated. `rollout_is_weights`, which multiply the loss, are not counted.

    Raises:
        ValueError: if `current_entropys` or a sum over the vocabulary is None.
    """
    slope = entropy_slope(inputs, "entropy_change_estimator=exact")
    change = inputs.ratio.mul_(inputs.advantages.float()).mul_(slope)
    above, below = ppo_clipped(inputs, clip)
    return _zero_where(above | below, change)


@torch.no_grad()
def entropy_slope(inputs: LossInputs, reader: str) -> PerToken:
    """First-order change of a state's entropy for a unit step of its logits along the gradient of ln prob:

        sum over a' of pi(a')^2 (ln pi(a') + H) - prob (ln prob + H), in nats.

    Args:
        inputs: a micro-batch.
        reader: the option that reads it, for the message of an error.

    Raises:
        ValueError: if one of `EXACT_FIELDS` is None.
    """
    entropys, squares, squares_log = (inputs.require(name, f"{reader} expects it").float() for name in EXACT_FIELDS)
    log_prob = inputs.log_prob.float()
    sampled = log_prob.exp().mul_(log_prob + entropys)
    return (entropys * squares).add_(squares_log).sub_(sampled)


def _zero_where(condition: TokenMask, values: PerToken) -> PerToken:
    """Multiply `values` in place by 0 where the condition holds."""
    # On a CPU torch multiplies by bytes much faster than it fills, selects or converts booleans.
    return values.mul_((~condition).view(torch.uint8))


@torch.no_grad()
def entropy_change_range(
    entropy_change: Tensor, response_mask: Tensor, quantile: float | None = None
) -> EntropyChangeRange:
    """Smallest and largest value among the valid tokens and, if a quantile is given, the value there.

    Args:
        entropy_change: finite, of any shape.
        response_mask: 1 or True on valid tokens, of the same shape.
        quantile: between 0 and 1; of n sorted values it selects the one with index (n - 1) * quantile, rounded down.

    Returns:
        Scalar tensors. Without a valid token they are infinite, minus infinite and NaN.
    """
    mask = response_mask.to(entropy_change.dtype)
    at_quantile = None
    if quantile is not None:
        count = mask.sum()
        # Not `nanquantile`, which waits for a GPU.
        found = _sorted_valid(entropy_change, response_mask).take(index_at_quantile(count, quantile))
        at_quantile = found.where(count > 0, torch.nan)
    beyond = _beyond(mask)
    return EntropyChangeRange((entropy_change + beyond).amin(), (entropy_change - beyond).amax(), at_quantile)


def index_at_quantile(count: Tensor, quantile: float) -> Tensor:
    """(count - 1) * quantile, rounded down; of no value, 0."""
    # In float64 and with a margin: a product that is a whole number may be rounded to just below it.
    return ((count.double() - 1).clamp_min(0) * quantile + 1e-9).long()


def _sorted_valid(values: Tensor, response_mask: Tensor) -> Tensor:
    """The values of valid tokens in ascending order, then infinity for each other token."""
    return torch.where(response_mask.bool(), values, torch.inf).flatten().sort().values


@torch.no_grad()
def percentile_rank(values: Tensor, response_mask: Tensor) -> Tensor:
    """Fraction of the other valid tokens whose value is smaller; from 0 to 1 on valid tokens.

    Args:
        values: of any shape, without NaN.
        response_mask: 1 or True on valid tokens, of the same shape.
    """
    smaller = torch.searchsorted(_sorted_valid(values, response_mask), values.contiguous())
    return smaller / (response_mask.sum() - 1).clamp_min(1)


def _beyond(mask: Tensor) -> Tensor:
    """0 where a numeric mask is 1, infinite where it is 0."""
    return mask.reciprocal().sub_(1.0)


@torch.no_grad()
def map_to_token_weights(
    entropy_change: PerToken,
    response_mask: PerToken | TokenMask,
    token_weight_min: float = 0.8,
    token_weight_max: float = 1.2,
    linear: bool = True,
    *,
    token_weight_map: str | None = None,
    quantile: float = 0.8,
    change_range: EntropyChangeRange | None = None,
) -> PerToken:
    """Weights that fall as the estimated entropy change grows.

    Linear: from `token_weight_max` at the smallest change to `token_weight_min` at the largest; if these are equal,
    their mean at this change. Exponential: exp(-k change) with k such that a change of the largest magnitude, but at
    least of `ENTROPY_CHANGE_FLOOR`, gets `token_weight_min`. Threshold: `token_weight_min` above the change at the
    quantile, `token_weight_max` up to it.

    Args:
        entropy_change: `weighted_change`, finite.
        response_mask: 1 or True on valid tokens.
        token_weight_min: weight at the largest change.
        token_weight_max: largest weight; the exponential map has 1 at a change of 0.
        linear: the linear map, else the exponential one, where `token_weight_map` is None.
        token_weight_map: one of `TOKEN_WEIGHT_MAPS`.
        quantile: as in `entropy_change_range`; only the threshold map reads it.
        change_range: the range that the changes are measured by; None: that of the valid tokens given. The
            linear map gives changes outside it the weight of its nearer end.

    Returns:
        Weights, float32, 0 on tokens that are not valid.
    """
    if token_weight_map is None:
        token_weight_map = "linear" if linear else "exponential"
    if change_range is None:
        change_range = entropy_change_range(
            entropy_change, response_mask, quantile if token_weight_map == "threshold" else None
        )

    def scalar(bound: Any) -> Scalar:
        return entropy_change.new_full((), bound) if isinstance(bound, float) else bound

    smallest, largest = scalar(change_range.smallest), scalar(change_range.largest)
    if token_weight_map == "linear":
        spread = largest - smallest
        # A range without extent gets the steepest finite slope: changes outside it get the weight of its nearer end.
        limits = torch.finfo(spread.dtype)
        slope = ((token_weight_min - token_weight_max) / spread.clamp_min(limits.tiny)).clamp_min(limits.min)
        smallest = smallest.where(spread >= 0, 0.0)  # without a valid token it is infinite
        start = torch.where(spread > 0, token_weight_max, (token_weight_min + token_weight_max) / 2)
        weights = (entropy_change - smallest).mul_(slope).add_(start)
    elif token_weight_map == "exponential":
        decay = -math.log(token_weight_min) / torch.maximum(largest, -smallest).clamp_min(ENTROPY_CHANGE_FLOOR)
        weights = (-decay * entropy_change).exp_()
    else:
        weights = torch.where(entropy_change > scalar(change_range.at_quantile), token_weight_min, token_weight_max)
    return weights.clamp_(token_weight_min, token_weight_max).mul_(response_mask)


def weighs_mini_batches(options: Any) -> bool:
    """Whether the engine finds the weights of a whole mini-batch before the loss; `options` is `policy_loss`."""
    return options.loss_mode == "entropy_control" and (
        options.entropy_change_estimator == INFLUENCE or options.token_weight_map in CONTROL_MAPS
    )


def _micro_batch_scale(
    entropy_change: PerToken, mask: PerToken, normalizer: str, quantile: float
) -> tuple[PerToken, EntropyChangeRange]:
    """The changes as a normalizer of `RESCALING_NORMALIZERS` measures them, and their range.

    `rank`: percentile ranks, so that a few very large estimates no longer push all others to one end of the range.
    `winsorised`: the range ends at the quantile, and larger changes count as that one.
    """
    if normalizer == "rank":
        return percentile_rank(entropy_change, mask), EntropyChangeRange(0.0, 1.0)
    found = entropy_change_range(entropy_change, mask, quantile)
    assert isinstance(found.at_quantile, Tensor)
    return entropy_change, found._replace(largest=found.at_quantile.nan_to_num(nan=0.0))


@torch.no_grad()
def compute_token_weights(
    advantages: PerToken,
    entropys: PerToken,
    old_log_prob: PerToken,
    log_prob: PerToken,
    response_mask: PerToken | TokenMask,
    token_weight_min: float = 0.8,
    token_weight_max: float = 1.2,
    linear: bool = True,
    mode: str = "symmetric",
    *,
    estimator: str = "released",
    clip: ClipRatios = DEFAULT_CLIP,
    current_entropys: PerToken | None = None,
    sum_pi_squared: PerToken | None = None,
    sum_pi_squared_log_pi: PerToken | None = None,
    **mapping: Any,
) -> PerToken:
    """STEER's weight of each token's loss (arXiv 2510.10150); no gradient flows through it.

    Args:
        advantages, entropys, old_log_prob, log_prob, response_mask: as in `LossInputs`.
        token_weight_min, token_weight_max, linear: as in `map_to_token_weights`.
        mode: as in `weighted_change`.
        estimator, clip: as in `signed_entropy_change`.
        current_entropys, sum_pi_squared, sum_pi_squared_log_pi: as in `LossInputs`; the estimator `exact` reads them.
        **mapping: `token_weight_map`, `quantile` and `change_range` of `map_to_token_weights`.

    Returns:
        Weights, float32, 0 on tokens that are not valid. They depend on the valid tokens only, not on padding or order.

    Raises:
        ValueError: if the estimator or the mode is unknown, or an input of the estimator `exact` is None.
    """
    inputs = LossInputs(
        old_log_prob, log_prob, advantages, response_mask, entropys,
        current_entropys, sum_pi_squared, sum_pi_squared_log_pi,
    )  # fmt: skip
    change = weighted_change(signed_entropy_change(inputs, estimator, clip), mode)
    return map_to_token_weights(change, response_mask, token_weight_min, token_weight_max, linear, **mapping)


class _LeaveMetricsOnDevice(TorchFunctionMode):
    """Keeps verl's losses from waiting for the device: they read each of their metrics with `.item()`."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.item:
            return args[0]
        return func(*args, **(kwargs or {}))


def reweighted_policy_loss(
    base_loss: str,
    token_weights: PerToken | None,
    inputs: LossInputs,
    config: Any,
    advantages: PerToken | None = None,
    loss_agg_mode: str | None = None,
) -> LossOutputs:
    """One of verl's policy losses, each token's loss multiplied by its weight.

    verl's losses multiply each token's loss by `rollout_is_weights`, so the weights are passed there, times the
    rollout weights of `inputs` if there are any.

    Args:
        base_loss: one of `BASE_LOSSES`.
        token_weights: without gradient; None: all tokens count alike.
        inputs: a micro-batch.
        config: `ActorConfig`.
        advantages: in place of those of `inputs`.
        loss_agg_mode: in place of `config.loss_agg_mode`.

    Returns:
        The loss, verl's metrics and the weights.
    """
    weights = token_weights
    if inputs.rollout_is_weights is not None:
        weights = inputs.rollout_is_weights if weights is None else weights * inputs.rollout_is_weights
    with _LeaveMetricsOnDevice():
        loss, metrics = _upstream.get_policy_loss_fn(base_loss)(
            old_log_prob=inputs.old_log_prob.float(),
            log_prob=inputs.log_prob.float(),
            advantages=(inputs.advantages if advantages is None else advantages).float(),
            response_mask=inputs.response_mask,
            loss_agg_mode=loss_agg_mode or config.loss_agg_mode,
            config=config,
            rollout_is_weights=weights,
        )
    sizes = config.global_batch_info
    if base_loss == "geo_mean" and sizes.get("global_batch_size"):
        # verl's is the mean over the micro-batch, not the part that it adds to the mean over the mini-batch.
        loss = loss * (len(inputs.response_mask) * sizes["dp_size"] / sizes["global_batch_size"])
    return LossOutputs(loss, metrics, token_weights)


@torch.no_grad()
def token_weight_metrics(token_weights: PerToken, entropy_change: PerToken | None, mask: PerToken) -> dict[str, Scalar]:
    """Scalars over the valid tokens of one micro-batch, left on the device.

    Args:
        token_weights, entropy_change: 0 on tokens that are not valid; no metrics of a change that is None.
        mask: 1.0 on valid tokens, else 0.0.

    Returns:
        Mean, standard deviation, minimum and maximum of the weights, mean and maximum of the estimated entropy change.
        Without a valid token the minimum is infinite, so that a reduction over micro-batches ignores it, and all others
        are 0.
    """
    count = mask.sum().clamp_min(1)
    mean = token_weights.sum() / count
    metrics = {
        "actor/token_weights_mean": mean,
        "actor/token_weights_std": ((token_weights - mean).square_().mul_(mask).sum() / count).sqrt_(),
        "actor/token_weights_min": (token_weights + _beyond(mask)).amin(),
        "actor/token_weights_max": token_weights.amax(),
    }
    if entropy_change is None:
        return metrics
    return metrics | {
        "actor/entropy_change_mean": entropy_change.sum() / count,
        "actor/entropy_change_max": entropy_change.amax(),
    }


def steer_policy_loss(inputs: LossInputs, config: Any, loss_agg_mode: str | None = None) -> LossOutputs:
    """STEER (arXiv 2510.10150): verl's dual-clip PPO loss or another of `BASE_LOSSES`, each token times its weight.

    Args:
        inputs: a micro-batch.
        config: `ActorConfig`; `policy_loss` holds STEER's options, `clip_ratio*` the clip.
        loss_agg_mode: as in `reweighted_policy_loss`.

    Raises:
        ValueError: if `inputs` lacks a field that the estimator or the normalizer reads.
    """
    options = config.policy_loss
    # Convert the mask to float once; the base loss multiplies by it repeatedly.
    mask = inputs.response_mask.float()
    change = None
    if weighs_mini_batches(options):
        weights = inputs.require(
            "token_weights", "the weights of the whole mini-batch are expected; use this fork's engine"
        )
    else:
        change, weights = _micro_batch_weights(inputs, mask, config)
    outputs = reweighted_policy_loss(
        options.base_loss, weights, replace(inputs, response_mask=mask), config, loss_agg_mode=loss_agg_mode
    )
    outputs.metrics |= token_weight_metrics(weights, change, mask)
    outputs.entropy_change = change
    return outputs


def _micro_batch_weights(inputs: LossInputs, mask: PerToken, config: Any) -> tuple[PerToken, PerToken]:
    """The estimated entropy change, 0 on tokens that are not valid, and STEER's weights, by `config.policy_loss`."""
    options, change_range = config.policy_loss, inputs.change_range
    normalizer = options.token_weight_normalizer
    if normalizer in RANGE_NORMALIZERS:
        inputs.require("change_range", f"token_weight_normalizer={normalizer} expects a range")
    signed = signed_entropy_change(inputs, options.entropy_change_estimator, clip_ratios(config))
    measured = change = weighted_change(signed, options.entropy_control_mode)
    if normalizer in RESCALING_NORMALIZERS:
        measured, change_range = _micro_batch_scale(change, mask, normalizer, options.token_weight_quantile)
    weights = map_to_token_weights(
        measured,
        mask,
        options.token_weight_min,
        options.token_weight_max,
        token_weight_map=options.token_weight_map,
        quantile=options.token_weight_quantile,
        change_range=change_range,
    )
    return change.mul_(mask).abs_(), weights


@_upstream.register_policy_loss("entropy_control")
def compute_policy_loss_with_entropy(
    old_log_prob: PerToken,
    log_prob: PerToken,
    advantages: PerToken,
    response_mask: PerToken | TokenMask,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: PerToken | None = None,
    entropys: PerToken | None = None,
    **inputs: Any,
) -> tuple[Scalar, dict[str, Any]]:
    """`steer_policy_loss` with the signature of verl's policy losses, plus `entropys`.

    Args:
        old_log_prob, log_prob, advantages, response_mask, rollout_is_weights, entropys, **inputs: fields of
            `LossInputs`.
        loss_agg_mode: how token losses become one; see verl's `agg_loss`.
        config: `ActorConfig`.

    Returns:
        The loss with gradient, and metrics on the loss's device.

    Raises:
        ValueError: as `steer_policy_loss` does.
    """
    batch = LossInputs(
        old_log_prob, log_prob, advantages, response_mask, entropys, rollout_is_weights=rollout_is_weights, **inputs
    )
    outputs = steer_policy_loss(batch, config, loss_agg_mode)
    return outputs.loss, outputs.metrics
