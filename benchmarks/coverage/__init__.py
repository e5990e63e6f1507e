"""Capture, passes and engine on every model of a suite, each in a process of its own; resumable.

A rerun continues where the last one ended: models that have a row are not run again, unless `--retry-failed` or
`--fresh` asks for it. The results are `benchmarks/results/coverage_SUITE.json` and, as a table, `.md`.
"""

from __future__ import annotations

import argparse

from benchmarks.coverage.row import STAGES, problems, verdict
from benchmarks.coverage.table import coverage_table, summary
from benchmarks.sweep import Part, Sweep, add_sweep_arguments, run_sweep


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_sweep_arguments(parser, "coverage")
    parser.add_argument("--no-engine", action="store_true", help="stop after the passes")


def run(arguments: argparse.Namespace) -> int:
    """Runs what is missing.

    Returns:
        0 if no chosen model has a problem, else 1.
    """
    names = STAGES[:-1] if arguments.no_engine else STAGES
    part = Part("", "benchmarks.coverage.stages:stages", names, arguments.timeout, problems, verdict)
    return run_sweep(Sweep("coverage", [part], coverage_table, summary), arguments)
