"""What the passes did: rewrites, refusals with their reasons, cost before and after, and the error they introduced."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from fxopt.passes_base import Rewrite, Skip

if TYPE_CHECKING:
    from rich.console import Group

__all__ = ["Cost", "PassReport", "Report"]

_UNITS = ((10**9, "G"), (10**6, "M"), (10**3, "k"))


class Cost(NamedTuple):
    """What a program costs.

    Attributes:
        params: number of parameters.
        macs: multiply-accumulates at the example's sizes.
        bytes: of parameters and buffers.
    """

    params: int
    macs: int
    bytes: int


@dataclass
class PassReport:
    """What one pass did.

    Attributes:
        name: of the pass.
        config: its spec string.
        rewrites: what it changed.
        skips: what it left alone, with reasons; rewrites that failed a check and were rolled back are here too.
        seconds: time of planning, applying and verifying.
        before: cost before the pass.
        after: cost after it.
        max_abs_error: largest absolute difference of any output on the example inputs to the program before the pass;
            for exact passes, on random inputs too, to the captured program or what the last lossy pass left. None if
            not measured.
        sqnr_db: signal to quantization noise ratio of the outputs in decibel; infinite where nothing changed.
        notes: what else is worth knowing.
    """

    name: str
    config: str
    rewrites: list[Rewrite]
    skips: list[Skip]
    seconds: float
    before: Cost
    after: Cost
    max_abs_error: float | None = None
    sqnr_db: float | None = None
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; an infinite ratio is written as the string "inf"."""
        return {
            "name": self.name,
            "config": self.config,
            "rewrites": [rewrite._asdict() for rewrite in self.rewrites],
            "skips": [skip._asdict() for skip in self.skips],
            "seconds": self.seconds,
            "before": self.before._asdict(),
            "after": self.after._asdict(),
            "max_abs_error": _json_number(self.max_abs_error),
            "sqnr_db": _json_number(self.sqnr_db),
            "notes": list(self.notes),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PassReport:
        """Reads what `to_json` wrote."""
        return cls(
            name=data["name"],
            config=data["config"],
            rewrites=[Rewrite(**item) for item in data["rewrites"]],
            skips=[Skip(**item) for item in data["skips"]],
            seconds=data["seconds"],
            before=Cost(**data["before"]),
            after=Cost(**data["after"]),
            max_abs_error=_number(data["max_abs_error"]),
            sqnr_db=_number(data["sqnr_db"]),
            notes=list(data["notes"]),
        )


@dataclass
class Report:
    """What happened to a model between capture and engine.

    Attributes:
        passes: one `PassReport` per pass, in the order they ran.
        notes: what capture and lowering have to say (a fallback and its reason, a fixed batch, ...).
    """

    passes: list[PassReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def copy(self) -> Report:
        """An independent report with the same entries."""
        return Report(list(self.passes), list(self.notes))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, read by `from_json`."""
        return {"passes": [item.to_json() for item in self.passes], "notes": list(self.notes)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Report:
        """Reads what `to_json` wrote."""
        return cls([PassReport.from_json(item) for item in data["passes"]], list(data["notes"]))

    def __rich__(self) -> Group:
        from rich import box
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(title="fxopt report", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        longest = max((len(item.name) for item in self.passes), default=0)
        table.add_column("pass", overflow="fold", min_width=min(longest, 15))
        for heading in ("rewrites", "skips", "seconds", "params", "MACs", "bytes", "max error", "SQNR dB"):
            table.add_column(heading, justify="right")
        for item in self.passes:
            table.add_row(
                Text(item.config),
                str(len(item.rewrites)),
                str(len(item.skips)),
                f"{item.seconds:.2f}",
                _change(item.before.params, item.after.params),
                _change(item.before.macs, item.after.macs),
                _change(item.before.bytes, item.after.bytes),
                "-" if item.max_abs_error is None else f"{item.max_abs_error:.1e}",
                "-" if item.sqnr_db is None else f"{item.sqnr_db:.0f}",
            )
        lines = [f"{item.name} left alone {line}" for item in self.passes for line in _skip_lines(item.skips)]
        lines += [f"{item.name}: {note}" for item in self.passes for note in item.notes] + self.notes
        return Group(table, *(Text(f"- {line}") for line in lines))

    def __str__(self) -> str:
        from rich.console import Console

        stream = io.StringIO()
        Console(file=stream, width=120, no_color=True).print(self)
        return stream.getvalue().rstrip()

    def __repr__(self) -> str:
        return str(self)


def _skip_lines(skips: list[Skip]) -> list[str]:
    """One line per kind of reason: whole if it was given once, else with how often and the first node."""
    groups: dict[str, list[Skip]] = {}
    for skip in skips:
        groups.setdefault(skip.why.partition(": ")[0], []).append(skip)
    return [
        str(group[0]) if len(group) == 1 else f"{group[0].node} and {len(group) - 1} more: {kind}"
        for kind, group in sorted(groups.items(), key=lambda item: -len(item[1]))
    ]


def _change(before: int, after: int) -> str:
    """A count, or how it changed, in the unit that suits what it was."""
    unit, suffix = next(((size, name) for size, name in _UNITS if before >= size), (1, ""))
    old, new = (f"{count / unit:.2f}" if suffix else str(count) for count in (before, after))
    return new + suffix if before == after else f"{old} -> {new}{suffix}"


def _json_number(value: float | None) -> float | str | None:
    return value if value is None or math.isfinite(value) else str(value)


def _number(value: float | str | None) -> float | None:
    return None if value is None else float(value)
