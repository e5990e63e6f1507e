"""The part `aware`: few bits after training and in training, and whether the engine keeps what training gained."""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Mapping
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

import fxopt
from benchmarks.fashion_mnist import FOLDER, Images, accuracy, images, train
from benchmarks.kept import kept
from benchmarks.quantize.trained import TRAINED
from benchmarks.results import Table, save, verdict_data, verdict_lines
from fxopt.passes import Quantize

__all__ = ["run", "verdicts"]

RECOVERED = 0.5
"""Of what rounding after training loses, the better of two: what training has to win back."""
APART = 0.001
"""In accuracy, the engine from the program that was trained."""

NEAREST, GPTQ, TRAINING, ENGINE = "after training, nearest", "after training, gptq", "qat", "qat, onnx engine"

Result = dict[str, Any]


def run(arguments: argparse.Namespace) -> bool:
    """Quantizes, trains, freezes, runs.

    Returns:
        whether every bar is met.
    """
    data, test = images("train", FOLDER), images("t10k", FOLDER).first(arguments.images)
    calibration = list(data.first(arguments.calibration).pixels.split(64))
    measured = {"network": arguments.trained, "bits": arguments.bits, "scales": arguments.scales}
    results: list[Result] = kept(arguments.out / "aware.json", measured, wanted=arguments.keep, key="results")
    for name in arguments.trained:
        model = TRAINED[name]()
        whole = accuracy(model, test)
        for bits, scales in product(arguments.bits, arguments.scales):
            options = {"weight_bits": bits, "per_channel": scales == "channel"}
            rows = _rows(model, options, calibration, data.first(arguments.training), test, arguments)
            training = {
                "calibration": arguments.calibration,
                "epochs": arguments.epochs,
                "images": arguments.training,
                "rate": arguments.rate,
                "test": arguments.images,
            }
            results.append(
                {"network": name, "bits": bits, "scales": scales, "float": whole, "training": training, "rows": rows}
            )
            # an epoch takes minutes: what is known is written
            _save(arguments, results)
    return all(met for _, met in verdicts(results))


def verdicts(results: list[Result]) -> list[tuple[str, bool]]:
    """Each bar in words with its numbers, and whether it is met."""
    found = []
    for result in results:
        rows, whole = result["rows"], result["float"]
        subject = _subject(result)
        lost, left = whole - max(rows[NEAREST], rows[GPTQ]), whole - rows[ENGINE]
        found.append(
            (
                f"{subject}: {100 * lost:.2f} points lost after training, {100 * left:.2f} with it; "
                f"bar {RECOVERED:.0%} won back",
                left <= (1 - RECOVERED) * max(lost, 0.0) + 1e-9,
            )
        )
        apart = abs(rows[ENGINE] - rows[TRAINING])
        found.append((f"{subject}: the engine {100 * apart:.2f} points from eager; bar 0.10", apart <= APART + 1e-9))
    return found


def _rows(
    model: nn.Module,
    weights: Mapping[str, Any],
    calibration: list[Tensor],
    data: Images,
    test: Images,
    arguments: argparse.Namespace,
) -> dict[str, float]:
    """The accuracy by how it was quantized."""
    example = (calibration[0][:2],)

    def quantized(**options: Any) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            passes = ["default", Quantize(**weights, **options)]
            return fxopt.optimize(model, example, passes, calibration=calibration).module

    rows = {NEAREST: accuracy(quantized(round="nearest"), test), GPTQ: accuracy(quantized(round="gptq"), test)}
    module = quantized(mode="qat").to(memory_format=torch.channels_last)
    teacher = copy.deepcopy(model).to(memory_format=torch.channels_last)
    train(module, data, epochs=arguments.epochs, rate=arguments.rate, teacher=teacher)
    rows[TRAINING] = accuracy(module, test)
    engine: Any = fxopt.compile(module, example, passes=["freeze_quantization"], backend="onnx")
    right = [int((engine(x).argmax(1) == y).sum()) for x, y in zip(*_batches(test), strict=True)]
    rows[ENGINE] = sum(right) / len(test)
    return rows


def _subject(result: Result) -> str:
    return f"{result['network']}, {result['bits']} bits, a scale for each {result['scales']}"


def _training(calibration: int, epochs: int, images: int, rate: float, test: int) -> str:
    trained = f"{epochs} epoch{'s' if epochs > 1 else ''} of {images} images, at a rate of {rate:g} at its highest"
    return f"{trained}; {calibration} images to calibrate on, {test} to test on"


def _batches(test: Images) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    return test.pixels.split(500), test.labels.split(500)


def _save(arguments: argparse.Namespace, results: list[Result]) -> None:
    bars = verdicts(results)
    table = Table(
        "Weights of few bits after training and in training, on Fashion-MNIST",
        ["network", "weight bits", "a scale for each", "quantized", "accuracy %"],
        [
            [result["network"], str(result["bits"]), result["scales"], name, f"{100 * share:.2f}"]
            for result in results
            for name, share in {"not": result["float"], **result["rows"]}.items()
        ],
        [
            *verdict_lines(bars),
            "qat: from what gptq gave, by SGD, to the probabilities of the float network; activations of 8 bits; "
            "eager, but for the engine",
            *(f"qat of {_subject(result)}: {_training(**result['training'])}" for result in results),
            "8 bits are 7 where the processor adds up products in 16 bits",
        ],
    )
    save(arguments.out / "aware.json", table, {"results": results, "bars": verdict_data(bars)})
