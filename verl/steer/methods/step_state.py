# SPDX-License-Identifier: Apache-2.0
"""State that a loss keeps from one training step to the next, a number that checkpoints contain."""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from pathlib import Path
from types import MappingProxyType
from typing import Any

logger = logging.getLogger(__name__)

#: File of the number in a checkpoint, with the loss whose number it is. Its name is of the first such number.
STATE_FILE = "entropy_coeff.json"


class StepState(ABC):
    """Base of the states; `value` is the number that a checkpoint contains."""

    #: The loss that reads the number.
    loss_mode: str
    #: Field of `LossInputs` that the trainer sends, and name of its metric.
    field = "entropy_coeff"
    #: Flags for the workers that the trainer sends with each update.
    flags: Any = MappingProxyType({})
    #: Whether the trainer sets `target`, an entropy in nats, at each step.
    reads_target = True
    target: float
    value: Any

    @classmethod
    @abstractmethod
    def from_options(cls, options: Any) -> StepState:
        """From `actor.policy_loss` as a dataclass, of the loss `loss_mode`."""

    @abstractmethod
    def step(self, entropy: float) -> float | None:
        """What the loss reads at a step whose old policy has this mean entropy, in nats; None: nothing."""

    def observe(self, metrics: dict[str, Any]) -> None:  # noqa: B027 - most states read nothing
        """Read the metrics of the step's update."""

    def save(self, folder: Path) -> None:
        """Write the number into a checkpoint's folder."""
        (folder / STATE_FILE).write_text(json.dumps({"loss_mode": self.loss_mode, "value": self.value}))

    def load(self, folder: Path) -> None:
        """Read the number from a checkpoint's folder, if there is one, and it is of the same loss."""
        file = folder / STATE_FILE
        if not file.is_file():
            return
        saved = json.loads(file.read_text())
        if not isinstance(saved, dict):  # of an earlier version, which named no loss
            saved = {"loss_mode": self.loss_mode, "value": saved}
        if saved["loss_mode"] == self.loss_mode:
            self.value = saved["value"]
        else:
            logger.warning("%s is of loss_mode=%s: with %s it starts anew", file, saved["loss_mode"], self.loss_mode)
