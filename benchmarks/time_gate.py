"""Whether gate="time" keeps its word: ONNX engines of every pass that has it, against the whole network, in turns.

Each row is a network and a pass with gate="macs" and with gate="time": the time of the engine over that of the whole
one. With gate="time" no network may become slower beyond noise. Weights are random, and calibration is not needed for
what is measured here.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import fxopt
from benchmarks.errors import BenchmarkError
from benchmarks.networks import Network, load_network
from benchmarks.results import RESULTS, Table, save
from benchmarks.timing import interleave
from fxopt import Compiled, Pass
from fxopt.progress import progress
from fxopt.registry import make_pass

NETWORKS = (
    "torchvision:resnet50",
    "torchvision:vgg16_bn",
    "torchvision:vit_b_16",
    "torchvision:mobilenet_v2",
    "torchvision:convnext_tiny",
)
SETTINGS = {"factorize_low_rank": "factorize_low_rank(ratio=0.7, whiten=False)"}
"""Of each pass with a gate: what is run here, without data."""
NOISE = 1.02
"""The time of a network over its own that may be noise."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), help="torchvision:NAME or timm:NAME")
    parser.add_argument("--passes", nargs="+", default=list(SETTINGS), help="names of passes")
    parser.add_argument("--rounds", type=int, default=20, help="of the timing, in turns")
    parser.add_argument("--out", type=Path, default=RESULTS / "time_gate.json", help="JSON file of the results")


def run(arguments: argparse.Namespace) -> int:
    """Measures every network with every pass.

    Returns:
        0 if no network became slower with gate="time", else 1.
    """
    unknown = sorted(set(arguments.passes) - set(SETTINGS))
    if unknown:
        raise BenchmarkError(f"no setting for {', '.join(unknown)}; there are {', '.join(SETTINGS)}")
    rows: list[dict[str, Any]] = []
    with progress("measuring networks", len(arguments.networks) * len(arguments.passes), "networks") as advance:
        for name in arguments.networks:
            network = load_network(name)
            for pass_name in arguments.passes:
                rows += _rows(network, SETTINGS[pass_name], arguments.rounds)
                advance(1)
    gated = [row for row in rows if row["gate"] == "time"]
    slower = [f"{row['network']}, {row['pass']}" for row in gated if row["ratio"]["low"] > NOISE]
    notes = [
        f"{'MISSED' if slower else 'met'}: with gate=time no network is slower than {NOISE} times the whole one "
        f"(lower quartile){': ' + '; '.join(slower) if slower else ''}",
        "time: of the ONNX engine, one thread, over that of the whole network, median and quartiles of the rounds",
        "seconds: of the pass, with all that it measures",
    ]
    table = Table(
        "Passes with gate=macs and gate=time",
        ["network", "pass", "gate", "rewrites", "left alone", "MACs", "time", "seconds"],
        [
            [
                row["network"],
                row["pass"],
                row["gate"],
                str(row["rewrites"]),
                str(row["skips"]),
                f"{row['macs']:.2f}",
                f"{row['ratio']['median']:.3f} [{row['ratio']['low']:.3f}, {row['ratio']['high']:.3f}]",
                f"{row['seconds']:.0f}",
            ]
            for row in rows
        ],
        notes,
    )
    save(arguments.out, table, {"rows": rows, "bars": [{"bar": notes[0], "met": not slower}]})
    return int(bool(slower))


def _rows(network: Network, spec: str, rounds: int) -> list[dict[str, Any]]:
    engines: dict[str, Compiled] = {"whole": _compiled(network, [])}
    seconds = {}
    for gate in ("macs", "time"):
        started = time.perf_counter()
        engines[gate] = _compiled(network, [dataclasses.replace(make_pass(spec), gate=gate)])
        seconds[gate] = time.perf_counter() - started
    turns: dict[str, Callable[[], object]] = {
        name: partial(engine, *network.inputs) for name, engine in engines.items()
    }
    timings = interleave(turns, rounds=rounds, warmup=2)
    found = []
    for gate in ("macs", "time"):
        report = engines[gate].report.passes[0]
        found.append(
            {
                "network": network.name,
                "pass": spec,
                "gate": gate,
                "rewrites": len(report.rewrites),
                "skips": len(report.skips),
                "macs": report.after.macs / report.before.macs,
                "ratio": timings.ratio(gate, "whole")._asdict(),
                "seconds": seconds[gate],
            }
        )
    return found


def _compiled(network: Network, passes: list[Pass]) -> Compiled:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the weights are random: the outputs are far off
        return fxopt.compile(
            network.model,
            network.inputs,
            passes=[*passes, "default"],
            backend="onnx(num_threads=1)",
            verify="structure",
        )
