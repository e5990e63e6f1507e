"""The table of a suite and its closing counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.prune_channels.row import (
    BARS,
    BRIEF,
    COLUMNS,
    LEAST_FALL,
    PEER,
    PEER_SECONDS,
    RATIO,
    cells,
    has_fallen,
    outcome,
    peer_outcome,
)
from benchmarks.results import Table, shorten


def prune_table(suite: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """The rows, and under them what the whole comes to."""
    return Table(f"prune_channels on {suite}", COLUMNS, [cells(row) for row in rows], notes(rows), BRIEF)


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Counts of models: in all, by outcome for fxopt and for Torch-Pruning, with MACs down as they should be."""
    ours = Counter(outcome(row)[0] for row in rows)
    theirs = Counter(peer_outcome(row.get(PEER, {}))[0] for row in rows)
    return {
        "models": len(rows),
        **{kind: ours[kind] for kind in ("ok", "refused", "wrong", "failed")},
        "MACs fell": sum(map(has_fallen, rows)),
        "torch-pruning ok": theirs["ok"],
        "torch-pruning failed": theirs["failed"],
    }


def notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The lines under the table."""
    counts = summary(rows)
    locked: Counter[str] = Counter()
    for row in rows:
        locked.update(row["stages"].get("prune", {}).get("left_alone", {}))
    failures = Counter(_kind(why) for row in rows if (why := peer_outcome(row.get(PEER, {}))[1]))
    lines = [
        f"fxopt: {counts['ok']} of {counts['models']} pruned, {counts['refused']} refused with a reason, "
        f"{counts['wrong']} wrong, {counts['failed']} failed; MACs fell by {LEAST_FALL:.0%} or more on "
        f"{counts['MACs fell']}",
        f"Torch-Pruning: {counts['torch-pruning ok']} of {counts['torch-pruning ok'] + counts['torch-pruning failed']} "
        "pruned" + "".join(f", {count} {why}" for why, count in failures.most_common()),
        f"PruneChannels(ratio={RATIO}); MACs and params over the model's own; analysis s: find_channels alone; "
        "pass s: plan, removal and checks",
        "exactness: the pruned program against the unpruned one whose layers do not hear the removed channels, in "
        f"float64, bar {BARS['exactness']:.0e}; engine: ONNX Runtime against the pruned program, "
        f"bar {BARS['engine']:.0e}; both max|a - b| / max|b|, the worse of batch 1 and 2",
        f"Torch-Pruning: BasePruner, GroupMagnitudeImportance, pruning_ratio={RATIO}, classifier ignored, "
        f"{PEER_SECONDS:.0f} s at most; it must run on both batch sizes with outputs of the model's shape",
        *(f"left alone {count}: {why}" for why, count in locked.most_common()),
    ]
    models: dict[str, list[str]] = {}
    for row in rows:
        kind, why = outcome(row)
        if kind != "ok" and why:
            models.setdefault(f"{kind}: {why}", []).append(row["model"])
    return [*lines, *(f"{', '.join(names)}: {shorten(text)}" for text, names in models.items())]


def _kind(why: str) -> str:
    """What several failures of Torch-Pruning have in common: the class of the error, or a few words."""
    if why.startswith("batch "):
        return "with a batch that does not run"
    return why.split(":", maxsplit=1)[0].split(" after ", maxsplit=1)[0]
