# SPDX-License-Identifier: Apache-2.0
"""`algorithm.adv_estimator=aepo`: REINFORCE on answers sampled at another temperature (AEPO, arXiv 2510.08141)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from verl.steer.methods.advantages import AdvantageInputs, advantage_estimator
from verl.steer.options import AlgorithmOptions, option

#: GRPO's advantage from which on a tempered answer counts, as in the authors' code.
LEAST_ADVANTAGE = 0.05


@dataclass
class AEPOOptions(AlgorithmOptions):
    """Keys below `algorithm`; entropy and temperatures are those of the authors' code.

    Args:
        aepo_entropy: the entropy to hold, in nats.
        aepo_temperature_high, aepo_temperature_low: of the tempered prompts up to that entropy, and above it.
        aepo_share: fraction of the prompts that is tempered, half of it above that entropy.
    """

    aepo_entropy: float = option(0.5, above=0.0)
    aepo_temperature_high: float = option(1.2, above=0.0)
    aepo_temperature_low: float = option(0.8, above=0.0)
    aepo_share: float = option(0.0625, above=0.0, at_most=1.0)

    def tempered(self, entropy: float | None, batch_size: int, prompts: int) -> tuple[int, float]:
        """How many of a step's prompts are tempered, and their temperature.

        Args:
            entropy: the policy's, in nats; None: not known yet, and taken for low.
            batch_size: prompts of the step; their number is rounded up.
            prompts: the same with those that replace failed or filtered ones; among them it is rounded down.
        """
        too_high = entropy is not None and entropy > self.aepo_entropy
        share = self.aepo_share / 2 if too_high else self.aepo_share
        # The margin is for products such as 0.07 * 100 = 7.000000000000001.
        count = max(math.ceil(share * batch_size - 1e-6), math.floor(share * prompts + 1e-6))
        return count, self.aepo_temperature_low if too_high else self.aepo_temperature_high


@advantage_estimator("aepo")
def compute_aepo_advantage(inputs: AdvantageInputs) -> Tensor:
    """AEPO (arXiv 2510.08141): GRPO's advantages, and 1 for the right answers to tempered prompts, 0 for the others.

    An answer counts as right if GRPO's advantage is above `LEAST_ADVANTAGE`: none does if all answers are right.
    """
    advantages = inputs.grpo(inputs.token_level_rewards)
    tempered = torch.from_numpy(np.isin(np.asarray(inputs.index, dtype=str), list(inputs.tempered)))
    return torch.where(tempered[:, None].to(advantages.device), (advantages > LEAST_ADVANTAGE).float(), advantages)
