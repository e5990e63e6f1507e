"""The part `rounding`: weights to the nearest, by AdaRound and by GPTQ: all in 8 bits, and weights alone in 4."""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

import fxopt
from benchmarks.kept import kept
from benchmarks.quantize.measure import accuracy_of, fidelity, logits
from benchmarks.quantize.subjects import SUBJECTS, Subject
from benchmarks.results import Table, number_text, save, verdict_data, verdict_lines
from fxopt import Program
from fxopt.manager import PassManager
from fxopt.passes import Quantize
from fxopt.progress import progress
from fxopt.quantizers.layers import find_layers
from fxopt.quantizers.static import KERNELS
from fxopt.quantizers.weights import WeightRounding, round_weights

__all__ = ["run", "verdicts"]

ROUNDINGS = ("nearest", "adaround", "gptq")
SCHEMES: dict[str, dict[str, Any]] = {
    "W8A8": {"mode": "static", "equalize": "off"},
    "W4": {"mode": "weight_only", "weight_bits": 4},
}
_BLOCK = 32

Result = dict[str, Any]


def run(arguments: argparse.Namespace) -> bool:
    """Measures every network.

    Returns:
        whether every bar is met.
    """
    path = arguments.out / "rounding.json"
    results: list[Result] = kept(path, {"network": arguments.networks}, wanted=arguments.keep)
    with progress("rounding networks", len(arguments.networks), "networks") as advance:
        for name in arguments.networks:
            results.append(_measured(SUBJECTS[name](arguments)))
            # what takes hours must not be lost
            save(path, _table(results), {"bars": verdict_data(verdicts(results)), "networks": results})
            advance(1)
    return all(met for _, met in verdicts(results))


def verdicts(results: list[Result]) -> list[tuple[str, bool]]:
    """Each bar in words with its numbers, and whether it is met: data make rounding better."""
    found = []
    for result in results:
        for scheme in SCHEMES:
            rows = {row["round"]: row["sqnr_db"] for row in result["rows"] if row["scheme"] == scheme}
            for name in ("adaround", "gptq"):
                text = f"{result['network']}, {scheme}: {name} {rows[name]:.2f} dB, nearest {rows['nearest']:.2f}"
                found.append((text, rows[name] > rows["nearest"]))
    return found


def _measured(subject: Subject) -> Result:
    with torch.no_grad():
        expected = logits(subject.model, subject.test)
        program = fxopt.optimize(
            subject.model, subject.example(), ["default"], calibration=subject.batches(), on_no_match="ignore"
        )
        start = time.perf_counter()
        _round_all(program)
        seconds = time.perf_counter() - start
        rows = []
        for scheme, options in SCHEMES.items():
            for name in ROUNDINGS:
                quantized = PassManager([Quantize(round=name, **options)], verify="structure").run(program)  # type: ignore[arg-type]
                given = logits(quantized.module, subject.test)
                found = {**fidelity(expected, given), "accuracy": accuracy_of(given, subject)}
                rows.append({"scheme": scheme, "round": name, **found})
                print(f"{subject.name}: {rows[-1]}", flush=True)
    return {"network": subject.name, "accuracy": accuracy_of(expected, subject), "seconds": seconds, "rows": rows}


def _round_all(program: Program) -> None:
    """Rounds in all ways at once, as what layers read is the same; the passes find it."""
    layers = find_layers(program, KERNELS, ())
    for linear in (False, True):
        names = [
            [node.name for node in group] for group in layers.weights if (program.op(group[0]) == "linear") == linear
        ]
        whole = [WeightRounding(8, how, pairs=program.scheme.pairs) for how in ROUNDINGS]  # type: ignore[arg-type]
        alone = [WeightRounding(4, how, block=_BLOCK if linear else None) for how in ROUNDINGS]  # type: ignore[arg-type]
        if names:
            round_weights(program, names, [*whole, *alone])


def _table(results: list[Result]) -> Table:
    columns = ("network", "scheme", "rounding", "SQNR dB", "agreement", "accuracy %")
    rows = [
        [
            result["network"],
            row["scheme"],
            row["round"],
            number_text(row["sqnr_db"], digits=2),
            f"{row['agreement']:.3f}",
            "-" if row["accuracy"] is None else f"{100 * row['accuracy']:.2f}",
        ]
        for result in results
        for row in result["rows"]
    ]
    notes = [
        *verdict_lines(verdicts(results)),
        "W8A8: static, both 8 bits, channels not scaled; W4: weights alone in 4 bits, of linear layers in blocks of "
        "32, of convolutions one scale per output; simulated, on images that were not calibrated on, against the "
        "float network",
    ]
    return Table("rounding of weights", columns, rows, notes)
