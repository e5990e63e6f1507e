"""What the command line shows: results on standard output, progress and messages on standard error."""

from __future__ import annotations

import inspect
import json
import logging
import math
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, Field, fields
from typing import Any, TextIO

import torch
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.status import Status
from rich.table import Table

__all__ = ["Output", "one_line", "options_of", "options_text", "summary_of", "summary_of_tensor"]

_REDIRECTED_WIDTH = 120  # characters, where there is no terminal to ask


class Output:
    """Both streams, and how much is said.

    Args:
        verbose: also show what the library logs at level INFO.
        debug: also show level DEBUG.
    """

    def __init__(self, *, verbose: bool = False, debug: bool = False) -> None:
        self._out = _console(sys.stdout)
        self._err = _console(sys.stderr)
        level = logging.DEBUG if debug else logging.INFO if verbose else logging.WARNING
        handler = RichHandler(level, console=self._err, show_time=False, show_path=debug)
        logging.basicConfig(level=logging.WARNING, handlers=[handler], format="%(message)s", force=True)
        # Progress listens at INFO whatever is shown; the handler's own level decides what is printed.
        logging.getLogger("fxopt").setLevel(min(level, logging.INFO))
        warnings.showwarning = self._show_warning

    def text(self, text: str) -> None:
        """Plain text, unwrapped and uncoloured: it may be piped into a file."""
        self._out.print(text, markup=False, highlight=False, soft_wrap=True)

    def show(self, renderable: object) -> None:
        """Anything that rich can show."""
        self._out.print(renderable)

    def json(self, data: Any) -> None:
        """Indented JSON."""
        self.text(json.dumps(data, indent=2))

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, title: str | None = None) -> None:
        """A table; cells are text, numbers or shapes."""
        table = Table(*columns, title=title, title_justify="left")
        for row in rows:
            table.add_row(*(escape(_cell(value)) for value in row))
        self._out.print(table)

    @contextmanager
    def progress(self, what: str) -> Iterator[None]:
        """Says what is going on while it lasts, with what the library logs as its latest step."""
        logger = logging.getLogger("fxopt")
        with self._err.status(f"{escape(what)} ...") as status:
            steps = _Steps(status, what)
            logger.addHandler(steps)
            try:
                yield
            finally:
                logger.removeHandler(steps)

    def _show_warning(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        self._err.print(f"[yellow]warning:[/] {escape(one_line(str(message)))}", highlight=False, soft_wrap=True)


def summary_of_tensor(name: str, tensor: torch.Tensor) -> dict[str, Any]:
    """Name, shape, element type, smallest, largest and mean value: plain JSON; a value that is not finite is text."""
    summary: dict[str, Any] = {
        "output": name,
        "shape": list(tensor.shape),
        "type": str(tensor.dtype).removeprefix("torch."),
    }
    if tensor.numel():
        values = tensor.detach().double()
        numbers = {"min": values.min().item(), "max": values.max().item(), "mean": values.mean().item()}
        summary |= {key: number if math.isfinite(number) else str(number) for key, number in numbers.items()}
    return summary


def options_of(kind: type[Any]) -> dict[str, str]:
    """Name and default of every option of a pass or backend class, as they are written in a spec."""
    return {
        item.name: "required" if item.default is MISSING and item.default_factory is MISSING else _default_text(item)
        for item in fields(kind)
        if item.init
    }


def _default_text(item: Field[Any]) -> str:
    return repr(item.default if item.default_factory is MISSING else item.default_factory())


def options_text(options: Mapping[str, str]) -> str:
    """What `options_of` gives, on one line."""
    return ", ".join(f"{name}={default}" for name, default in options.items())


def summary_of(kind: type[Any]) -> str:
    """The first sentence of the docstring."""
    return one_line((inspect.getdoc(kind) or "").partition("\n\n")[0])


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return "x".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def one_line(text: str) -> str:
    """The text with its line breaks and runs of blanks made single blanks."""
    return " ".join(text.split())


def _console(stream: TextIO) -> Console:
    return Console(file=stream, width=None if stream.isatty() else _REDIRECTED_WIDTH)


class _Steps(logging.Handler):
    """Shows the latest log record beside the spinner."""

    def __init__(self, status: Status, what: str) -> None:
        super().__init__(logging.INFO)
        self._status = status
        self._what = what

    def emit(self, record: logging.LogRecord) -> None:
        self._status.update(f"{escape(self._what)}: {escape(one_line(record.getMessage()))}")
