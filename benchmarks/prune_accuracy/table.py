"""Rows of all settings over the budgets; who is best; what the bars say."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from benchmarks.prune_accuracy import ours, peer
from benchmarks.prune_accuracy.study import FXOPT, PEER, Accuracy, Network, Row, Study
from benchmarks.results import Table, shorten

__all__ = ["Verdict", "accuracy_table", "best", "budgets_of", "measured_fully", "to_json", "verdicts", "within_budget"]

LOSS_BAR = 0.5
"""fxopt's loss of accuracy without training over Torch-Pruning's, the best setting of each, at most."""


class Verdict(NamedTuple):
    """A bar at a budget."""

    text: str
    met: bool


def best(rows: Sequence[Row], side: str, count: int) -> list[Row]:
    """The first rows of a side by re-estimated accuracy, each with another network."""
    found: dict[int, Row] = {}
    able = [row for row in rows if row.setting.side == side and row.network is not None]
    for row in sorted(able, key=lambda row: -_of(row).reestimated.share):
        found.setdefault(id(row.network), row)
    return list(found.values())[:count]


def measured_fully(rows: Sequence[Row], study: Study, budget: float) -> list[Row]:
    """The rows at a budget whose re-estimated accuracy is over all test images."""
    return [
        row
        for row in rows
        if row.budget == budget and row.network and row.network.reestimated.images == len(study.test)
    ]


def within_budget(rows: Sequence[Row]) -> list[Row]:
    """The rows with a network of no more MACs than the budget and a tolerance: what the bars are about."""
    return [row for row in rows if row.network and row.network.macs <= row.budget * (1 + peer.TOLERANCE)]


def budgets_of(rows: Sequence[Row]) -> list[float]:
    """The budgets that there are rows for, in their order."""
    return list(dict.fromkeys(row.budget for row in rows))


def verdicts(rows: Sequence[Row], study: Study) -> list[Verdict]:
    """The bars, as far as both sides have measurements for them."""
    found = []
    for budget in budgets_of(rows):
        full = within_budget(measured_fully(rows, study, budget))
        mine, theirs = best(full, FXOPT, 1), best(full, PEER, 1)
        if mine and theirs:
            losses = [study.accuracy - _of(row).reestimated.share for row in (*mine, *theirs)]
            found.append(
                Verdict(
                    f"{budget:.0%}, re-estimated: fxopt ({mine[0].setting.name}) loses {100 * losses[0]:.2f} points, "
                    f"Torch-Pruning ({theirs[0].setting.name}) {100 * losses[1]:.2f}; bar {LOSS_BAR:.0%} of that",
                    losses[0] <= LOSS_BAR * losses[1],
                )
            )
        trained = [max(_finetuned(full, side), default=None) for side in (FXOPT, PEER)]
        if trained[0] is not None and trained[1] is not None:
            found.append(
                Verdict(
                    f"{budget:.0%}, fine-tuned: fxopt {100 * trained[0]:.2f} %, "
                    f"Torch-Pruning {100 * trained[1]:.2f} %; bar: at least equal",
                    trained[0] >= trained[1],
                )
            )
    return found


def accuracy_table(rows: Sequence[Row], study: Study) -> Table:
    """One line per setting, in the order of the accuracies at the last budget: those over all images first."""
    budgets = budgets_of(rows)
    cells = {(row.setting.side, row.setting.name, row.budget): row for row in rows}
    names = list(dict.fromkeys((row.setting.side, row.setting.name) for row in rows))
    names.sort(key=lambda name: (name[0] != FXOPT, *_order(cells[(*name, budgets[-1])])))
    lines = [[*name, *(cell for budget in budgets for cell in _cells(cells[(*name, budget)], study))] for name in names]
    parts = ("MACs", "raw", "re-estimated", "fine-tuned")
    columns = ["side", "setting", *(f"{budget:.0%} {part}" for budget in budgets for part in parts)]
    brief = [column for column in columns if not column.endswith("MACs")]
    title = "Accuracy of a pruned ResNet-14 on Fashion-MNIST, in %"
    return Table(title, columns, lines, _notes(rows, study), brief)


def to_json(rows: Sequence[Row], study: Study, *, variants: Sequence[Row], seconds: float) -> dict[str, Any]:
    """All numbers; `variants` are the group norms of Torch-Pruning that were tried at one budget."""
    return {
        "accuracy": study.accuracy,
        "race_accuracy": study.race_accuracy,
        "race_images": study.raced,
        "test_images": len(study.test),
        "calibration_images": len(study.calibration),
        "rate": study.rate,
        "orders": study.orders,
        "seconds": round(seconds),
        "bars": [{"bar": verdict.text, "met": verdict.met} for verdict in verdicts(rows, study)],
        "rows": [row.to_json() for row in rows],
        "variants": [row.to_json() for row in variants],
    }


def _notes(rows: Sequence[Row], study: Study) -> list[str]:
    whole, race = (
        f"{count} ({100 * (study.accuracy * (1 - study.accuracy) / count) ** 0.5:.1f} points)"
        for count in (len(study.test), study.raced)
    )
    return [
        f"the unpruned network: {100 * study.accuracy:.2f} %",
        *(f"{'met' if verdict.met else 'MISSED'}: {verdict.text}" for verdict in verdicts(rows, study)),
        *_fares(rows, study),
        *_over(rows, study),
        "best is best-of on both sides, picked by the accuracy on the test images that is reported: it flatters both. "
        f"fxopt has {_count(rows, FXOPT)} settings in this table, Torch-Pruning {_count(rows, PEER)}",
        f"test images (standard error of an accuracy): {whole}; with ~ the first {race}, a race of all settings "
        "that the best of each side and the defaults went on from; moved by what the unpruned network's is off there",
        "MACs: over the unpruned network's, counted by torch's flop counter; Torch-Pruning's ratio is bisected until "
        f"they are the budget's; (!): no closer than {peer.TOLERANCE:.0%} can be had. The bars are about networks of "
        "the budget's MACs; what has more and is better than them is named above",
        f"re-estimated: fxopt's reestimate_batch_norm for both sides, on {len(study.calibration)} training images. "
        'Criteria that need data have the same, and with "data" fxopt fits to them the layers that read removed '
        "channels; classes are used by taylor, hessian and obdc alone",
        f"fine-tuned: from there one epoch of SGD, one-cycle rate up to {study.rate:g}; the mean over {study.orders} "
        "orders of the images, the same for all; those of a network have a standard deviation of "
        f"{100 * _deviation(rows):.2f} points",
        "Torch-Pruning: BasePruner in one step, default options, the classifier left whole. Its group norms also with "
        "other reductions and normalisers: of those, the best for each norm and scope at the middle budget is a row. "
        "Its BNScale, GroupNorm and GrowingReg pruners take sparse training and are left out",
        *(f"{row.setting}, {row.budget:.0%}: {shorten(row.failure)}" for row in rows if row.failure),
    ]


def _fares(rows: Sequence[Row], study: Study) -> list[str]:
    """How what fxopt does unasked compares with the best that Torch-Pruning has."""
    lines = []
    for budget in budgets_of(rows):
        full = within_budget(measured_fully(rows, study, budget))
        default = next((row for row in full if (row.setting.side, row.setting.name) == (FXOPT, ours.DEFAULT)), None)
        rival = best(full, PEER, 1)
        if default is not None and rival:
            loss, other = (100 * (study.accuracy - _of(row).reestimated.share) for row in (default, *rival))
            lines.append(
                f"{budget:.0%}, re-estimated: PruneChannels(macs={budget:g}) with calibration data and no other option "
                f"loses {loss:.2f} points, Torch-Pruning's best {other:.2f}"
            )
    return lines


def _over(rows: Sequence[Row], study: Study) -> list[str]:
    """What beats the best of its side, with more MACs than the budget."""
    lines = []
    for budget in budgets_of(rows):
        full = measured_fully(rows, study, budget)
        inside = within_budget(full)
        for row in full:
            if row in inside:
                continue
            rivals = [_of(each) for each in inside if each.setting.side == row.setting.side]
            for part, name in (("re-estimated", "reestimated"), ("fine-tuned", "finetuned")):
                mine, *others = (getattr(network, name) for network in (_of(row), *rivals))
                if mine is not None and all(other is None or other.share < mine.share for other in others):
                    lines.append(
                        f"{budget:.0%}, {part}, over the budget: {row.setting} {100 * mine.share:.2f} % with "
                        f"{_of(row).macs:.1%} of the MACs"
                    )
    return lines


def _deviation(rows: Sequence[Row]) -> float:
    """The standard deviation of accuracies after training from the same network, over all that were trained."""
    trained = {id(row.network): row.network.trainings for row in rows if row.network and len(row.network.trainings) > 1}
    variances = [statistics.variance(each.share for each in runs) for runs in trained.values()]
    return statistics.fmean(variances) ** 0.5 if variances else 0.0


def _cells(row: Row, study: Study) -> list[str]:
    network = row.network
    if network is None:
        return ["failed", "-", "-", "-"]
    off = abs(network.macs / row.budget - 1) > peer.TOLERANCE
    share = f"{100 * network.macs:.1f}{' (!)' if off else ''}"
    return [share, *(_cell(each, study) for each in (network.raw, network.reestimated, network.finetuned))]


def _cell(accuracy: Accuracy | None, study: Study) -> str:
    if accuracy is None:
        return "-"
    percent = 100 * study.comparable(accuracy)
    return f"~{percent:.1f}" if accuracy.images < len(study.test) else f"{percent:.2f}"


def _of(row: Row) -> Network:
    assert row.network is not None
    return row.network


def _finetuned(rows: Sequence[Row], side: str) -> list[float]:
    return [
        row.network.finetuned.share
        for row in rows
        if row.setting.side == side and row.network is not None and row.network.finetuned is not None
    ]


def _order(row: Row) -> tuple[int, float]:
    """Sorts the most images first, of as many the best first, and what failed last."""
    return (1, 0.0) if row.network is None else (-row.network.reestimated.images, -row.network.reestimated.share)


def _count(rows: Sequence[Row], side: str) -> int:
    return len({row.setting.name for row in rows if row.setting.side == side})
