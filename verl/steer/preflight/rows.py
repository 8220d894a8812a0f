# SPDX-License-Identifier: Apache-2.0
"""The rows of the table, one for each check, and the line that sums them up."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

GIB = 2**30


class Row(NamedTuple):
    """A check's name, whether it passed, and what was found or, where it failed, what to do."""

    name: str
    passed: bool
    detail: str


def run_check(name: str, check: Callable[..., str], *arguments: object) -> Row:
    """The row of a check, which returns what was found or raises; whatever it raises, the next check has its turn."""
    try:
        return Row(name, True, check(*arguments))
    except Exception as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        return Row(name, False, kind + (str(error).strip().splitlines() or ["see the log"])[0])


def report(rows: list[Row]) -> int:
    """Print the table and the line `ready` or `not ready`; return the exit status, 1 if a check failed."""
    table = Table("check", "result", "detail")
    for row in rows:
        table.add_row(row.name, "[green]ok[/]" if row.passed else "[red]failed[/]", Text(row.detail))
    Console().print(table)
    failed = [row for row in rows if not row.passed]
    others = f" ({len(failed) - 1} more in the table)" if len(failed) > 1 else ""
    print(f"not ready: {failed[0].name}: {failed[0].detail}{others}" if failed else "ready")
    return int(bool(failed))
