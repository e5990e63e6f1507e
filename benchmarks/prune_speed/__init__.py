"""prune_channels: speed of the pruned engine, peak memory, time of the analysis, and how well budgets are met.

Four parts, each a table of its own in `benchmarks/results/prune_speed/`; Torch-Pruning runs next to fxopt where it does
the same. Memory and time are measured in processes of their own.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.prune_speed import analysis, budget, memory, speed
from benchmarks.results import RESULTS, save

PARTS = {"speed": speed, "memory": memory, "analysis": analysis, "budget": budget}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    parser.add_argument(
        "--networks", nargs="+", default=None, metavar="NAME", help="torchvision:NAME, timm:NAME [each part's own]"
    )
    parser.add_argument("--size", type=int, default=None, help="height and width of the inputs [each network's own]")
    parser.add_argument("--rounds", type=int, default=25, help="rounds of part speed")
    parser.add_argument("--out", type=Path, default=None, help="folder [benchmarks/results/prune_speed]")


def run(arguments: argparse.Namespace) -> int:
    """Measures the chosen parts; each is written as soon as it is done.

    Returns:
        0 if every bar is met, else 1.
    """
    missed = []
    for name in arguments.part:
        part = PARTS[name]
        table, data, bad = part.measure_all(arguments.networks or part.NETWORKS, arguments)
        save((arguments.out or RESULTS / "prune_speed") / f"{name}.json", table, data)
        missed += bad
    return int(bool(missed))
