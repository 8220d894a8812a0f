# SPDX-License-Identifier: Apache-2.0
"""`policy_loss.loss_mode=entropic`: EntroPIC, a PI controller of the loss of likely tokens (arXiv 2511.15248)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from verl.steer.methods.registry import policy_loss
from verl.steer.methods.step_state import StepState
from verl.steer.options import option
from verl.trainer.ppo.core_algos import LossInputs, LossOutputs, agg_loss, reweighted_policy_loss
from verl.trainer.ppo.entropy_influence import ProportionalIntegral
from verl.utils.torch_functional import masked_mean


@dataclass
class EntroPICOptions:
    """Key below `policy_loss`: tokens more probable than this are controlled. `target_*` are the controller's keys."""

    entropic_probability: float = option(0.95, above=0.0, at_most=1.0)


@policy_loss("entropic", needs=("entropy_coeff",), clips_as_ppo=False)
def compute_policy_loss_entropic(inputs: LossInputs, config: Any) -> LossOutputs:
    """PPO's loss minus alpha times the mean of ratio * |A| over the likely tokens, 0 for the others (2511.15248).

    At a ratio of 1 the loss of likely tokens with a positive advantage counts 1 + alpha times, of those with a negative
    one 1 - alpha times. Both lower the entropy where alpha, `entropy_coeff`, is positive. The term has no clip.
    """
    alpha = inputs.require("entropy_coeff", "loss_mode=entropic expects trainer.v1.trainer_mode=steer")
    outputs = reweighted_policy_loss("vanilla", None, inputs, config)
    likely = (inputs.log_prob.detach().float() > math.log(config.policy_loss.entropic_probability)).float()
    gains = inputs.ratio * inputs.advantages.float().abs() * likely
    if inputs.rollout_is_weights is not None:
        gains = gains * inputs.rollout_is_weights
    mean = agg_loss(gains, inputs.response_mask, config.loss_agg_mode, **config.global_batch_info)
    outputs.loss = outputs.loss - alpha * mean
    outputs.metrics["actor/likely_share"] = masked_mean(likely, inputs.response_mask)
    return outputs


@dataclass
class EntroPICCoefficient(StepState):
    """alpha = K_p e + K_i (sum of e so far), from -1 to 1, where e is the entropy minus its target, in nats.

    Args:
        target: entropy in nats.
        proportional, integral: K_p per nat and K_i per nat and training step.
        value: sum of target minus entropy over the steps so far.
    """

    target: float
    proportional: float
    integral: float
    value: float = 0.0

    loss_mode = "entropic"

    @classmethod
    def from_options(cls, options: Any) -> EntroPICCoefficient:
        """From `actor.policy_loss` as a dataclass."""
        return cls(options.target_entropy, options.target_kp, options.target_ki)

    def step(self, entropy: float) -> float:
        """alpha of this step."""
        controller = ProportionalIntegral(self.proportional, self.integral, self.value)
        alpha = -controller.strength(self.target - entropy)
        self.value = controller.total
        return min(max(alpha, -1.0), 1.0)
