"""int8 by fxopt, ONNX Runtime, NNCF with OpenVINO and torchao: fidelity, accuracy, latency and size of each.

peers: all see the same calibration images in one run. SQNR and agreement compare the logits of other images with those
of the float network; latencies are ratios to its ONNX engine, taken in turns on one thread. Of the networks two are
trained (ResNet-14 on Fashion-MNIST, EfficientNet-Lite0 on ImageNet); the others have random weights. aware: weights of
few bits after training and in training. rounding: weights rounded to the nearest and with an eye on data. equalize: a
MobileNet whose channels have very different ranges.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.errors import BenchmarkError
from benchmarks.kept import kept
from benchmarks.quantize import aware, equalize, rounding
from benchmarks.quantize.engines import methods
from benchmarks.quantize.measure import measure
from benchmarks.quantize.subjects import SUBJECTS
from benchmarks.quantize.table import quantize_table, verdicts
from benchmarks.quantize.trained import TRAINED
from benchmarks.results import RESULTS, environment, verdict_data, write_json, write_text
from fxopt.progress import progress

PARTS = ("peers", "rounding", "aware", "equalize")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), help="what to run")
    parser.add_argument("--networks", nargs="+", default=list(SUBJECTS), choices=SUBJECTS, metavar="NAME")
    parser.add_argument("--methods", nargs="+", default=list(methods(inductor=False)), metavar="NAME")
    parser.add_argument("--crops", type=int, default=64, help="crops to calibrate on; of Fashion-MNIST x8")
    parser.add_argument("--test-crops", type=int, default=96, help="crops to test on")
    parser.add_argument("--images", type=int, default=10_000, help="test images of Fashion-MNIST")
    parser.add_argument("--rounds", type=int, default=30, help="of the timing, in turns")
    parser.add_argument("--inductor", action="store_true", help="compile torchao's networks (minutes) and time them")
    parser.add_argument("--calibration", type=int, default=512, help="images to calibrate on (aware, equalize)")
    parser.add_argument("--trained", nargs="+", default=list(TRAINED), choices=TRAINED, help="networks (aware)")
    parser.add_argument("--bits", nargs="+", type=int, default=[4], choices=(4, 8), help="of weights (aware)")
    parser.add_argument(
        "--scales", nargs="+", default=["channel", "tensor"], choices=("channel", "tensor"), help="of weights (aware)"
    )
    parser.add_argument("--training", type=int, default=60_000, help="training images of an epoch (aware)")
    parser.add_argument("--epochs", type=int, default=1, help="of training (aware)")
    parser.add_argument("--rate", type=float, default=0.002, help="of training, at its highest (aware)")
    parser.add_argument("--keep", action="store_true", help="keep results that are not measured now (all but equalize)")
    parser.add_argument("--out", type=Path, default=RESULTS / "quantize", help="folder of the results")


def run(arguments: argparse.Namespace) -> int:
    """Runs the parts one after the other; each is a table of its own.

    Returns:
        0 if all bars were met, else 1.
    """
    parts = {"peers": _peers, "rounding": rounding.run, "aware": aware.run, "equalize": equalize.run}
    met = [parts[part](arguments) for part in arguments.part]
    return int(not all(met))


def _peers(arguments: argparse.Namespace) -> bool:
    """Measures every method on every network; whether all bars were met."""
    makers = methods(inductor=arguments.inductor)
    unknown = sorted(set(arguments.methods) - set(makers))
    if unknown:
        raise BenchmarkError(f"no method {', '.join(unknown)}; there are {', '.join(makers)}")
    chosen = {name: makers[name] for name in arguments.methods}
    results = kept(arguments.out / "peers.json", {"network": arguments.networks}, wanted=arguments.keep)
    with progress("measuring networks", len(arguments.networks), "networks") as advance:
        for name in arguments.networks:
            results.append(measure(SUBJECTS[name](arguments), chosen, rounds=arguments.rounds))
            # what takes hours must not be lost
            table, bars = quantize_table(results), verdicts(results)
            data = {"environment": environment(), "bars": verdict_data(bars), "networks": results}
            write_json(arguments.out / "peers.json", data)
            write_text(arguments.out / "peers.md", table.markdown())
            advance(1)
    table.show()
    return all(met for _, met in bars)
