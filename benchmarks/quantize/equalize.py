"""The part `equalize`: channels made a hundred times as wide as their neighbours, and what int8 makes of that.

Inside each inverted residual of the trained MobileNet, channels are scaled between expansion, depthwise convolution and
projection. ReLU lets positive factors through, so what the float network answers does not change.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fxopt
from benchmarks.fashion_mnist import FOLDER, Images, accuracy, images, trained_mobilenet
from benchmarks.quantize.engines import PER_TENSOR, Files, Missing, float_engine, ort
from benchmarks.quantize.subjects import Subject
from benchmarks.results import Table, save, shorten, verdict_data, verdict_lines
from fxopt.nn import InvertedResidual
from fxopt.passes import Quantize

__all__ = ["run", "unequal", "verdicts"]

SPREAD = 10.0
"""Factors are log-uniform from one over this to this."""
PLAIN_LOSES = 0.2
OURS_LOSES = 0.01

UNEQUAL, PLAIN, OURS, PEER = (
    "float, unequal",
    "min-max, per tensor",
    "fxopt, equalize='auto'",
    "ORT min-max, per tensor",
)

_SETTINGS: dict[str, dict[str, Any]] = {
    PLAIN: {"observer": "minmax", "round": "nearest", "per_channel": False, "equalize": "off"},
    "min-max, per channel": {"observer": "minmax", "round": "nearest", "equalize": "off"},
    "fxopt, equalize='off'": {"equalize": "off"},
    "min-max, per tensor, equalize='auto'": {"observer": "minmax", "round": "nearest", "per_channel": False},
    OURS: {"equalize": "auto"},
}


def run(arguments: argparse.Namespace) -> bool:
    """Scales, quantizes, measures.

    Returns:
        whether every bar is met.
    """
    model = trained_mobilenet()
    test = images("t10k", FOLDER).first(arguments.images)
    seen = images("train", FOLDER).first(arguments.calibration).pixels
    scaled = unequal(model)
    rows: dict[str, float | str] = {"float": accuracy(model, test), UNEQUAL: accuracy(scaled, test)}
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        for name, options in _SETTINGS.items():
            rows[name] = _measured(lambda chosen=options: _quantized(scaled, seen, chosen), test)
        subject = Subject("mobilenet", scaled, seen, test.pixels, test.labels)
        rows[PEER] = _measured(lambda: _peer(subject, Path(folder)), test)
    bars = verdicts(rows)
    table = Table(
        "int8 of a MobileNet whose channels are unequal, on Fashion-MNIST",
        ["network", "accuracy %"],
        [[name, shorten(share) if isinstance(share, str) else f"{100 * share:.2f}"] for name, share in rows.items()],
        [
            *verdict_lines(bars),
            f"{len(test)} test images; {len(seen)} training images to calibrate on; nothing is trained",
            f"channels between the layers of a block scaled by factors log-uniform in [{1 / SPREAD:g}, {SPREAD:g}]",
            "the simulated program; the peer's file by ONNX Runtime",
        ],
    )
    save(arguments.out / "equalize.json", table, {"accuracy": rows, "bars": verdict_data(bars)})
    return all(met for _, met in bars)


def unequal(model: nn.Module, *, seed: int = 0) -> nn.Module:
    """A copy whose inverted residuals have channels of very different ranges, and which answers as the model does."""
    generator = torch.Generator().manual_seed(seed)
    twin = copy.deepcopy(model)
    for block in twin.modules():
        if isinstance(block, InvertedResidual) and block.expand_norm is not None:
            _scale(block.expand_norm, block.depthwise, generator)
            _scale(block.depthwise_norm, block.project, generator)
    return twin


def verdicts(rows: dict[str, float | str]) -> list[tuple[str, bool]]:
    """Each bar in words with its numbers, and whether it is met."""
    whole, found = rows[UNEQUAL], []
    assert isinstance(whole, float)
    moved = abs(whole - float(rows["float"]))
    found.append((f"the float network loses {100 * moved:.2f} points by its unequal channels; bar 0.05", moved <= 5e-4))
    for name, limit, more in ((PLAIN, PLAIN_LOSES, True), (OURS, OURS_LOSES, False)):
        share = rows[name]
        if isinstance(share, str):
            found.append((f"{name} failed: {shorten(share)}", False))
            continue
        lost = whole - share
        side = "more" if more else "less"
        found.append(
            (
                f"{name} loses {100 * lost:.2f} points; bar {side} than {100 * limit:g}",
                lost > limit if more else lost < limit,
            )
        )
    return found


def _scale(norm: nn.Module, reader: nn.Conv2d, generator: torch.Generator) -> None:
    """What a norm gives times some factors, and the weights that read it over them."""
    affine: Any = norm
    exponents = 2 * torch.rand(len(affine.weight), generator=generator) - 1
    factors = SPREAD**exponents
    with torch.no_grad():
        affine.weight.mul_(factors)
        affine.bias.mul_(factors)
        # a depthwise convolution has its channels along the first axis, a projection along the second
        axis = 0 if reader.groups > 1 else 1
        reader.weight.div_(factors.reshape([-1 if place == axis else 1 for place in range(4)]))


def _quantized(model: nn.Module, seen: Tensor, options: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    batches = list(seen.split(64))
    run: nn.Module = fxopt.optimize(model, (seen[:2],), ["default", Quantize(**options)], calibration=batches).module
    return run


def _peer(subject: Subject, folder: Path) -> Callable[[Tensor], Tensor]:
    (folder / "float").mkdir()
    _, path = float_engine(subject, folder / "float")
    (folder / "peer").mkdir()
    return ort(PER_TENSOR, subject, Files(path, folder / "peer")).run


def _measured(make: Callable[[], Callable[[Tensor], Tensor]], test: Images) -> float | str:
    """The accuracy of what is made, or why there is none."""
    try:
        run = make()
    except (Missing, TypeError, fxopt.FxoptError) as error:
        return f"{type(error).__name__}: {error}"
    with torch.no_grad():
        right = [
            int((run(x).argmax(1) == y).sum())
            for x, y in zip(test.pixels.split(500), test.labels.split(500), strict=True)
        ]
    return sum(right) / len(test)
