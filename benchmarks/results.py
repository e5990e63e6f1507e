"""Where results go and what they look like: one table, shown on the terminal and written as Markdown and JSON."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Table:
    """A titled table of text cells.

    Attributes:
        notes: lines under the table.
        brief: the columns that the terminal shows; None for all.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    brief: Sequence[str] | None = None

    def markdown(self) -> str:
        def line(cells: Sequence[str]) -> str:
            return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

        body = [line(row) for row in self.rows]
        head = [f"# {self.title}", "", line(self.columns), line(["---"] * len(self.columns))]
        notes = [f"- {note}" for note in self.notes]
        return "\n".join([*head, *body, "", *notes]).rstrip() + "\n"

    def show(self) -> None:
        """Prints it to the terminal."""
        from rich import box
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table as RichTable

        table = RichTable(title=escape(self.title), box=box.SIMPLE_HEAD, title_justify="left")
        shown = [index for index, column in enumerate(self.columns) if self.brief is None or column in self.brief]
        for index in shown:
            table.add_column(escape(self.columns[index]), overflow="fold")
        for row in self.rows:
            table.add_row(*(escape(row[index]) for index in shown))
        console = Console()
        if not console.is_terminal:
            console.width = 150  # of a log; 80 would fold every cell
        console.print(table)
        for note in self.notes:
            console.print(escape(note))


def verdict_lines(verdicts: Sequence[tuple[str, bool]]) -> list[str]:
    """Notes: each bar, and whether it is met."""
    return [f"{'met' if good else 'MISSED'}: {text}" for text, good in verdicts]


def verdict_data(verdicts: Sequence[tuple[str, bool]]) -> list[dict[str, Any]]:
    """The same as plain JSON."""
    return [{"bar": text, "met": good} for text, good in verdicts]


def shorten(text: str) -> str:
    """A cell of at most 300 characters: the JSON has the whole."""
    return text if len(text) <= 300 else f"{text[:297]}..."


def number_text(value: float | None, unit: float = 1.0, digits: int = 2) -> str:
    """A cell: a number in some unit."""
    return "-" if value is None else f"{value / unit:.{digits}f}"


def write_text(path: Path, text: str) -> None:
    """Writes a file so that a reader, or a killed writer, never leaves half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def write_json(path: Path, data: object) -> None:
    """Writes plain JSON; numbers must be finite."""
    write_text(path, json.dumps(data, indent=1, allow_nan=False) + "\n")


def save(path: Path, table: Table, data: Mapping[str, Any]) -> None:
    """Writes `path` (JSON: `data` and the environment) and the table as Markdown next to it; then shows the table."""
    write_json(path, {"environment": environment(), **data})
    write_text(path.with_suffix(".md"), table.markdown())
    table.show()


def environment() -> dict[str, Any]:
    """What the numbers depend on: versions, instruction set, threads, revision of the repository, date."""
    import torch

    libraries = ("torch", "torchvision", "timm", "onnx", "onnxruntime", "onnxscript")
    names = (*libraries, "torch-pruning", "nncf", "openvino", "torchao")
    versions = {name: version for name in names if (version := _version(name)) is not None}
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "revision": revision(),
        "versions": versions,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def revision() -> str | None:
    """The repository's commit, with `+` if its working tree differs; None outside a git checkout."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
