# SPDX-License-Identifier: Apache-2.0
"""Policy losses that other papers propose against entropy collapse, to compare STEER with.

    adaptive_entropy            an entropy bonus that is there only while the entropy is below a target
    entropy_shaped_advantage    advantages raised by the token's entropy
    dynamic_clip                PPO's clip, wider for improbable tokens
    high_entropy_tokens         a gradient for the tokens of the highest entropy only
    quadrant                    tokens scaled by the sign of their advantage and by how likely they are

Each is a value of `policy_loss.loss_mode`; its options are fields of PolicyLossConfig. All take upstream's arguments:
old_log_prob, log_prob, advantages and response_mask (batch, response_length), loss_agg_mode, config (an ActorConfig)
and rollout_is_weights. What they take besides, `verl.workers.utils.losses` hands over by name. They return the loss,
a scalar with gradient, and metrics, scalar tensors on the loss's device.

docs/interventions.md compares them.
"""

from __future__ import annotations

from typing import Any

import torch
from verl.trainer.ppo.core_algos import agg_loss, register_policy_loss, reweighted_policy_loss
from verl.utils.torch_functional import masked_mean

QUADRANTS = ("positive_likely", "positive_unlikely", "negative_likely", "negative_unlikely")


@register_policy_loss("adaptive_entropy")
def compute_policy_loss_adaptive_entropy(
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: torch.Tensor | None = None,
    current_entropys: torch.Tensor | None = None,
    entropy_coeff: float | None = None,
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Skywork-OR1 (arXiv 2505.22312, section 3.2.5): PPO's loss minus a coefficient times the policy's entropy.

    The coefficient follows the entropy from step to step; see `AdaptiveEntropyCoefficient`, which the trainer asks.

    Args:
        current_entropys: entropy of the policy being updated, with gradient, in nats, (batch, response_length).
        entropy_coeff: this step's coefficient.

    Raises:
        ValueError: if the entropies or the coefficient are missing.
    """
    if current_entropys is None or entropy_coeff is None:
        raise ValueError(
            f"entropy_coeff={entropy_coeff}: loss_mode=adaptive_entropy expects a number from the trainer "
            "trainer.v1.trainer_mode=steer, and actor.calculate_entropy=true"
        )
    loss, metrics = reweighted_policy_loss(
        "vanilla", torch.ones_like(advantages), old_log_prob, log_prob, advantages, response_mask, loss_agg_mode,
        config, rollout_is_weights,
    )  # fmt: skip
    bonus = agg_loss(current_entropys.float(), response_mask, loss_agg_mode, **config.global_batch_info)
    return loss - entropy_coeff * bonus, metrics


@register_policy_loss("entropy_shaped_advantage")
def compute_policy_loss_entropy_shaped_advantage(
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: torch.Tensor | None = None,
    entropys: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, Any]]:
    """PPO's loss with the advantages A + min(alpha H, |A| / kappa) (arXiv 2506.14758), H without gradient.

    As kappa is above 1, no advantage changes its sign. H is the old policy's, which costs nothing: the same as the
    current policy's at the first update of a batch.

    Args:
        entropys: entropy of the old policy in each token's state, in nats, (batch, response_length).
    """
    options = config.policy_loss
    with torch.no_grad():
        bonus = torch.minimum(
            options.advantage_entropy_alpha * _required(entropys, "entropy_shaped_advantage").float(),
            advantages.float().abs() / options.advantage_entropy_kappa,
        )
    loss, metrics = reweighted_policy_loss(
        "vanilla", torch.ones_like(bonus), old_log_prob, log_prob, advantages + bonus, response_mask, loss_agg_mode,
        config, rollout_is_weights,
    )  # fmt: skip
    return loss, metrics | {"actor/advantage_bonus_mean": masked_mean(bonus, response_mask)}


def dynamic_clip_bounds(old_log_prob: torch.Tensor, low: float, high: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Ratios between which |(ratio - 1) prob| stays at most `low` below and `high` above (arXiv 2509.02333).

    With prob = ratio * old_prob these are the roots 1/2 + 1/2 sqrt(1 - 4 low / old_prob), or 1/2 where there is none,
    and 1/2 + 1/2 sqrt(1 + 4 high / old_prob).

    Args:
        old_log_prob: (batch, response_length).
        low, high: above 0.

    Returns:
        Lower and upper bound, float32 (batch, response_length).
    """
    inverse = torch.exp(-old_log_prob.float())
    lower = 0.5 + 0.5 * (1 - 4 * low * inverse).clamp_min(0.0).sqrt()
    return lower, 0.5 + 0.5 * (1 + 4 * high * inverse).sqrt()


@register_policy_loss("dynamic_clip")
def compute_policy_loss_dynamic_clip(
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, Any]]:
    """DCPO's dynamic clip (arXiv 2509.02333, its dynamic-adaptive clipping): PPO's with `dynamic_clip_bounds`.

    No ratio above `actor.clip_ratio_c` counts, whatever the sign of the advantage: as this fork reads the paper. Its
    two other parts, the smooth advantage standardisation over steps and the loss's averaging, are not here.
    """
    options, ceiling = config.policy_loss, config.clip_ratio_c
    advantages = advantages.float()
    log_ratio = (log_prob.float() - old_log_prob.float()).clamp(-20.0, 20.0)
    ratio = log_ratio.exp()
    lower, upper = dynamic_clip_bounds(old_log_prob, options.dynamic_clip_low, options.dynamic_clip_high)
    ratio = torch.minimum(ratio, ratio.new_full((), ceiling))
    within = torch.minimum(torch.maximum(ratio, lower), upper)
    losses = torch.maximum(-advantages * ratio, -advantages * within)
    if rollout_is_weights is not None:
        losses = losses * rollout_is_weights
    loss = agg_loss(losses, response_mask, loss_agg_mode, **config.global_batch_info)
    with torch.no_grad():
        above = (advantages > 0) & (ratio > upper) | (ratio >= ceiling)
        below = (advantages < 0) & (ratio < lower)
        metrics = {
            "actor/pg_clipfrac_high": masked_mean(above.float(), response_mask),
            "actor/pg_clipfrac_low": masked_mean(below.float(), response_mask),
            "actor/ppo_kl": masked_mean(-log_ratio, response_mask),
        }
    return loss, metrics


@register_policy_loss("high_entropy_tokens")
def compute_policy_loss_high_entropy_tokens(
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: torch.Tensor | None = None,
    entropys: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, Any]]:
    """PPO's loss on the `high_entropy_share` of the tokens whose entropy is highest (arXiv 2506.01939).

    The others have no gradient, and count where the loss is averaged. The highest are chosen within a micro-batch,
    by the old policy's entropies.

    Args:
        entropys: entropy of the old policy in each token's state, in nats, (batch, response_length).
    """
    entropys = _required(entropys, "high_entropy_tokens").float()
    with torch.no_grad():
        valid = response_mask.bool()
        values = entropys.masked_fill(~valid, torch.nan).flatten()
        threshold = torch.nanquantile(values, 1 - config.policy_loss.high_entropy_share, interpolation="higher")
        chosen = (valid & (entropys >= threshold)).float()
    loss, metrics = reweighted_policy_loss(
        "vanilla", chosen, old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config,
        rollout_is_weights,
    )  # fmt: skip
    return loss, metrics | {
        "actor/high_entropy_share": masked_mean(chosen, response_mask),
        "actor/high_entropy_threshold": threshold.nan_to_num(0.0),
    }


@register_policy_loss("quadrant")
def compute_policy_loss_quadrant(
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: torch.Tensor | None = None,
    entropys: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, Any]]:
    """PPO's loss, the tokens of one of the four `QUADRANTS` times `quadrant_weight` (after arXiv 2510.10150).

    A quadrant is the sign of the advantage and whether the token is likely. Raising a likely token or lowering an
    unlikely one lowers the entropy of its state, the other two raise it: so a weight below 1 on `positive_likely` or
    `negative_unlikely`, or above 1 on the other two, keeps the entropy up, and the reverse brings it down.

    A token is likely from the probability `quadrant_probability` on; None: from exp(-H), where ln prob + H and with
    it the estimated change of the entropy turns its sign.

    Args:
        entropys: entropy of the old policy in each token's state, in nats, (batch, response_length).
    """
    options = config.policy_loss
    with torch.no_grad():
        inside = in_quadrant(
            options.quadrant, advantages, log_prob, _required(entropys, "quadrant"), options.quadrant_probability
        )
        weights = torch.where(inside, options.quadrant_weight, 1.0)
    loss, metrics = reweighted_policy_loss(
        "vanilla", weights, old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config,
        rollout_is_weights,
    )  # fmt: skip
    return loss, metrics | {"actor/quadrant_share": masked_mean(inside.float(), response_mask)}


def in_quadrant(
    quadrant: str,
    advantages: torch.Tensor,
    log_prob: torch.Tensor,
    entropys: torch.Tensor,
    probability: float | None = None,
) -> torch.Tensor:
    """Which tokens are in one of the `QUADRANTS`.

    Args:
        quadrant: its name.
        advantages, log_prob, entropys: (batch, response_length).
        probability: tokens at least as probable are likely; None: exp(-H).

    Returns:
        Boolean (batch, response_length); a token without advantage is in none.
    """
    sign, place = quadrant.split("_")
    prob = log_prob.float().exp()
    likely = prob >= (torch.exp(-entropys.float()) if probability is None else probability)
    return (advantages > 0 if sign == "positive" else advantages < 0) & (likely if place == "likely" else ~likely)


def _required(entropys: torch.Tensor | None, loss_mode: str) -> torch.Tensor:
    if entropys is None:
        raise ValueError(f"entropys=None: loss_mode={loss_mode} expects the entropy of each response token")
    return entropys
