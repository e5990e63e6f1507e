"""Accuracy of a network pruned without training, by every criterion of fxopt and of Torch-Pruning, at equal MACs.

A ResNet-14 trained on Fashion-MNIST (`benchmarks/fashion_mnist.py`) is pruned to shares of its MACs. Accuracy is over
the test images: as pruned (raw), with BatchNorm statistics re-estimated on some training images, and after an epoch of
training; each step is the same code for both sides (`study.py`).

To keep the time down, all settings of a budget run a race over the first test images; the best of each side and what
both do by default are measured on all. Only a selection is trained. The results are
`benchmarks/results/prune_accuracy.json` and, as a table and a plot, `.md` and `.png`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Collection, Sequence
from fnmatch import fnmatch
from pathlib import Path

from benchmarks.errors import BenchmarkError
from benchmarks.fashion_mnist import CHECKPOINT, FOLDER, images, trained
from benchmarks.prune_accuracy import ours, peer
from benchmarks.prune_accuracy.plot import check_matplotlib, save_plot
from benchmarks.prune_accuracy.study import FXOPT, PEER, RATE, Network, Row, Setting, Study
from benchmarks.prune_accuracy.table import accuracy_table, best, to_json, verdicts, within_budget
from benchmarks.results import RESULTS, environment, write_json, write_text
from fxopt.progress import progress

_FINALISTS = 5  # of a side and budget, whose re-estimated accuracy is measured on all test images

_DEFAULTS = {FXOPT: (ours.DEFAULT, ours.PLAIN), PEER: (peer.PLAIN,)}
_PLAIN = {FXOPT: (ours.PLAIN,), PEER: (peer.PLAIN,)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="weights of the trained network")
    parser.add_argument("--data", type=Path, default=FOLDER, help="folder of the images")
    parser.add_argument("--out", type=Path, default=None, help="JSON file [benchmarks/results/prune_accuracy.json]")
    parser.add_argument("--budgets", type=_share, nargs="+", default=[0.7, 0.5, 0.3], help="shares of the MACs to keep")
    parser.add_argument("--settings", nargs="+", default=["*"], help="patterns of 'fxopt: l2, global' and the like")
    parser.add_argument("--calibration", type=int, default=2048, help="training images to re-estimate and rank with")
    parser.add_argument("--images", type=int, default=10_000, help="test images")
    parser.add_argument("--race", type=int, default=1000, help="test images that all settings are measured on")
    parser.add_argument("--finetune", choices=("all", "best", "none"), default="best", help="what to train")
    parser.add_argument(
        "--trained", type=int, default=2, help="with --finetune best: how many of each side, besides the plain l2"
    )
    parser.add_argument("--rate", type=float, default=RATE, help="the highest learning rate of the fine-tuning")
    parser.add_argument("--orders", type=int, default=3, help="of the images, that each network is fine-tuned with")
    parser.add_argument(
        "--quick", action="store_true", help="512 test images, 256 for calibration, no training, default options only"
    )


def run(arguments: argparse.Namespace) -> int:
    """Runs the budgets one after the other; what is known is written after each.

    Returns:
        0 if every bar is met, else 1.
    """
    if arguments.quick:
        quick = {"images": 512, "race": 256, "calibration": 256, "finetune": "none"}
        arguments = argparse.Namespace(**{**vars(arguments), **quick})
    check_matplotlib()
    start = time.perf_counter()
    study = Study(
        trained(arguments.checkpoint),
        images("train", arguments.data),
        images("t10k", arguments.data).first(arguments.images),
        calibration=arguments.calibration,
        race=arguments.race,
        rate=arguments.rate,
        orders=arguments.orders,
    )
    budgets = sorted(set(arguments.budgets), reverse=True)
    settings = _matching([*ours.fxopt_settings(study), *peer.peer_settings(study)], arguments.settings)
    if not settings:
        raise BenchmarkError(f"no setting matches {' '.join(arguments.settings)}")
    variants: list[Row] = []
    if not arguments.quick:
        middle = budgets[len(budgets) // 2]
        for family in peer.peer_variants(study):
            tried = _race(study, _matching(family, arguments.settings), middle)
            variants += tried
            settings += [row.setting for row in best(tried, PEER, 1)]
    rows: list[Row] = []
    out = arguments.out or RESULTS / "prune_accuracy.json"
    for budget in budgets:
        rows += _at_budget(study, settings, budget, finetune=arguments.finetune, trained=arguments.trained)
        table = accuracy_table(rows, study)
        data = to_json(rows, study, variants=variants, seconds=time.perf_counter() - start)
        write_json(out, {"environment": environment(), **data})
        write_text(out.with_suffix(".md"), table.markdown())
        save_plot(out.with_suffix(".png"), rows, study)
    table.show()
    return int(not all(verdict.met for verdict in verdicts(rows, study)))


def _at_budget(study: Study, settings: Sequence[Setting], budget: float, *, finetune: str, trained: int) -> list[Row]:
    """The race of all settings, then the finals of the best, then training."""
    rows = _race(study, settings, budget)
    finals, chosen = [], []
    for side, defaults in _DEFAULTS.items():
        named = _named(rows, side, defaults)
        of_side = [*best(rows, side, _FINALISTS), *named]
        _each(of_side, study.measure_reestimated, f"{side} at {budget:.0%}: all test images")
        # again, since the order on all images is another
        winners = best(within_budget(of_side), side, trained)
        finals += [*winners, *named]
        chosen += [*winners, *_named(rows, side, _PLAIN[side])]
    _each(finals, study.measure_raw, f"raw at {budget:.0%}: all test images")
    if finetune != "none":
        _each(rows if finetune == "all" else chosen, study.finetune, f"fine-tuning at {budget:.0%}")
    return rows


def _each(rows: Sequence[Row], measure: Callable[[Network], None], what: str) -> None:
    networks = [row.network for row in rows if row.network is not None]
    with progress(what, len(networks), "networks") as advance:
        for network in networks:
            measure(network)
            advance(1)


def _race(study: Study, settings: Sequence[Setting], budget: float) -> list[Row]:
    rows = []
    with progress(f"pruning to {budget:.0%} of the MACs", len(settings), "settings") as advance:
        for setting in settings:
            rows.append(study.race(setting, budget))
            advance(1)
    return rows


def _named(rows: Sequence[Row], side: str, names: Collection[str]) -> list[Row]:
    return [row for row in rows if row.setting.side == side and row.setting.name in names]


def _matching(settings: Sequence[Setting], patterns: Sequence[str]) -> list[Setting]:
    return [each for each in settings if any(fnmatch(str(each), pattern) for pattern in patterns)]


def _share(text: str) -> float:
    share = float(text)
    if not 0 < share < 1:
        raise argparse.ArgumentTypeError(f"a share between 0 and 1, not {text}")
    return share
