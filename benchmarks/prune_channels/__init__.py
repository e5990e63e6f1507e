"""prune_channels on every model of a suite: runs, exact, exports, smaller; Torch-Pruning on the same rows; resumable.

Each row takes two processes, one for fxopt and one for Torch-Pruning, so that neither can harm the other. The results
are `benchmarks/results/prune_channels_SUITE.json` and, as a table, `.md`.
"""

from __future__ import annotations

import argparse

from benchmarks.prune_channels.peer import PROCESS_SECONDS
from benchmarks.prune_channels.row import PEER, STAGES, peer_verdict, problems, verdict
from benchmarks.prune_channels.table import prune_table, summary
from benchmarks.sweep import Part, Sweep, add_sweep_arguments, run_sweep


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_sweep_arguments(parser, "prune_channels")
    parser.add_argument("--no-engine", action="store_true", help="do not export")
    parser.add_argument("--no-peer", action="store_true", help="do not run Torch-Pruning")


def run(arguments: argparse.Namespace) -> int:
    """Runs what is missing.

    Returns:
        0 if fxopt is wrong or fails on none of the chosen models, else 1.
    """
    names = STAGES[:-1] if arguments.no_engine else STAGES
    parts = [Part("", "benchmarks.prune_channels.stages:stages", names, arguments.timeout, problems, verdict)]
    if not arguments.no_peer:
        parts.append(
            Part(PEER, "benchmarks.prune_channels.peer:stages", [PEER], PROCESS_SECONDS, lambda _: [], peer_verdict)
        )
    return run_sweep(Sweep("prune_channels", parts, prune_table, summary), arguments)
