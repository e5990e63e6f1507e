"""substitute_inverted_residual: initialised by regression against random initialisation, before and after training.

The ResNet-14 trained on Fashion-MNIST (`benchmarks/fashion_mnist.py`): its residual blocks become inverted residuals.
The same network with the weights of the new layers drawn at random, as MobileNetV2 is initialised, is measured beside
it: with BatchNorm statistics re-estimated, and after one epoch of fine-tuning by the recipe of `prune_accuracy`.
"""

from __future__ import annotations

import argparse
import copy
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fxopt
from benchmarks.fashion_mnist import CHECKPOINT, FOLDER, accuracy, images, train, trained
from benchmarks.networks import reestimated
from benchmarks.prune_accuracy.study import RATE
from benchmarks.results import RESULTS, Table, save, verdict_data, verdict_lines
from fxopt.passes import SubstituteInvertedResidual

REGRESSED, CLOSED_FORM, RANDOM = "regressed", "regressed, steps=0", "random"

_log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="weights of the ResNet-14")
    parser.add_argument("--data", type=Path, default=FOLDER, help="folder of the Fashion-MNIST images")
    parser.add_argument("--calibration", type=int, default=2048, help="training images to fit to")
    parser.add_argument("--training", type=int, default=60_000, help="training images of the epoch")
    parser.add_argument("--images", type=int, default=10_000, help="test images")
    parser.add_argument("--orders", type=int, default=1, help="of the training images, to take the mean over")
    parser.add_argument(
        "--out", type=Path, default=RESULTS / "substitute_inverted_residual.json", help="file of the results"
    )


def run(arguments: argparse.Namespace) -> int:
    """Substitutes, measures, trains, measures.

    Returns:
        0 if every bar is met, else 1.
    """
    model = trained(arguments.checkpoint)
    train_images, test = images("train", arguments.data), images("t10k", arguments.data).first(arguments.images)
    calibration = list(train_images.first(arguments.calibration).pixels.split(256))
    epoch = train_images.first(arguments.training)
    whole = fxopt.capture(model, calibration[0][:2])
    programs = {name: _substituted(model, calibration, steps) for name, steps in ((REGRESSED, 200), (CLOSED_FORM, 0))}
    report = programs[REGRESSED].report.passes[0]
    regressed = programs[REGRESSED].module.eval()
    modules = {
        REGRESSED: regressed,
        RANDOM: _drawn(regressed, model),
        CLOSED_FORM: programs[CLOSED_FORM].module.eval(),
    }
    cost = programs[REGRESSED].cost()
    rows: list[dict[str, Any]] = []
    for name, module in modules.items():
        adapted = reestimated(module, calibration)
        row: dict[str, Any] = {
            "initialisation": name,
            "raw": accuracy(module, test),
            "reestimated": accuracy(adapted, test),
            "trainings": [],
        }
        _log.info("%s", row)
        for order in range(arguments.orders if name != CLOSED_FORM else 0):
            twin = copy.deepcopy(adapted).to(memory_format=torch.channels_last)
            train(twin, epoch, epochs=1, rate=RATE, seed=order)
            row["trainings"].append(accuracy(twin, test))
        _log.info("%s", row)
        rows.append(row)
    found = {row["initialisation"]: row for row in rows}
    verdicts = [
        (f"{what}: {REGRESSED} {100 * ours:.2f} %, {RANDOM} {100 * theirs:.2f} %", ours > theirs)
        for what, ours, theirs in (
            ("re-estimated", found[REGRESSED]["reestimated"], found[RANDOM]["reestimated"]),
            ("after an epoch", _mean(found[REGRESSED]), _mean(found[RANDOM])),
        )
    ]
    before = whole.cost()
    share_macs, share_params = cost.macs / before.macs, cost.params / before.params
    table = Table(
        "Inverted residuals in the place of the blocks of a ResNet-14 on Fashion-MNIST",
        ["initialisation", "raw %", "re-estimated %", "after an epoch %"],
        [
            [
                row["initialisation"],
                *(f"{100 * row[key]:.2f}" for key in ("raw", "reestimated")),
                f"{100 * _mean(row):.2f}" if row["trainings"] else "-",
            ]
            for row in rows
        ],
        [
            f"the whole network: {accuracy(model, test):.2%}; {len(test)} test images",
            f"{len(report.rewrites)} blocks replaced: {share_macs:.1%} of MACs, {share_params:.1%} of parameters left",
            *map(str, report.rewrites),
            *(f"left alone: {skip}" for skip in report.skips),
            *verdict_lines(verdicts),
            f"re-estimated: reestimate_batch_norm for all, on the {arguments.calibration} training images fitted to",
            f"an epoch: {len(epoch)} images at a rate of {RATE:g}, mean over {arguments.orders} order(s) of them",
        ],
    )
    data = {
        "whole": accuracy(model, test),
        "macs": share_macs,
        "params": share_params,
        "blocks": [{"node": item.node, "what": item.what} for item in report.rewrites],
        "rows": rows,
        "bars": verdict_data(verdicts),
    }
    save(arguments.out, table, data)
    return int(not all(good for _, good in verdicts))


def _mean(row: dict[str, Any]) -> float:
    return float(sum(row["trainings"]) / len(row["trainings"]))


def _substituted(model: nn.Module, calibration: list[torch.Tensor], steps: int) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fxopt.optimize(
            model,
            calibration[0][:2],
            [SubstituteInvertedResidual(steps=steps, max_error=1.0)],
            calibration=calibration,
            on_failure="raise",
        )


def _drawn(substituted: nn.Module, model: nn.Module) -> nn.Module:
    """The same with all layers that the model does not have as MobileNetV2 initialises them."""
    torch.manual_seed(0)
    twin = copy.deepcopy(substituted)
    known = dict(model.named_modules())
    for path, module in twin.named_modules():
        if path not in known and isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
        elif path not in known and isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
    return twin.eval()
