"""One model's results: what fxopt and Torch-Pruning came to, and how the table shows it.

The outcome of fxopt is "ok", "refused" (an error of its own with a reason, or a plan that removes nothing), "wrong" (a
pruned program that does not run, or answers differently from what it must), or "failed" (anything else that should not
be: a rewrite that the manager had to roll back, another error, a crash, the time limit).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.results import number_text, shorten
from benchmarks.subject import error_cell, misses

RATIO = 0.3
LEAST_FALL = 0.3
"""Share by which MACs must fall, or the row names what is locked: layers shrink on both sides, so half is usual."""
PEER_SECONDS = 120.0
"""How long Torch-Pruning may take."""

BARS = {"exactness": 1e-5, "engine": 1e-3}
STAGES = ("build", "capture", "analysis", "prune", "exactness", "engine")
PEER = "torch_pruning"

_REFUSALS = ("CaptureError", "PassError", "InputError", "BackendError", "BackendUnavailable")


def outcome(row: Mapping[str, Any]) -> tuple[str, str]:
    """What fxopt came to, "ok", "refused", "wrong" or "failed", and why; ("", "") where it was not run."""
    stages = row["stages"]
    wrong = [f"{name}: {text}" for name, text in _wrong(stages)]
    if wrong:
        return "wrong", "; ".join(wrong)
    for name, stage in stages.items():
        if not stage["ok"]:
            kind = "refused" if stage["reason"].startswith(_REFUSALS) else "failed"
            return kind, f"{name}: {stage['reason']}"
    if "prune" not in stages:
        return "", ""
    if stages["prune"]["rolled_back"]:
        return "failed", "; ".join(stages["prune"]["rolled_back"])
    if not stages["prune"]["rewrites"]:
        return "refused", f"nothing is removed: {_left_alone(stages['prune'])}"
    if _fall(row) < LEAST_FALL:
        return "ok", f"MACs fall by {_fall(row):.0%}: {_left_alone(stages['prune'])}"
    return "ok", ""


def _wrong(stages: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    prune = stages.get("prune", {})
    for text in prune.get("failures", {}).items():
        yield "prune", "batch {}: {}".format(*text)
    if None in prune.get("errors", {}).values():
        yield "prune", "outputs that are not finite"
    for name, bar in BARS.items():
        for text in misses(stages.get(name, {}), bar):
            yield name, text


def problems(row: Mapping[str, Any]) -> list[str]:
    """What must not be: a wrong or failed model; a refusal is none."""
    kind, why = outcome(row)
    return [f"{kind}: {why}"] if kind in {"wrong", "failed"} else []


def verdict(row: Mapping[str, Any]) -> str:
    """What fxopt came to, in a line."""
    return ": ".join(filter(None, outcome(row)))


def peer_outcome(record: Mapping[str, Any]) -> tuple[str, str]:
    """What Torch-Pruning came to, "ok" or "failed", and why; ("", "") where it was not run."""
    stage = record.get("stages", {}).get(PEER)
    if stage is None:
        return "", ""
    if not stage["ok"]:
        return "failed", str(stage["reason"]).splitlines()[0]
    failures = [f"batch {batch}: {why}" for batch, why in stage.get("failures", {}).items()]
    if failures:
        return "failed", "; ".join(failures)
    if stage["macs"] >= stage["macs_before"]:
        return "failed", "removed nothing"
    return "ok", ""


def peer_verdict(record: Mapping[str, Any]) -> str:
    """What Torch-Pruning came to, in a line."""
    return ": ".join(filter(None, peer_outcome(record)))


def locked_reasons(reasons: Iterable[str]) -> dict[str, int]:
    """How many groups were left alone for each reason, whichever node it names."""
    counts: Counter[str] = Counter()
    for why in reasons:
        reason = why.split(": ", 1)[-1]
        reason = re.sub(r"\ball \d+ channels", "all channels", re.sub(r" at \w+", "", reason))
        counts[re.sub(r"\bhas \d+ channels", "has few channels", reason)] += 1
    return dict(counts.most_common())


def _left_alone(stage: Mapping[str, Any]) -> str:
    return ", ".join(f"{count} x {why}" for why, count in stage["left_alone"].items()) or "no group is locked"


def _fall(row: Mapping[str, Any]) -> float:
    """Share by which the MACs fell."""
    before: int = row["stages"]["capture"]["macs"]
    return 1 - row["stages"]["prune"]["macs"] / before if before else 0.0


def has_fallen(row: Mapping[str, Any]) -> bool:
    """Whether a pruned model's MACs fell as they should."""
    return outcome(row)[0] == "ok" and _fall(row) >= LEAST_FALL


COLUMNS: Sequence[str] = (
    "model",
    "kind",
    "fxopt",
    "MACs",
    "params",
    "exactness error",
    "engine error",
    "groups",
    "locked",
    "analysis s",
    "pass s",
    "Torch-Pruning",
    "its MACs",
    "its s",
)
BRIEF: Sequence[str] = tuple(name for name in COLUMNS if name not in {"kind", "params", "groups", "locked"})


def cells(row: Mapping[str, Any]) -> list[str]:
    """The row as text, one cell per entry of `COLUMNS`."""
    stages = row["stages"]
    capture, analysis, prune = (stages.get(name, {}) for name in ("capture", "analysis", "prune"))
    record = row.get(PEER, {})
    peer = record.get("stages", {}).get(PEER, {})
    return [
        row["model"],
        row["kind"],
        shorten(verdict(row)) or "-",
        _ratio(prune.get("macs"), capture.get("macs")),
        _ratio(prune.get("params"), capture.get("params")),
        *(error_cell(stages.get(name), bar) for name, bar in BARS.items()),
        str(analysis.get("groups", "-")),
        str(analysis.get("locked_groups", "-")),
        number_text(analysis.get("seconds")),
        number_text(prune.get("seconds"), digits=1),
        shorten(peer_verdict(record)) or "-",
        _ratio(peer.get("macs"), peer.get("macs_before")),
        number_text(peer.get("seconds"), digits=1),
    ]


def _ratio(after: float | None, before: float | None) -> str:
    return f"{after / before:.2f}" if after is not None and before else "-"
