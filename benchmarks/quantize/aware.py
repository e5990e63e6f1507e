"""The part `aware`: few bits after training and in training, and whether the engine keeps what training gained.

Of 10,000 images a network of four bits may lose five or so, fewer than chance moves from one training to the next: each
bar says how often equals differ as much. So the divergence of probabilities from those of the float network is measured
too (Kullback-Leibler, the mean over the test images): every image tells something of it.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable, Mapping
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

import fxopt
from benchmarks.fashion_mnist import FOLDER, Images, images, train
from benchmarks.kept import kept
from benchmarks.quantize.measure import logits
from benchmarks.quantize.table import sign_test
from benchmarks.quantize.trained import TRAINED
from benchmarks.results import Table, save, verdict_data, verdict_lines
from fxopt.passes import Quantize

__all__ = ["run", "verdicts"]

RECOVERED = 0.5
"""Of the accuracy that rounding after training loses, the better of two: what training has to win back."""
APART = 0.001
"""In accuracy, the engine from the program that was trained."""

FLOAT, NEAREST, GPTQ = "not", "after training, nearest", "after training, gptq"
TRAINING, ENGINE = "qat", "qat, onnx engine"

_ACCURACY, _DIVERGENCE, _LOST, _WON = "accuracy", "divergence", "lost", "won"

Result = dict[str, Any]
Row = dict[str, Any]


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
        expected = _answers(model, test)
        for bits, scales in product(arguments.bits, arguments.scales):
            options = {"weight_bits": bits, "per_channel": scales == "channel"}
            rows = _rows(model, options, calibration, data.first(arguments.training), test, expected, arguments)
            training = {
                "calibration": arguments.calibration,
                "epochs": arguments.epochs,
                "images": arguments.training,
                "rate": arguments.rate,
                "test": arguments.images,
            }
            results.append({"network": name, "bits": bits, "scales": scales, "training": training, "rows": rows})
            # an epoch takes minutes: what is known is written
            _save(arguments, results)
    return all(met for _, met in verdicts(results))


def verdicts(results: list[Result]) -> list[tuple[str, bool]]:
    """Each bar in words with its numbers, and whether it is met."""
    found = []
    for result in results:
        rows, subject = result["rows"], _subject(result)
        after = [rows[name] for name in (NEAREST, GPTQ)]
        best = max(after, key=lambda row: float(row[_ACCURACY]))
        lost, left = (rows[FLOAT][_ACCURACY] - row[_ACCURACY] for row in (best, rows[ENGINE]))
        found.append(
            (
                f"{subject}: {100 * lost:.2f} points lost after training (p {_chance(best):.2f}), "
                f"{100 * left:.2f} with it (p {_chance(rows[ENGINE]):.2f}); bar {RECOVERED:.0%} won back",
                left <= (1 - RECOVERED) * max(lost, 0.0) + 1e-9,
            )
        )
        before, now = min(row[_DIVERGENCE] for row in after), rows[ENGINE][_DIVERGENCE]
        found.append(
            (
                f"{subject}: divergence {1e3 * before:.2f} after training, {1e3 * now:.2f} with it; bar less",
                now < before,
            )
        )
        apart = abs(rows[ENGINE][_ACCURACY] - rows[TRAINING][_ACCURACY])
        found.append((f"{subject}: the engine {100 * apart:.2f} points from eager; bar 0.10", apart <= APART + 1e-9))
    return found


def _rows(
    model: nn.Module,
    weights: Mapping[str, Any],
    calibration: list[Tensor],
    data: Images,
    test: Images,
    expected: Tensor,
    arguments: argparse.Namespace,
) -> dict[str, Row]:
    """What is measured, by how it was quantized."""
    example = (calibration[0][:2],)

    def quantized(**options: Any) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            passes = ["default", Quantize(**weights, **options)]
            return fxopt.optimize(model, example, passes, calibration=calibration).module

    def measured(run: Callable[[Tensor], Tensor]) -> Row:
        return _row(expected, _answers(run, test), test)

    rows = {FLOAT: _row(expected, expected, test)}
    rows |= {NEAREST: measured(quantized(round="nearest")), GPTQ: measured(quantized(round="gptq"))}
    module = quantized(mode="qat").to(memory_format=torch.channels_last)
    teacher = copy.deepcopy(model).to(memory_format=torch.channels_last)
    train(module, data, epochs=arguments.epochs, rate=arguments.rate, teacher=teacher)
    rows[TRAINING] = measured(module)
    engine: Any = fxopt.compile(module, example, passes=["freeze_quantization"], backend="onnx")
    rows[ENGINE] = measured(engine)
    return rows


def _answers(run: Callable[[Tensor], Tensor], test: Images) -> Tensor:
    with torch.no_grad():
        return logits(run, test.pixels)


def _row(expected: Tensor, found: Tensor, test: Images) -> Row:
    """The accuracy, how far probabilities are from the expected ones in nats, and right answers lost and won."""
    known_right, right = (answers.argmax(1) == test.labels for answers in (expected, found))
    known, said = (answers.double().log_softmax(1) for answers in (expected, found))
    divergence = float((known.exp() * (known - said)).sum(1).mean())
    return {
        _ACCURACY: int(right.sum()) / len(test),
        _DIVERGENCE: divergence,
        _LOST: int((known_right & ~right).sum()),
        _WON: int((right & ~known_right).sum()),
    }


def _chance(row: Row) -> float:
    return sign_test(row[_LOST], row[_WON])


def _subject(result: Result) -> str:
    return f"{result['network']}, {result['bits']} bits, a scale for each {result['scales']}"


def _training(calibration: int, epochs: int, images: int, rate: float, test: int) -> str:
    trained = f"{epochs} epoch{'s' if epochs > 1 else ''} of {images} images, at a rate of {rate:g} at its highest"
    return f"{trained}; {calibration} images to calibrate on, {test} to test on"


def _save(arguments: argparse.Namespace, results: list[Result]) -> None:
    bars = verdicts(results)
    table = Table(
        "Weights of few bits after training and in training, on Fashion-MNIST",
        ["network", "weight bits", "a scale for each", "quantized", "accuracy %", "divergence, 1/1000 nat"],
        [
            [
                *(result["network"], str(result["bits"]), result["scales"], name),
                *(f"{100 * row[_ACCURACY]:.2f}", f"{1e3 * row[_DIVERGENCE]:.2f}"),
            ]
            for result in results
            for name, row in result["rows"].items()
        ],
        [
            *verdict_lines(bars),
            "qat: from what gptq gave, by SGD, to the probabilities of the float network; activations of 8 bits; "
            "eager, but for the engine",
            "p: how often an equally good network differs from the float one by as many answers (McNemar's exact test)",
            *(f"qat of {_subject(result)}: {_training(**result['training'])}" for result in results),
            "divergence (Kullback-Leibler) of the probabilities from those of the float network, the mean of images",
            "8 bits are 7 where the processor adds up products in 16 bits",
        ],
    )
    save(arguments.out / "aware.json", table, {"results": results, "bars": verdict_data(bars)})
