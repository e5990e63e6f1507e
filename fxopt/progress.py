"""Tells how far long work has come: to whoever listens to the log at INFO, else as a bar on the terminal.

The command line listens, and shows the latest record beside its spinner. In a script on a terminal a bar appears on
standard error once the work has lasted a moment, and goes when it ends. Nothing is shown anywhere else.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["progress"]

_log = logging.getLogger(__name__)

_PATIENCE = 1.0  # seconds between two records, and before the bar appears


@contextmanager
def progress(what: str, total: int, unit: str = "batches") -> Iterator[Callable[[float], None]]:
    """Follows some work; call what it gives with the amount done since the last call.

    Args:
        what: what is going on, for people.
        total: the amount of work, in units; 0 if it is not known.
        unit: what is counted, in the plural.
    """
    state = _State(what, total, unit)
    try:
        yield state.advance
    finally:
        state.close()


class _State:
    def __init__(self, what: str, total: int, unit: str) -> None:
        self._what, self._total, self._unit = what, total, unit
        self._done = 0.0
        self._due = time.monotonic() + _PATIENCE
        self._bar: Progress | None = None

    def advance(self, amount: float) -> None:
        self._done += amount
        if self._bar is not None:
            self._bar.advance(self._bar.task_ids[0], amount)
        elif time.monotonic() >= self._due:
            self._due = time.monotonic() + _PATIENCE
            self._show()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _show(self) -> None:
        if _log.isEnabledFor(logging.INFO):
            whole = f" of {self._total}" if self._total else ""
            _log.info("%s: %d%s %s", self._what, int(self._done), whole, self._unit)
        elif sys.stderr.isatty():
            self._bar = _terminal_bar()
            task = self._bar.add_task(self._what, total=self._total or None, unit=self._unit)
            self._bar.advance(task, self._done)
            self._bar.start()


def _terminal_bar() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.completed:.0f} {task.fields[unit]}"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(file=sys.stderr), transient=True)
