# SPDX-License-Identifier: Apache-2.0
"""Fields of configuration dataclasses that carry their default and their range.

    @dataclass
    class MyOptions:
        strength: float = option(0.5, above=0.0)

Configuration files set such a field to null: Hydra then accepts both `strength=…` and `+strength=…`. `resolve_options`
replaces null by the default, so a field with a default is annotated without None.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

Options = TypeVar("Options")

#: Upper bound of numbers without another one: neither NaN nor infinity lies below it.
LARGEST = sys.float_info.max


@dataclass(frozen=True)
class Option:
    """Default and range of a field.

    Args:
        default: in place of None.
        above, at_least, at_most, below: bounds of a number.
        integer: whether only integers are allowed.
        choices: allowed values of a field that is not a number.
        schedule: whether a mapping from training steps to numbers is allowed too, such as {1: 0.3, 21: 0.2}.
    """

    default: Any = None
    above: float | None = None
    at_least: float = -LARGEST
    at_most: float = LARGEST
    below: float | None = None
    integer: bool = False
    choices: tuple[Any, ...] = ()
    schedule: bool = False

    def check(self, key: str, value: Any) -> None:
        """Check the value of a key.

        Raises:
            ValueError: if it is out of range; the message has the key, the value and the range.
        """
        if value is None and self.default is None:
            return
        if self.choices:
            if value not in self.choices or isinstance(value, bool) != isinstance(self.choices[0], bool):
                expected = ", ".join(str(choice).lower() for choice in self.choices)
                raise ValueError(f"{key}={value!r}: expected one of {expected}")
            return
        if self.schedule and isinstance(value, Mapping):
            if any(not isinstance(step, int) or step < 1 for step in value) or 1 not in value:
                raise ValueError(f"{key}={dict(value)}: expected training steps from 1 as keys, the first of them 1")
            for step, number in value.items():
                replace(self, schedule=False).check(f"{key}.{step}", number)
            return
        number = isinstance(value, int if self.integer else int | float) and not isinstance(value, bool)
        if not number or not self._within(value):
            raise ValueError(f"{key}={value!r}: expected {self._range()}")

    def _within(self, number: float) -> bool:
        inside = self.at_least <= number <= self.at_most
        return inside and (self.above is None or number > self.above) and (self.below is None or number < self.below)

    def _range(self) -> str:
        bounded = self.at_most != LARGEST or self.below is not None  # or infinity is allowed
        kind = "an integer" if self.integer else "a number" if bounded else "a finite number"
        low = f" of at least {self.at_least:g}" if self.at_least > -LARGEST else ""
        low = low if self.above is None else f" above {self.above:g}"
        high = f" and at most {self.at_most:g}" if self.at_most < LARGEST else ""
        high = high if self.below is None else f" and below {self.below:g}"
        return kind + low + high


def at_step(value: Any, step: int) -> float:
    """The number of an option with a schedule at a training step, counted from 1."""
    return float(value[max(first for first in value if first <= step)] if isinstance(value, Mapping) else value)


def option(default: Any = None, **bounds: Any) -> Any:
    """A dataclass field with an `Option`."""
    return field(default=None, metadata={"option": Option(default, **bounds)})


def resolve_options(config: Any, section: str) -> None:
    """Replace None by the default in all fields made by `option`, and check their values.

    Args:
        config: an instance of a dataclass.
        section: the dataclass's key in the configuration, such as `policy_loss`, for error messages.

    Raises:
        ValueError: if a value is out of range.
    """
    for name, found in ((f.name, f.metadata["option"]) for f in fields(config) if "option" in f.metadata):
        if getattr(config, name) is None:
            object.__setattr__(config, name, found.default)
        found.check(f"{section}.{name}", getattr(config, name))


class AlgorithmOptions:
    """Base of the dataclasses of keys below `algorithm`."""

    def __post_init__(self) -> None:
        resolve_options(self, "algorithm")


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Each value below a section of the configuration with its whole key; the value itself if it is no section."""
    if not isinstance(value, Mapping):
        yield key, value
        return
    for name, below in value.items():
        yield from leaves(below, f"{key}.{name}" if key else name)


def from_config(cls: type[Options], config: Mapping[str, Any] | None, unknown: str | None = None) -> Options:
    """A dataclass of options from a section of the configuration, which may have other keys.

    Args:
        cls: the dataclass.
        config: the section; None: all defaults.
        unknown: the section's key if it may have no other keys.

    Raises:
        ValueError: if it is not a section, or has an unknown key and may not.
    """
    if unknown and not isinstance(config, Mapping | None):
        raise ValueError(f"{unknown}={config}: expected a section of keys below it")
    names: Iterable[str] = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    given = config or {}
    for name in given if unknown else ():
        if name not in names:
            raise ValueError(f"{unknown}.{name}: unknown; expected one of {', '.join(names)}")
    made = cls(**{name: given.get(name) for name in names})
    for one in fields(cls):  # type: ignore[arg-type]
        if "option" in one.metadata and getattr(made, one.name) is None and one.metadata["option"].default is not None:
            raise TypeError(
                f"{cls.__name__}: expected a __post_init__ that calls resolve_options, as AlgorithmOptions has"
            )
    return made
