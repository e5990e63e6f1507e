"""The process that takes one model through stages: `python -m benchmarks.sweep.worker STAGES SUITE MODEL FILE NAME...`.

STAGES is `package.module:function`; the function gets the model's name and the suite and returns the stages by name, of
which those of the NAMEs are run. The record is written to FILE after every stage, so that what was reached before a
crash or a kill is kept.
"""

from __future__ import annotations

import argparse
import importlib
import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.numerics import seed
from benchmarks.results import revision, write_json
from benchmarks.suites import load_suite


class Stage(NamedTuple):
    """A step of a model's way.

    Attributes:
        run: returns what it measured, as JSON; raises if it failed.
        needed: whether later stages build on it.
    """

    run: Callable[[], Mapping[str, Any]]
    needed: bool = True


def main() -> int:
    """Runs the stages until one fails that others build on; a stage's failure is a result, and the exit code is 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("stages")
    parser.add_argument("suite")
    parser.add_argument("model")
    parser.add_argument("file", type=Path)
    parser.add_argument("names", nargs="+", metavar="NAME")
    arguments = parser.parse_args()
    module, _, function = arguments.stages.partition(":")
    stages: Mapping[str, Stage] = getattr(importlib.import_module(module), function)(
        arguments.model, load_suite(arguments.suite)
    )
    record: dict[str, Any] = {"revision": revision(), "threads": torch.get_num_threads(), "stages": {}}
    for name in arguments.names:
        torch.manual_seed(seed(arguments.model))
        record["stages"][name] = result = _run(stages[name])
        record["peak_rss"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        write_json(arguments.file, record)
        if not result["ok"] and stages[name].needed:
            break
    return 0


def _run(stage: Stage) -> dict[str, Any]:
    start = time.perf_counter()
    try:
        result: dict[str, Any] = {"ok": True, "reason": None, **stage.run()}
    except Exception as error:  # noqa: BLE001 (any failure of any of hundreds of models is this row's result)
        result = {"ok": False, "reason": f"{type(error).__name__}: {error}"}
    result.setdefault("seconds", round(time.perf_counter() - start, 2))
    return result


if __name__ == "__main__":
    sys.exit(main())
