"""One model's results: the stages, what each must reach, and how the table shows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

BARS = {"capture": 1e-5, "fold_batch_norm": 1e-4, "default": 1e-4, "engine": 1e-3}
STAGES = ("build", *BARS)

# a miss is rounding if in float64 the two agree to this, about 1e6 roundings of float64
EXACT_FLOAT64 = 1e-9
# and, for an engine, which has no float64 twin, if it is within this factor of the model's own float32 noise
NOISE_FACTOR = 10.0

Row = dict[str, Any]
Stage = Mapping[str, Any]


def is_complete(row: Mapping[str, Any], *, engine: bool) -> bool:
    """Whether the row has what a run asks for: an end at a failure counts, a stage that was left out does not."""
    stages = row["stages"]
    if any(not stage["ok"] for stage in stages.values()):
        return True
    return all(stage in stages for stage in STAGES if engine or stage != "engine")


def problems(row: Mapping[str, Any]) -> list[str]:
    """What went wrong, a line each; a missed bar that is float32 rounding is not a problem."""
    return [f"{name}: {text}" for name, stage in row["stages"].items() if (text := stage_problem(name, stage))]


def stage_problem(name: str, stage: Stage) -> str | None:
    """What went wrong in one stage, or None."""
    if not stage["ok"]:
        return str(stage["reason"])
    texts = []
    missed = worst_error(stage)
    if missed is not None and missed > BARS[name] and not is_rounding(stage):
        texts.append(f"relative error {missed:.1e} over {BARS[name]:.0e} ({_judgement_text(stage)})")
    texts += [f"batch {batch}: {reason}" for batch, reason in stage.get("failures", {}).items()]
    if stage.get("foldable_left"):
        texts.append(f"foldable batch norms left: {', '.join(stage['foldable_left'])}")
    return "; ".join(texts) or None


def worst_error(stage: Stage) -> float | None:
    """The larger of the errors on the batch sizes; infinite if an output was not finite; None if none was measured."""
    errors = stage.get("errors", {}).values()
    return max((float("inf") if error is None else float(error) for error in errors), default=None)


def is_rounding(stage: Stage) -> bool:
    """Whether an error over the bar is the model amplifying float32 rounding, rather than a wrong graph."""
    judgement = stage.get("judgement")
    return bool(judgement and judgement["rounding"])


def has_rounding(row: Mapping[str, Any]) -> bool:
    """Whether some stage missed its bar by rounding."""
    return any(is_rounding(stage) for stage in row["stages"].values())


def _judgement_text(stage: Stage) -> str:
    judgement = stage.get("judgement")
    if judgement is None:
        return "not judged"
    own, exact = judgement["own_noise"], judgement["error_float64"]
    parts = [f"the model's own float32 noise {own:.1e}" if own is not None else "own noise unknown"]
    if exact is not None:
        parts.append(f"float64 error {exact:.1e}")
    if judgement["reason"]:
        parts.append(judgement["reason"])
    return ", ".join(parts)


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
        _number(row["params"], 1e6, 2),
        _number(capture.get("macs"), 1e9, 2),
        str(capture.get("frontend", "-")),
        _number(capture.get("seconds"), 1, 1),
        _error_cell("capture", stages.get("capture")),
        str(fold.get("before", "-")),
        str(fold.get("left", "-")),
        *(_error_cell(name, stages.get(name)) for name in ("fold_batch_norm", "default", "engine")),
        {True: "dynamic", False: "fixed", None: "-"}[engine.get("dynamic_batch")],
        _number(engine.get("bytes"), 1e6, 1),
        _number(row["seconds"], 1, 0),
        _number(row["peak_rss"], 1e9, 1),
        _result(row),
    ]


def _result(row: Mapping[str, Any]) -> str:
    found = problems(row)
    if found:
        return "; ".join(shorten(text) for text in found)
    return "ok (rounding)" if has_rounding(row) else "ok"


def shorten(text: str) -> str:
    """At most 300 characters: the JSON has the whole."""
    return text if len(text) <= 300 else f"{text[:297]}..."


def _error_cell(name: str, stage: Stage | None) -> str:
    if stage is None:
        return "-"
    if not stage["ok"]:
        return "failed"
    error = worst_error(stage)
    if error is None:
        return "-"
    return f"{error:.1e}{'' if error <= BARS[name] else ' ~' if is_rounding(stage) else ' !'}"


def _number(value: float | None, unit: float, digits: int) -> str:
    return "-" if value is None else f"{value / unit:.{digits}f}"
