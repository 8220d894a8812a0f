# SPDX-License-Identifier: Apache-2.0
"""`algorithm.adv_estimator=aepo`: REINFORCE on answers sampled at another temperature (AEPO, arXiv 2510.08141)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from tensordict import TensorDict
from torch import Tensor
from verl.steer.methods.advantages import AdvantageInputs, advantage_estimator
from verl.steer.options import AlgorithmOptions, from_config, option
from verl.steer.rollout.checks import TEMPERATURE

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


class Tempering:
    """The prompts of a step whose answers are sampled at another temperature.

    Args:
        config: the run's; `data.train_batch_size` prompts are a step's, and the other prompts have
            `rollout.temperature`.
    """

    def __init__(self, config: DictConfig) -> None:
        self.options = from_config(AEPOOptions, config.algorithm)
        self.batch_size = config.data.train_batch_size
        self.usual = config.actor_rollout_ref.rollout.temperature
        self.tempered: dict[str, float] = {}

    def temper(self, batch: TensorDict, entropy: float | None, step_prompts: int) -> None:
        """Have the first prompts of a batch sampled at AEPO's temperature, as many as the step still lacks.

        Args:
            batch: prompts with their `uid`; it gets the column `TEMPERATURE`.
            entropy: the policy's, in nats, or None.
            step_prompts: prompts that the step has asked for, with these.
        """
        uids = list(batch["uid"])
        wanted, temperature = self.options.tempered(entropy, self.batch_size, step_prompts)
        count = wanted - len(self.tempered)
        batch[TEMPERATURE] = torch.tensor([temperature] * count + [self.usual] * (len(uids) - count))
        self.tempered |= dict.fromkeys(uids[:count], temperature)

    def end_step(self, prompts: set[str], metrics: dict[str, Any]) -> dict[str, float]:
        """The step's tempered prompts with their temperature; the next step has none yet.

        Args:
            prompts: those of the step's batch, of which `metrics` gets the number that is tempered.
            metrics: the step's.
        """
        tempered, self.tempered = self.tempered, {}
        metrics["training/tempered_prompts"] = len(tempered.keys() & prompts)
        metrics["training/temperature"] = max(tempered.values(), default=0.0)
        return tempered


@advantage_estimator("aepo")
def compute_aepo_advantage(inputs: AdvantageInputs) -> Tensor:
    """AEPO (arXiv 2510.08141): GRPO's advantages, and 1 for the right answers to tempered prompts, 0 for the others.

    An answer counts as right if GRPO's advantage is above `LEAST_ADVANTAGE`: none does if all answers are right.
    """
    advantages = inputs.grpo(inputs.token_level_rewards)
    tempered = torch.from_numpy(np.isin(np.asarray(inputs.index, dtype=str), list(inputs.tempered)))
    return torch.where(tempered[:, None].to(advantages.device), (advantages > LEAST_ADVANTAGE).float(), advantages)
