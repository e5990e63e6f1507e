"""substitute_depthwise_separable against the SVD of the weights and against random weights: outputs and accuracy.

On the ResNet-14 trained on Fashion-MNIST, all 3 x 3 convolutions but the first. layers: the share of the variance of
each layer's outputs that is kept, one layer substituted at a time, on test images. accuracy: all substituted, without
training, raw and with BatchNorm statistics re-estimated. finetune: after an epoch of training, the same for all.
EfficientNet-Lite0, the other trained network of the benchmarks, has no such convolution but its first.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fxopt
from benchmarks.fashion_mnist import CHECKPOINT, FOLDER, Images, accuracy, images, train, trained
from benchmarks.networks import reestimated
from benchmarks.numerics import count_macs
from benchmarks.prune_accuracy.study import RATE
from benchmarks.results import RESULTS, Table, save, verdict_data, verdict_lines
from fxopt.analysis.costs import macs_by_node
from fxopt.frontends.capture import capture
from fxopt.passes import SubstituteDepthwiseSeparable
from fxopt.passes_base import Plan
from fxopt.progress import progress

PARTS = ("layers", "accuracy", "finetune")
MULTIPLIERS = (1, 2)
MAX_ERRORS = (0.2, 0.1, 0.05)
KEPT_BAR = 0.10
"""What the fit to data keeps more than the SVD of the weights, of the outputs' variance, on average at T = 1."""
TRAINED_BAR = 0.015
"""What the fitted network is better than the one of random weights, after an epoch."""

RANDOM, WEIGHTS, DATA = "random", "SVD of the weights", "fxopt, data"
_LAYER_IMAGES = 256
_NOT_ON = (
    "EfficientNet-Lite0 is not in the table: it has no dense convolution of more than one place but its first, "
    "so there is nothing to substitute"
)

Row = dict[str, Any]


class Subject(NamedTuple):
    """The network and its data.

    Attributes:
        model: in evaluation mode.
        calibration: batches of training images.
        test: the test images.
        data: folder of the images.
    """

    model: nn.Module
    calibration: list[Tensor]
    test: Images
    data: Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), help="what to run")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="weights of the ResNet-14")
    parser.add_argument("--data", type=Path, default=FOLDER, help="folder of the Fashion-MNIST images")
    parser.add_argument("--calibration", type=int, default=2048, help="training images to look at")
    parser.add_argument("--images", type=int, default=10_000, help="test images")
    parser.add_argument("--trained", type=int, nargs="+", default=[1], help="multipliers of the networks to train")
    parser.add_argument("--training", type=int, default=60_000, help="training images of the epoch")
    parser.add_argument(
        "--out", type=Path, default=RESULTS / "substitute_depthwise_separable", help="folder of the results"
    )


def run(arguments: argparse.Namespace) -> int:
    """Runs the parts one after the other; each is a table of its own.

    Returns:
        0 if every bar is met, else 1.
    """
    pixels = images("train", arguments.data).first(arguments.calibration).pixels
    test = images("t10k", arguments.data).first(arguments.images)
    subject = Subject(trained(arguments.checkpoint), list(pixels.split(256)), test, arguments.data)
    parts = {"layers": _layers, "accuracy": _accuracy, "finetune": _finetune}
    met = [parts[part](subject, arguments) for part in arguments.part]
    return int(not all(met))


def _layers(subject: Subject, arguments: argparse.Namespace) -> bool:
    program = capture(subject.model, subject.calibration[0][:2], calibration=subject.calibration)
    pixels = subject.test.pixels[:_LAYER_IMAGES]
    known = program.analysis(macs_by_node)
    wanted: dict[str, Tensor] = {}
    rows: dict[tuple[str, int, str], Row] = {}
    settings = [(order, fit) for order in ("depthwise_first", "pointwise_first") for fit in ("weights", "data")]
    with progress("fitting", len(MULTIPLIERS) * len(settings), "settings") as advance:
        for multiplier in MULTIPLIERS:
            for order, fit in settings:
                pass_ = SubstituteDepthwiseSeparable(
                    multiplier=multiplier,
                    order=order,  # type: ignore[arg-type]
                    max_error=None,
                    fit=fit,  # type: ignore[arg-type]
                    ignore=("0",),
                )
                for rewrite in Plan.of(pass_, program).rewrites:
                    if "fit" in rewrite.params:
                        continue
                    path = str(program.node(rewrite.node).target)
                    changed = program.copy()
                    pass_.apply(changed, rewrite)
                    whole = known[rewrite.node]
                    row = rows.setdefault((path, multiplier, order), {"layer": path, "multiplier": multiplier})
                    row["order"] = order
                    row["macs"] = (sum(changed.analysis(macs_by_node).values()) - sum(known.values()) + whole) / whole
                    behind = path.replace("conv", "bn")
                    if path not in wanted:
                        wanted[path] = _behind(program.module, behind, pixels)
                    lost = wanted[path] - _behind(changed.module, behind, pixels)
                    row[fit] = 1 - _variance(lost) / _variance(wanted[path])
                advance(1)
    found = sorted(rows.values(), key=lambda row: (row["multiplier"], row["order"], row["layer"]))
    means: list[Row] = []
    for multiplier in MULTIPLIERS:
        for order in ("depthwise_first", "pointwise_first"):
            group = [row for row in found if (row["multiplier"], row["order"]) == (multiplier, order)]
            mean = {key: sum(row[key] for row in group) / len(group) for key in ("macs", "weights", "data")}
            means.append({"layer": "mean", "multiplier": multiplier, "order": order, **mean})
    verdicts = [
        (
            f"T = 1, {row['order'].replace('_', ' ')}: on average the fit to data keeps {100 * row['data']:.1f} %, "
            f"the SVD of the weights {100 * row['weights']:.1f} %; bar {100 * KEPT_BAR:.0f} points",
            row["data"] - row["weights"] >= KEPT_BAR,
        )
        for row in means
        if row["multiplier"] == 1
    ]
    table = Table(
        "Share of the variance of a layer's outputs that is kept: 3 x 3 convolutions of the ResNet-14",
        ["layer", "T", "order", "MACs", "SVD of the weights %", "fxopt, data %"],
        [
            [
                row["layer"],
                str(row["multiplier"]),
                row["order"].replace("_", " "),
                f"{row['macs']:.3f}",
                f"{100 * row['weights']:.1f}",
                f"{100 * row['data']:.1f}",
            ]
            for row in [*found, *means]
        ],
        [
            *verdict_lines(verdicts),
            f"measured behind the layer's BatchNorm on {len(pixels)} test images; fitted to "
            f"{sum(map(len, subject.calibration))} training images; one layer is substituted at a time",
            "MACs: of the layer, over its own",
            _NOT_ON,
        ],
    )
    save(arguments.out / "layers.json", table, {"rows": found, "means": means, "bars": verdict_data(verdicts)})
    return all(good for _, good in verdicts)


def _accuracy(subject: Subject, arguments: argparse.Namespace) -> bool:
    whole = accuracy(subject.model, subject.test)
    settings: dict[str, SubstituteDepthwiseSeparable] = {}
    for multiplier in MULTIPLIERS:
        settings[f"{WEIGHTS}, T = {multiplier}"] = _fixed(multiplier, "weights")
        settings[f"{DATA}, T = {multiplier}"] = _fixed(multiplier, "data")
    for error in MAX_ERRORS:
        settings[f"{DATA}, max_error = {error:g}"] = SubstituteDepthwiseSeparable(max_error=error, ignore=("0",))
    rows: list[Row] = []
    with progress("substituting", len(settings), "networks") as advance:
        for name, pass_ in settings.items():
            module, layers = _substituted(subject, pass_)
            named = {name: module}
            if name.startswith(WEIGHTS):
                named[name.replace(WEIGHTS, RANDOM)] = _randomised(module)
            for setting, network in named.items():
                row: Row = {"setting": setting, "layers": layers, "macs": _macs(subject, network)}
                row["raw"] = accuracy(network, subject.test)
                row["reestimated"] = accuracy(reestimated(network, subject.calibration), subject.test)
                rows.append(row)
            advance(1)
    table = Table(
        "Depthwise separable convolutions in a ResNet-14 on Fashion-MNIST, no training",
        ["setting", "layers", "MACs", "raw %", "re-estimated %"],
        [
            [
                row["setting"],
                str(row["layers"]),
                f"{row['macs']:.3f}",
                f"{100 * row['raw']:.2f}",
                f"{100 * row['reestimated']:.2f}",
            ]
            for row in rows
        ],
        [
            f"the whole network: {whole:.2%}; {len(subject.test)} test images",
            "T: for all 12 layers, depthwise first. max_error: multiplier and order of each layer are chosen by it",
            "layers: how many are substituted. MACs: of the network, over its own, by torch's flop counter",
            "random: layers of the same shape, initialised as torch does by default",
            "re-estimated: fxopt's reestimate_batch_norm for all, on "
            f"{sum(map(len, subject.calibration))} training images; fxopt fits to them",
            _NOT_ON,
        ],
    )
    save(arguments.out / "accuracy.json", table, {"accuracy": whole, "rows": rows})
    return True


def _finetune(subject: Subject, arguments: argparse.Namespace) -> bool:
    data = images("train", subject.data).first(arguments.training)
    whole = accuracy(subject.model, subject.test)
    rows: list[Row] = []
    with progress("training", 2 * len(arguments.trained), "networks") as advance:
        for multiplier in arguments.trained:
            for name in (RANDOM, DATA):
                module, _ = _substituted(subject, _fixed(multiplier, "data"))
                if name == RANDOM:
                    module = _randomised(module)
                module = reestimated(module, subject.calibration).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
                row: Row = {"multiplier": multiplier, "setting": name, "macs": _macs(subject, module)}
                row["before"] = accuracy(module, subject.test)
                train(module, data, epochs=1, rate=RATE)
                row["trained"] = accuracy(module, subject.test)
                rows.append(row)
                advance(1)
    verdicts = []
    for multiplier in arguments.trained:
        random, fitted = (row["trained"] for row in rows if row["multiplier"] == multiplier)
        verdicts.append(
            (
                f"T = {multiplier}: after an epoch {100 * fitted:.2f} % fitted, {100 * random:.2f} % from random "
                f"weights; bar {100 * TRAINED_BAR:g} points",
                fitted - random >= TRAINED_BAR,
            )
        )
    table = Table(
        "Depthwise separable convolutions in a ResNet-14 on Fashion-MNIST, after one epoch of training",
        ["T", "weights", "MACs", "before %", "trained %"],
        [
            [
                str(row["multiplier"]),
                row["setting"],
                f"{row['macs']:.3f}",
                f"{100 * row['before']:.2f}",
                f"{100 * row['trained']:.2f}",
            ]
            for row in rows
        ],
        [
            f"the whole network: {whole:.2%}; {len(subject.test)} test images, {len(data)} training images",
            *verdict_lines(verdicts),
            "MACs: of the network, over its own. before: BatchNorm statistics re-estimated for both",
            f"training: SGD as of benchmarks/fashion_mnist.py with a rate of {RATE:g}, as prune_accuracy trains",
            "random: layers of the same shape, initialised as torch does by default; all others as trained",
        ],
    )
    save(arguments.out / "finetune.json", table, {"accuracy": whole, "rows": rows, "bars": verdict_data(verdicts)})
    return all(good for _, good in verdicts)


def _fixed(multiplier: int, fit: Any) -> SubstituteDepthwiseSeparable:
    """One multiplier for all layers, in the usual order, so that all networks of it have the same shape."""
    return SubstituteDepthwiseSeparable(
        multiplier=multiplier, order="depthwise_first", max_error=None, fit=fit, ignore=("0",)
    )


def _substituted(subject: Subject, pass_: SubstituteDepthwiseSeparable) -> tuple[nn.Module, int]:
    """The network in evaluation mode, and the number of layers that were substituted."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = fxopt.optimize(
            subject.model,
            subject.calibration[0][:2],
            [pass_],
            calibration=subject.calibration,
            on_failure="raise",
            on_no_match="ignore",
        )
    rewrites = program.report.passes[-1].rewrites
    return program.module.eval(), sum("fit" not in rewrite.params for rewrite in rewrites)


def _randomised(module: nn.Module) -> nn.Module:
    """A copy of which the new layers have the weights that torch initialises such layers with."""
    module = copy.deepcopy(module)
    torch.manual_seed(0)
    layers: dict[str, Any] = dict(module.named_modules())
    for path, layer in layers.items():
        if path.endswith("_depthwise"):
            layer.reset_parameters()
            layers[path.removesuffix("_depthwise")].reset_parameters()
    return module


def _macs(subject: Subject, module: nn.Module) -> float:
    example = (subject.calibration[0][:2],)
    return count_macs(module, example) / count_macs(subject.model, example)


def _variance(value: Tensor) -> float:
    """Of all channels together."""
    return float(value.movedim(1, 0).flatten(1).double().var(1, correction=0).sum())


def _behind(module: nn.Module, path: str, pixels: Tensor) -> Tensor:
    """What the module at a path gives."""
    found: list[Tensor] = []
    handle = module.get_submodule(path).register_forward_hook(lambda _, __, output: found.append(output))
    with torch.no_grad():
        module(pixels)
    handle.remove()
    return found[0]
