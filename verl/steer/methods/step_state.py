# SPDX-License-Identifier: Apache-2.0
"""A number that a loss reads at each training step, that depends on earlier steps, and that checkpoints contain."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from pathlib import Path
from types import MappingProxyType
from typing import Any

#: File of the number in a checkpoint.
COEFFICIENT_FILE = "entropy_coeff.json"


class StepState(ABC):
    """Base of the states; `value` is the number that a checkpoint contains."""

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
    def from_options(cls, options: Any) -> StepState | None:
        """From `actor.policy_loss` as a dataclass; None with another loss."""

    @abstractmethod
    def step(self, entropy: float) -> float | None:
        """What the loss reads at a step whose old policy has this mean entropy, in nats; None: nothing."""

    def observe(self, metrics: dict[str, Any]) -> None:  # noqa: B027 - most states read nothing
        """Read the metrics of the step's update."""

    def save(self, folder: Path) -> None:
        """Write the number into a checkpoint's folder."""
        (folder / COEFFICIENT_FILE).write_text(json.dumps(self.value))

    def load(self, folder: Path) -> None:
        """Read the number from a checkpoint's folder, if its file exists."""
        file = folder / COEFFICIENT_FILE
        if file.is_file():
            self.value = json.loads(file.read_text())
