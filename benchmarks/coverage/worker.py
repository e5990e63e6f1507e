"""The process that takes one model through all stages: `python -m benchmarks.coverage.worker SUITE MODEL FILE`.

The row is written to FILE after every stage, so that what was reached before a crash or a kill is kept.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.coverage.numerics import seed
from benchmarks.coverage.row import Row
from benchmarks.coverage.stages import Stages
from benchmarks.results import revision, write_json
from benchmarks.suites import load_suite


def main() -> int:
    """Runs the stages until one fails that others build on; a stage's failure is a result, and the exit code is 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("suite")
    parser.add_argument("model")
    parser.add_argument("file", type=Path)
    parser.add_argument("--no-engine", action="store_true")
    arguments = parser.parse_args()
    stages = Stages(arguments.model, load_suite(arguments.suite))
    row: Row = {"model": arguments.model, "revision": revision(), "threads": torch.get_num_threads(), "stages": {}}
    order: dict[str, Callable[[], Mapping[str, Any]]] = {
        "build": stages.build,
        "capture": stages.capture,
        "fold_batch_norm": stages.fold_batch_norm,
        "default": stages.default,
    }
    if not arguments.no_engine:
        order["engine"] = stages.engine
    for name, stage in order.items():
        torch.manual_seed(seed(arguments.model))
        row["stages"][name] = result = _run(stage)
        if name == "build" and result["ok"]:
            row["params"], row["shapes"] = result["params"], result["shapes"]
        row["peak_rss"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        write_json(arguments.file, row)
        if not result["ok"] and name != "fold_batch_norm":  # which no later stage builds on
            break
    return 0


def _run(stage: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    start = time.perf_counter()
    try:
        result: dict[str, Any] = {"ok": True, "reason": None, **stage()}
    except Exception as error:  # noqa: BLE001 (any failure of any of hundreds of models is this row's result)
        result = {"ok": False, "reason": f"{type(error).__name__}: {error}"}
    result.setdefault("seconds", round(time.perf_counter() - start, 2))
    return result


if __name__ == "__main__":
    sys.exit(main())
