# SPDX-License-Identifier: Apache-2.0
"""A token's influence on the policy's mean entropy through the shared parameters, and weights that control the entropy.

STEER's estimate (core_algos) takes the logits of each state for independent parameters. In a network every update moves
all states at once. This module predicts the change of the mean entropy by the whole update, to first order, as a sum
over the tokens of a mini-batch, and finds weights of the tokens' losses with which the sum has a wanted value.

    token_factors            how much does each token's ln pi count in the loss?
    AdamStep                 the next step of the optimizer, and the direction along which it moves the entropy
    token_contributions      the change of the mean entropy by each token, in nats
    solve_multiplier         the smallest change of the weights that yields a wanted change of the entropy
    ProportionalIntegral     a plain controller, for estimates without a known scale

Derivation. H is the mean entropy of the mini-batch's tokens and g its gradient. To first order the loss of token j with
weight lambda_j is -lambda_j f_j ln pi_j, where f_j = (its share in the mean) I_j ratio_j A_j and I_j is 0 where PPO
clips. With the clipped gradient G = -s sum_j lambda_j f_j grad ln pi_j, Adam's step T from the moments m and v is

    d theta = -lr decay theta - lr [beta1 m + (1 - beta1) G] / (1 - beta1^T) / (sqrt(v_hat) + eps)

With u = g / (sqrt(v_hat) + eps), the direction of steepest change of H under Adam's preconditioner, H changes by

    dH = g . d theta = known + sum_j lambda_j c_j
    c_j = lr (1 - beta1) / (1 - beta1^T) s f_j <grad ln pi_j, u>
    known = -lr beta1 / (1 - beta1^T) <m, u> - lr decay <g, theta>

All tokens' <grad ln pi_j, u> are the derivative of their log-probs along u: two forward passes, at theta + e u and at
theta - e u, yield them. docs/control.md has the shapes, the accuracy and the cost.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from verl.trainer.ppo.core_algos import ClipRatios, LossInputs, PerToken, Scalar, ppo_clipped

#: One value for each valid token of a mini-batch, of all data-parallel ranks.
Tokens = Float[Tensor, " tokens"]

#: Contributions smaller than this fraction of the largest one do not decide how far the multiplier is searched.
NEGLIGIBLE = 1e-9

#: Halvings of the interval that holds the multiplier. As many reach the last digit of float64, also where contributions
#: differ by a factor of 1 / NEGLIGIBLE.
HALVINGS = 100


@torch.no_grad()
def token_factors(inputs: LossInputs, clip: ClipRatios) -> PerToken:
    """I * ratio * A: minus the derivative of each token's PPO loss by its ln pi; 0 on tokens that are not valid.

    Args:
        inputs: a mini-batch; `rollout_is_weights` multiply the factors as they multiply the loss.
        clip: PPO's clip.
    """
    factors = inputs.ratio * inputs.advantages.float()
    if inputs.rollout_is_weights is not None:
        factors = factors * inputs.rollout_is_weights
    above, below = ppo_clipped(inputs, clip)
    removed = above | below | ~inputs.response_mask.bool()
    return factors.masked_fill(removed, 0.0).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


@dataclass(frozen=True)
class AdamStep:
    """The next step of `torch.optim.AdamW` on one group of parameters.

    Args:
        lr, beta1, beta2, eps: of the group.
        decay: decoupled weight decay.
        step: the step's number, from 1.
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    decay: float
    step: int

    @classmethod
    def from_group(cls, group: dict[str, Any], step: int) -> AdamStep:
        """From an entry of an optimizer's `param_groups`."""
        beta1, beta2 = group["betas"]
        return cls(float(group["lr"]), beta1, beta2, group["eps"], group["weight_decay"], step)

    @property
    def gradient_scale(self) -> float:
        """Factor of the preconditioned gradient in the step."""
        return self.lr * (1 - self.beta1) / (1 - self.beta1**self.step)

    @property
    def momentum_scale(self) -> float:
        """Factor of the preconditioned momentum in the step."""
        return self.lr * self.beta1 / (1 - self.beta1**self.step)

    def precondition(self, entropy_gradient: Tensor, loss_gradient: Tensor, second_moment: Tensor | None) -> Tensor:
        """u = g / (sqrt(v_hat) + eps), with the second moment as this step will leave it.

        The second moments before the step are not enough: a parameter with a small gradient in the past and a large one
        now would count many times too much.

        Args:
            entropy_gradient: g, of one parameter.
            loss_gradient: of the loss with all weights at 1, clipped.
            second_moment: v before the step; None before the first.

        Returns:
            u, a new tensor of the gradients' shape.
        """
        v = (1 - self.beta2) * loss_gradient.square()
        if second_moment is not None:
            v.add_(second_moment, alpha=self.beta2)
        return entropy_gradient / v.div_(1 - self.beta2**self.step).sqrt_().add_(self.eps)


@torch.no_grad()
def token_contributions(
    log_prob_above: PerToken, log_prob_below: PerToken, distance: float, factors: PerToken, scale: float
) -> PerToken:
    """c_j, each token's contribution to the change of the mean entropy by an update, in nats at a weight of 1.

    Args:
        log_prob_above, log_prob_below: log-probs of the tokens at theta + e u and theta - e u.
        distance: 2 e.
        factors: f_j, `token_factors` times the token's share in the loss's mean.
        scale: learning rate and bias correction, `AdamStep.gradient_scale`, times the factor of gradient clipping.
    """
    slope = (log_prob_above.float() - log_prob_below.float()) / distance
    return (slope * factors * scale).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def bounded_weights(contributions: Tensor, multiplier: Scalar | float, low: float, high: float) -> Tensor:
    """1 - multiplier * contribution, within bounds; float32."""
    return (1 - multiplier * contributions.double()).clamp_(low, high).float()


@torch.no_grad()
def solve_multiplier(contributions: Tokens, wanted: Scalar | float, low: float, high: float) -> Scalar:
    """The multiplier mu of `bounded_weights` with which the weighted contributions add up to a wanted value.

    Among all weights within the bounds that have this sum, these are nearest to 1 in least squares (the conditions of
    Karush, Kuhn and Tucker). The sum falls as mu grows, so bisection finds mu.

    Args:
        contributions: c_j, in nats, finite.
        wanted: of the sum over j of weight_j c_j, in nats.
        low, high: bounds, low <= 1 <= high.

    Returns:
        mu, float64. If no weights within the bounds have the sum, those of mu come as near as possible. Equal inputs
        give an equal mu on every rank.
    """
    c = contributions.double()
    size = c.abs()
    if not len(c):
        return c.new_zeros(())
    # At this multiplier all weights are at a bound but those of negligible contributions.
    smallest = torch.where(size > NEGLIGIBLE * size.amax(), size, torch.inf).amin()
    right = max(1 - low, high - 1) / smallest
    left = -right
    for _ in range(HALVINGS):
        middle = (left + right) / 2
        too_high = ((1 - middle * c).clamp_(low, high) * c).sum() > wanted
        left, right = torch.where(too_high, middle, left), torch.where(too_high, right, middle)
    return (left + right) / 2


@dataclass
class ProportionalIntegral:
    """A controller of the entropy for contributions without a known scale (gains of EntroPIC, arXiv 2511.15248).

    Args:
        proportional, integral: gains, per nat and per nat and update.
        total: sum of the errors so far, in nats.
    """

    proportional: float
    integral: float
    total: float = 0.0

    def strength(self, error: float) -> float:
        """What the controller asks for after one more error, target minus mean entropy in nats; 0 if it is not finite.

        Such an entropy is of an update whose gradients verl drops; in the sum it would stay for ever.
        """
        if not math.isfinite(error):
            return 0.0
        self.total += error
        return self.proportional * error + self.integral * self.total

    def multiplier(self, contributions: Tokens, error: float) -> Scalar:
        """The multiplier of `bounded_weights`: weights rise with the contribution if the entropy is too low.

        Args:
            contributions: signed, of any scale; their root mean square is the unit.
            error: target minus mean entropy, in nats.
        """
        strength = self.strength(error)
        size = contributions.double().square().mean().sqrt()
        return torch.where(size > 0, -strength / size, 0.0)
