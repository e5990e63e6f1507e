"""One model's results: the stages, what each must reach, and how the table shows it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.results import number_text, shorten
from benchmarks.subject import error_cell, is_rounding, misses

BARS = {"capture": 1e-5, "fold_batch_norm": 1e-4, "default": 1e-4, "engine": 1e-3}
STAGES = ("build", *BARS)


def problems(row: Mapping[str, Any]) -> list[str]:
    """What went wrong, a line each; a missed bar that is float32 rounding is not a problem."""
    return [f"{name}: {text}" for name, stage in row["stages"].items() if (text := stage_problem(name, stage))]


def stage_problem(name: str, stage: Mapping[str, Any]) -> str | None:
    """What went wrong in one stage, or None."""
    if not stage["ok"]:
        return str(stage["reason"])
    texts = misses(stage, BARS.get(name, math.inf))
    if stage.get("foldable_left"):
        texts.append(f"foldable batch norms left: {', '.join(stage['foldable_left'])}")
    return "; ".join(texts) or None


def has_rounding(row: Mapping[str, Any]) -> bool:
    """Whether some stage missed its bar by rounding."""
    return any(is_rounding(stage) for stage in row["stages"].values())


COLUMNS: Sequence[str] = (
    "model",
    "kind",
    "input",
    "params M",
    "MACs G",
    "frontend",
    "capture s",
    "capture error",
    "BN",
    "left",
    "fold error",
    "default error",
    "engine error",
    "batch",
    "engine MB",
    "total s",
    "RSS GB",
    "result",
)
BRIEF: Sequence[str] = (
    "model",
    "frontend",
    "capture error",
    "BN",
    "left",
    "fold error",
    "default error",
    "engine error",
    "batch",
    "total s",
)


def cells(row: Mapping[str, Any]) -> list[str]:
    """The row as text, one cell per entry of `COLUMNS`."""
    stages = row["stages"]
    capture, fold, engine = (stages.get(name, {}) for name in ("capture", "fold_batch_norm", "engine"))
    return [
        row["model"],
        row["kind"],
        " ".join("x".join(map(str, shape)) for shape in row["shapes"]),
        number_text(row["params"], 1e6, 2),
        number_text(capture.get("macs"), 1e9, 2),
        str(capture.get("frontend", "-")),
        number_text(capture.get("seconds"), 1, 1),
        error_cell(stages.get("capture"), BARS["capture"]),
        str(fold.get("before", "-")),
        str(fold.get("left", "-")),
        *(error_cell(stages.get(name), BARS[name]) for name in ("fold_batch_norm", "default", "engine")),
        {True: "dynamic", False: "fixed", None: "-"}[engine.get("dynamic_batch")],
        number_text(engine.get("bytes"), 1e6, 1),
        number_text(row["seconds"], 1, 0),
        number_text(row["peak_rss"], 1e9, 1),
        _result(row),
    ]


def verdict(row: Mapping[str, Any]) -> str:
    """The row in a few words."""
    return "; ".join(problems(row)) or ("ok (rounding)" if has_rounding(row) else "ok")


def _result(row: Mapping[str, Any]) -> str:
    found = problems(row)
    if found:
        return "; ".join(shorten(text) for text in found)
    return "ok (rounding)" if has_rounding(row) else "ok"
