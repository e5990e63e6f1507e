"""Every backend against eager, and against its bare runtime: parity, latency, and pipelines of all passes.

parity: seven networks in four precisions on every backend, at two batch sizes, saved and loaded in a new process.
latency: fp32 and int8 at two batch sizes against bare ONNX Runtime, bare OpenVINO and bare torch.compile in turns.
pipelines: every pass that the project has, lowered to every backend.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.backends import latency, parity, pipelines
from benchmarks.backends.subjects import SUBJECTS
from benchmarks.results import RESULTS

_PARTS = {"parity": parity.run, "latency": latency.run, "pipelines": pipelines.run}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--part", nargs="+", choices=_PARTS, default=list(_PARTS), help="what to run")
    parser.add_argument("--networks", nargs="+", choices=SUBJECTS, default=list(SUBJECTS), metavar="NAME")
    parser.add_argument("--backends", nargs="+", choices=parity.BACKENDS, default=list(parity.BACKENDS), metavar="NAME")
    parser.add_argument("--precisions", nargs="+", choices=parity.PRECISIONS, default=list(parity.PRECISIONS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8], help="batch sizes (latency)")
    parser.add_argument("--rounds", type=int, default=20, help="of the timing, in turns (latency)")
    parser.add_argument("--threads", type=int, default=1, help="of every engine (latency)")
    parser.add_argument("--keep", action="store_true", help="keep rows that are not measured now (parity, latency)")
    parser.add_argument("--out", type=Path, default=RESULTS / "backends", help="folder of the results")


def run(arguments: argparse.Namespace) -> int:
    """Runs the parts one after the other; each is a table of its own.

    Returns:
        0 if all bars were met, else 1.
    """
    met = [_PARTS[part](arguments) for part in arguments.part]
    return int(not all(met))
