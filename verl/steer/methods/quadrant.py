# SPDX-License-Identifier: Apache-2.0
"""`policy_loss.loss_mode=quadrant`: tokens scaled by the sign of their advantage and by whether they are likely."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from verl.steer.methods.registry import policy_loss
from verl.steer.options import option
from verl.steer.token_metrics import QUADRANTS
from verl.trainer.ppo.core_algos import LossInputs, LossOutputs, TokenMask, reweighted_policy_loss
from verl.utils.torch_functional import masked_mean


@dataclass
class QuadrantOptions:
    """Keys below `policy_loss`.

    Args:
        quadrant: the tokens that are scaled.
        quadrant_weight: their weight.
        quadrant_probability: tokens at least as probable are likely. None: exp(-H) of each state, where ln prob + H and
            the estimated entropy change turn their sign.
    """

    quadrant: str = option("positive_likely", choices=QUADRANTS)
    quadrant_weight: float = option(0.5, at_least=0.0)
    quadrant_probability: float | None = option(above=0.0, at_most=1.0)


@policy_loss("quadrant", needs=("entropys",))
def compute_policy_loss_quadrant(inputs: LossInputs, config: Any) -> LossOutputs:
    """PPO's loss, the tokens of one of the four `QUADRANTS` times `quadrant_weight` (after arXiv 2510.10150).

    Raising a likely token or lowering an unlikely one lowers the entropy of its state, the other two raise it: a weight
    below 1 on `positive_likely` or `negative_unlikely`, or above 1 on the other two, keeps the entropy up.
    """
    options = config.policy_loss
    with torch.no_grad():
        inside = in_quadrant(options.quadrant, inputs, options.quadrant_probability)
        weights = torch.where(inside, options.quadrant_weight, 1.0)
    outputs = reweighted_policy_loss("vanilla", weights, inputs, config)
    outputs.metrics["actor/quadrant_share"] = masked_mean(inside.float(), inputs.response_mask)
    return outputs


def in_quadrant(quadrant: str, inputs: LossInputs, probability: float | None = None) -> TokenMask:
    """Tokens of one of the `QUADRANTS`; a token with advantage 0 is in none.

    Args:
        quadrant: its name.
        inputs: a micro-batch with the old policy's entropies.
        probability: tokens at least as probable are likely; None: exp(-H).
    """
    entropys = inputs.require("entropys", "loss_mode=quadrant expects the entropy of each response token")
    sign, likelihood = quadrant.split("_")
    prob = inputs.log_prob.float().exp()
    likely = prob >= (torch.exp(-entropys.float()) if probability is None else probability)
    signed = inputs.advantages > 0 if sign == "positive" else inputs.advantages < 0
    return signed & (likely if likelihood == "likely" else ~likely)
