# SPDX-License-Identifier: Apache-2.0
"""The coefficient of the entropy bonus that follows a target, for `policy_loss.loss_mode=adaptive_entropy`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig
from verl.utils.config import omega_conf_to_dataclass

#: The coefficient's file in a step's checkpoint.
COEFFICIENT_FILE = "entropy_coeff.json"


@dataclass
class AdaptiveEntropyCoefficient:
    """Rises while the policy's entropy is below a target, falls while it is above (arXiv 2505.22312, section 3.2.5).

    The bonus itself is off while the entropy is above the target. The step and the bound are those of the scripts that
    the authors released.

    Args:
        target: entropy in nats.
        increment: what is added or taken away a step.
        maximum: the coefficient's upper bound; the lower one is 0.
        value: the coefficient of the next step.
    """

    target: float
    increment: float
    maximum: float
    value: float = 0.0

    @classmethod
    def of(cls, policy_loss: DictConfig) -> AdaptiveEntropyCoefficient | None:
        """From `actor.policy_loss` of the configuration; None where another loss is chosen."""
        if policy_loss.loss_mode != "adaptive_entropy":
            return None
        options = omega_conf_to_dataclass(policy_loss)
        return cls(options.target_entropy, options.entropy_coeff_step, options.entropy_coeff_max)

    def step(self, entropy: float) -> float:
        """The coefficient for an update of a policy of this entropy; the next one is set by it."""
        coefficient = self.value if entropy <= self.target else 0.0
        change = self.increment if entropy < self.target else -self.increment
        self.value = min(max(self.value + change, 0.0), self.maximum)
        return coefficient

    def save(self, folder: Path) -> None:
        """Write the coefficient to a checkpoint's folder."""
        (folder / COEFFICIENT_FILE).write_text(json.dumps(self.value))

    def load(self, folder: Path) -> None:
        """Take the coefficient from a checkpoint's folder, if it is there."""
        file = folder / COEFFICIENT_FILE
        if file.is_file():
            self.value = json.loads(file.read_text())
