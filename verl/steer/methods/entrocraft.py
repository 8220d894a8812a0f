# SPDX-License-Identifier: Apache-2.0
"""`algorithm.adv_estimator=entrocraft`: one class of answers rejected where the entropy leaves a band (2604.26326)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from verl.steer.methods.advantages import AdvantageInputs, advantage_estimator
from verl.steer.options import AlgorithmOptions, from_config, option
from verl.utils.torch_functional import masked_mean


@dataclass
class EntrocraftOptions(AlgorithmOptions):
    """Keys below `algorithm`: the band of the entropy in nats, before the run's first step and at its last one."""

    entropy_lower_start: float = option(0.6, at_least=0.0)
    entropy_lower_end: float = option(0.4, at_least=0.0)
    entropy_upper_start: float = option(0.7, at_least=0.0)
    entropy_upper_end: float = option(0.5, at_least=0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        for at in ("start", "end"):
            lower, upper = getattr(self, f"entropy_lower_{at}"), getattr(self, f"entropy_upper_{at}")
            if lower > upper:
                raise ValueError(f"algorithm.entropy_lower_{at}={lower}: expected at most entropy_upper_{at}={upper}")

    def band(self, progress: float) -> tuple[float, float]:
        """Lower and upper end of the band after this fraction of the run's steps."""
        return (
            self.entropy_lower_start + (self.entropy_lower_end - self.entropy_lower_start) * progress,
            self.entropy_upper_start + (self.entropy_upper_end - self.entropy_upper_start) * progress,
        )


@advantage_estimator("entrocraft", "entropy")
def compute_entrocraft_advantage(inputs: AdvantageInputs) -> Tensor:
    """Entrocraft (arXiv 2604.26326): GRPO's advantages while the old policy's mean entropy is in the band.

    Below it right answers, which lower the entropy, are rejected, and above it wrong ones. The accepted answers then
    have an advantage of -1 or 1, without a baseline. A rejected answer has an advantage of 0.
    """
    lower, upper = from_config(EntrocraftOptions, inputs.config).band(inputs.progress)
    entropy = masked_mean(inputs.entropy.float(), inputs.response_mask)
    if entropy < lower:
        return (inputs.right.float() - 1).unsqueeze(-1) * inputs.response_mask
    if entropy > upper:
        return inputs.right.float().unsqueeze(-1) * inputs.response_mask
    return inputs.grpo(inputs.token_level_rewards)
