"""Accuracy over MACs, without and with training: the best of each side bold, all settings faint."""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.errors import BenchmarkError
from benchmarks.prune_accuracy.study import FXOPT, PEER, Accuracy, Network, Row, Study
from benchmarks.prune_accuracy.table import budgets_of, measured_fully

__all__ = ["check_matplotlib", "save_plot"]

_COLOURS = {FXOPT: "tab:blue", PEER: "tab:orange"}
_MARKERS = {FXOPT: "o", PEER: "s"}
_ROOM = 8.0  # points of accuracy that are shown below the worse of the two best

Point = tuple[float, float]
"""MACs and accuracy, in %."""

Measure = Callable[[Network], Accuracy | None]


def check_matplotlib() -> None:
    """Says so at the beginning.

    Raises:
        BenchmarkError: if matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise BenchmarkError("the plot takes matplotlib: pip install -e '.[bench]'")


def save_plot(path: Path, rows: Sequence[Row], study: Study) -> None:
    """Writes the picture."""
    from matplotlib.figure import Figure

    path.parent.mkdir(parents=True, exist_ok=True)
    panels: dict[str, Measure] = {"no training, BatchNorm statistics re-estimated": lambda network: network.reestimated}
    if any(row.network is not None and row.network.finetuned is not None for row in rows):
        panels["after one epoch of fine-tuning"] = lambda network: network.finetuned
    figure = Figure(figsize=(5.6 * len(panels), 5.2), layout="constrained")
    figure.suptitle("ResNet-14 on Fashion-MNIST after channel pruning")
    for axes, (title, measure) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        _draw(axes, title, rows, study, measure)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(panels) + 1)
    figure.savefig(path, dpi=150)


def _draw(axes: Any, title: str, rows: Sequence[Row], study: Study, measure: Measure) -> None:
    whole: Point = (100.0, 100 * study.accuracy)
    tops = {side: _best(rows, side, study, measure) for side in _COLOURS}
    for (side, _), points in _by_setting(rows, study, measure).items():
        axes.plot(*_lines([whole, *points]), color=_COLOURS[side], alpha=0.2, linewidth=0.8)
    for side, points in tops.items():
        if points:
            style = {"color": _COLOURS[side], "marker": _MARKERS[side]}
            axes.plot(*_lines([whole, *points]), linewidth=2.5, label=f"{side}: best at each budget", **style)
    axes.axhline(whole[1], color="0.5", linestyle=":", linewidth=1, label=f"unpruned, {whole[1]:.2f} %")
    # faint settings may fall to chance, and would flatten the rest
    worst = min((y for points in tops.values() for _, y in points), default=whole[1])
    room = min(_ROOM, max(1.0, whole[1] - worst))
    axes.set_ylim(worst - room, whole[1] + 0.1 * (whole[1] - worst + room))
    axes.set_title(title)
    axes.set_xlabel("MACs left (% of the unpruned network)")
    axes.set_ylabel(f"accuracy on {len(study.test)} test images (%)")
    axes.grid(alpha=0.3)


def _best(rows: Sequence[Row], side: str, study: Study, measure: Measure) -> list[Point]:
    """The best at each budget of what was measured on all test images."""
    points = []
    for budget in budgets_of(rows):
        full = [row for row in measured_fully(rows, study, budget) if row.setting.side == side]
        found = [point for row in full if (point := _point(row, study, measure)) is not None]
        if found:
            points.append(max(found, key=lambda point: point[1]))
    return points


def _by_setting(rows: Sequence[Row], study: Study, measure: Measure) -> dict[tuple[str, str], list[Point]]:
    found: defaultdict[tuple[str, str], list[Point]] = defaultdict(list)
    for row in rows:
        point = _point(row, study, measure)
        if point is not None:
            found[row.setting.side, row.setting.name].append(point)
    return found


def _point(row: Row, study: Study, measure: Measure) -> Point | None:
    value = None if row.network is None else measure(row.network)
    return None if row.network is None or value is None else (100 * row.network.macs, 100 * study.comparable(value))


def _lines(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
