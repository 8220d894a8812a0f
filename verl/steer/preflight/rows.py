# SPDX-License-Identifier: Apache-2.0
"""The rows of the table: one for each check, and the line that sums them up."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

GIB = 2**30


class Row(NamedTuple):
    """A check's name, whether it passed, and what was found, or what to do."""

    name: str
    passed: bool
    detail: str


def run_check(name: str, check: Callable[..., str], *arguments: object) -> Row:
    """A check's row, whatever the check raises, so that one failure hides no other check.

    Args:
        name: of the row.
        check: returns what was found; raises, with a message that says what to do.
    """
    try:
        return Row(name, True, check(*arguments))
    except Exception as error:
        message = str(error).strip() or "no message"
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        return Row(name, False, f"{kind}{message.splitlines()[0]}")


def verdict(rows: list[Row]) -> str:
    """`ready`, or `not ready` with the first reason and the number of others."""
    failed = [row for row in rows if not row.passed]
    if not failed:
        return "ready"
    others = f" (and {len(failed) - 1} more above)" if len(failed) > 1 else ""
    return f"not ready: {failed[0].name}: {failed[0].detail}{others}"


def report(rows: list[Row]) -> int:
    """Print the table and the line; return the exit status, 0 if all checks passed, else 1."""
    table = Table("check", "result", "detail")
    for row in rows:
        table.add_row(row.name, "[green]ok[/]" if row.passed else "[red]failed[/]", Text(row.detail))
    Console().print(table)
    print(verdict(rows))
    return int(any(not row.passed for row in rows))
