"""Whether gate="time" keeps its word: ONNX engines after the passes over single layers, against the whole network.

Each row is a network and a pass with gate="macs" or gate="time": the time of the engine over that of the whole one,
which took turns. With gate="time" no network may become slower beyond noise, nor with passes that leave the layers'
shapes as they are and have no gate. Weights and data are random: what is measured here does not depend on them.
"""

from __future__ import annotations

import argparse
import dataclasses
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import fxopt
from benchmarks.errors import BenchmarkError
from benchmarks.networks import Network, load_network
from benchmarks.results import RESULTS, Table, environment, write_json, write_text
from benchmarks.timing import Spread, interleave
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
SETTINGS = {
    "factorize_low_rank": "factorize_low_rank(ratio=0.7, whiten=False)",
    "substitute_depthwise_separable": "substitute_depthwise_separable(multiplier=2, max_error=None, fit='weights')",
    "substitute_inverted_residual": "substitute_inverted_residual(steps=0, max_error=1e9)",
    "cluster_weights": "cluster_weights",
    "prune_weights": "prune_weights",
}
"""What is run of each pass: all that it can do, whatever it loses."""
NOISE = 1.02
"""The time of a network over its own that may be noise."""
CALIBRATION = 4
"""Images."""


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
                # what takes hours must not be lost
                table, met = _table(rows)
                write_json(arguments.out, {"environment": environment(), "rows": rows, "met": met})
                write_text(arguments.out.with_suffix(".md"), table.markdown())
                advance(1)
    table.show()
    return int(not met)


def _table(rows: list[dict[str, Any]]) -> tuple[Table, bool]:
    """The table, and whether the bar is met."""
    held = [row for row in rows if row["gate"] != "macs" and row["ratio"] is not None]
    slower = [f"{row['network']}, {row['pass']}" for row in held if row["ratio"]["low"] > NOISE]
    notes = [
        f"{'MISSED' if slower else 'met'}: with gate=time, or without a gate, no network takes more than {NOISE} times "
        f"the time of the whole one (lower quartile){': ' + '; '.join(slower) if slower else ''}",
        "time: of the ONNX engine, one thread, over that of the whole network, median and quartiles of the rounds",
        "a dash: nothing was rewritten. seconds: of the pass, with all that it measures",
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
                str(len(row["skips"])),
                f"{row['macs']:.2f}",
                "-" if row["ratio"] is None else Spread(**row["ratio"]).text(),
                f"{row['seconds']:.0f}",
            ]
            for row in rows
        ],
        notes,
    )
    return table, not slower


def _rows(network: Network, spec: str, rounds: int) -> list[dict[str, Any]]:
    whole = _compiled(network, [])
    pass_ = make_pass(spec)
    gates = ("macs", "time") if hasattr(pass_, "gate") else ("none",)
    found: list[dict[str, Any]] = []
    engines: dict[str, Callable[[], object]] = {"whole": partial(whole, *network.inputs)}
    for gate in gates:
        wanted = pass_ if gate == "none" else dataclasses.replace(pass_, gate=gate)  # type: ignore[call-arg]
        compiled = _compiled(network, [wanted])
        report = compiled.report.passes[0]
        row = {
            "network": network.name,
            "pass": spec,
            "gate": gate,
            "rewrites": len(report.rewrites),
            "skips": [str(skip) for skip in report.skips],
            "macs": report.after.macs / report.before.macs,
            "ratio": None,
            "seconds": report.seconds,
        }
        found.append(row)
        if report.rewrites:
            engines[gate] = partial(compiled, *network.inputs)
    if len(engines) > 1:
        timings = interleave(engines, rounds=rounds, warmup=2)
        for row in found:
            if row["gate"] in engines:
                row["ratio"] = timings.ratio(row["gate"], "whole")._asdict()
    return found


def _compiled(network: Network, passes: list[Pass]) -> Compiled:
    data = [torch.randn(CALIBRATION, *network.inputs[0].shape[1:], generator=torch.Generator().manual_seed(0))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the weights are random: the outputs are far off
        return fxopt.compile(
            network.model,
            network.inputs,
            passes=[*passes, "default"],
            backend="onnx(num_threads=1)",
            calibration=data,
            verify="structure",
            on_no_match="ignore",
        )
