# SPDX-License-Identifier: Apache-2.0
"""`policy_loss.loss_mode=adaptive_entropy`: an entropy bonus that follows a target (Skywork-OR1, arXiv 2505.22312)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from verl.steer.methods.registry import policy_loss
from verl.steer.methods.step_state import StepState
from verl.steer.options import option
from verl.trainer.ppo.core_algos import LossInputs, LossOutputs, agg_loss, reweighted_policy_loss


@dataclass
class AdaptiveEntropyOptions:
    """Keys below `policy_loss`; step and bound are those of the scripts that the authors released.

    Args:
        target_entropy: the bonus is on while the entropy is below it, in nats; a number, or a mapping from the first
            training step of each target, such as {1: 0.35, 21: 0.2}. The map `target` of STEER holds it.
        entropy_coeff_step: change of the coefficient per training step.
        entropy_coeff_max: upper bound of the coefficient.
    """

    target_entropy: Any = option(0.2, above=0.0, schedule=True)
    entropy_coeff_step: float = option(1e-4, above=0.0)
    entropy_coeff_max: float = option(5e-3, above=0.0)


@policy_loss("adaptive_entropy", needs=("current_entropys", "entropy_coeff"))
def compute_policy_loss_adaptive_entropy(inputs: LossInputs, config: Any) -> LossOutputs:
    """PPO's loss minus this step's coefficient times the policy's mean entropy (arXiv 2505.22312, section 3.2.5)."""
    reason = "loss_mode=adaptive_entropy expects trainer.v1.trainer_mode=steer and actor.calculate_entropy=true"
    entropys, coefficient = inputs.require("current_entropys", reason), inputs.require("entropy_coeff", reason)
    outputs = reweighted_policy_loss("vanilla", None, inputs, config)
    bonus = agg_loss(entropys.float(), inputs.response_mask, config.loss_agg_mode, **config.global_batch_info)
    outputs.loss = outputs.loss - coefficient * bonus
    return outputs


@dataclass
class AdaptiveEntropyCoefficient(StepState):
    """The coefficient: it rises while the entropy is below the target, and falls while the entropy is above it.

    Args:
        target: entropy in nats.
        increment: change per training step.
        maximum: upper bound; the lower one is 0.
        value: coefficient of the next step.
    """

    target: float
    increment: float
    maximum: float
    value: float = 0.0

    loss_mode = "adaptive_entropy"

    @classmethod
    def from_options(cls, options: Any) -> AdaptiveEntropyCoefficient:
        """From `actor.policy_loss` as a dataclass."""
        return cls(options.target_entropy, options.entropy_coeff_step, options.entropy_coeff_max)

    def step(self, entropy: float) -> float:
        """The coefficient for a policy of this entropy, 0 above the target; then set the next step's.

        An entropy that is not finite leaves the coefficient as it is, and has none itself.
        """
        if not math.isfinite(entropy):
            return 0.0
        self.value = min(self.value, self.maximum)  # a resumed run may have a lower one
        coefficient = self.value if entropy <= self.target else 0.0
        change = self.increment if entropy < self.target else -self.increment
        self.value = min(max(self.value + change, 0.0), self.maximum)
        return coefficient
