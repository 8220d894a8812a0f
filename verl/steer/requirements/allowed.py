# SPDX-License-Identifier: Apache-2.0
"""What an option demands of other keys."""

from __future__ import annotations

from typing import Any


def refuse_others(needs: list[tuple[str, Any, tuple[Any, ...]]], reason: str) -> None:
    """Check that each key has one of the values that an option allows.

    Args:
        needs: key, value and allowed values.
        reason: the option.

    Raises:
        ValueError: if a key has another value.
    """
    for key, value, allowed in needs:
        if value not in allowed:
            expected = " or ".join(str(one).lower() if isinstance(one, bool) else str(one) for one in allowed)
            raise ValueError(f"{key}={value}: expected {expected} with {reason}")
