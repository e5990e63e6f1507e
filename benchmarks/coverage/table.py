"""The table of a suite and its closing counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.coverage.row import (
    BARS,
    BRIEF,
    COLUMNS,
    cells,
    has_rounding,
    problems,
)
from benchmarks.results import Table, shorten
from benchmarks.subject import EXACT_FLOAT64, NOISE_FACTOR


def coverage_table(suite: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """The rows, and under them what the whole comes to."""
    return Table(f"Coverage of {suite}", COLUMNS, [cells(row) for row in rows], notes(rows), BRIEF)


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Counts of models: in all, each stage reached and passed, without a problem, with rounding over a bar."""
    counts = {"models": len(rows)}
    for stage in ("build", *BARS):
        done = [row["stages"][stage] for row in rows if stage in row["stages"]]
        counts[f"{stage} reached"] = len(done)
        counts[f"{stage} done"] = sum(each["ok"] for each in done)
    counts["dynamic batch"] = sum(bool(row["stages"].get("engine", {}).get("dynamic_batch")) for row in rows)
    counts["ok"] = sum(not problems(row) for row in rows)
    counts["ok by rounding"] = sum(not problems(row) and has_rounding(row) for row in rows)
    return counts


def notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The lines under the table."""
    counts = summary(rows)
    frontends = Counter(row["stages"].get("capture", {}).get("frontend") for row in rows)
    frontends.pop(None, None)
    folds = [row["stages"]["fold_batch_norm"] for row in rows if row["stages"].get("fold_batch_norm", {}).get("ok")]
    reasons: Counter[str] = Counter()
    for fold in folds:
        reasons.update(fold["skips"])
    lines = [
        f"{counts['ok']} of {counts['models']} models without a problem, "
        f"{counts['ok by rounding']} of them over a bar by float32 rounding alone",
        f"captured {counts['capture done']} ({', '.join(f'{name} {n}' for name, n in frontends.most_common())}), "
        f""
        f"engines {counts['engine done']} of {counts['engine reached']} tried, "
        f"{counts['dynamic batch']} with a dynamic batch",
        f"batch norms: {sum(fold['before'] for fold in folds)} before fold_batch_norm, "
        f"{sum(fold['left'] for fold in folds)} left, "
        f"{sum(len(fold['foldable_left']) for fold in folds)} of these foldable",
        *(f"left {count}: {why}" for why, count in reasons.most_common()),
        "errors are relative, max|a - b| / max|b| against the model, the worse of batch 1 and 2; bars: "
        + ", ".join(f"{name} {bar:.0e}" for name, bar in BARS.items()),
        f"`~` over the bar by rounding: the float64 twins agree to {EXACT_FLOAT64:.0e}, or the error is below the "
        f"difference between the model in float32 and in float64 (engine: within "
        f"{NOISE_FACTOR:.0f} times the difference between the model in float32 and in float64); `!` over the bar",
    ]
    models: dict[str, list[str]] = {}
    for row in rows:
        for text in problems(row):
            models.setdefault(text, []).append(row["model"])
    return [*lines, *(f"{', '.join(names)}: {shorten(text)}" for text, names in models.items())]
