"""A process of its own for one measurement: nothing that ran before it is in the memory, the caches or the threads.

`python -m benchmarks.prune_speed.child MODULE:FUNCTION ARGUMENTS FILE`: ARGUMENTS are JSON, what the function returns
is written to FILE as JSON.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.results import write_json
from benchmarks.sweep.pool import Job, run_jobs

SECONDS = 600.0
"""After which a measurement is killed."""


def in_child(function: str, **arguments: Any) -> dict[str, Any]:
    """What `package.module:function` returns in a new process; `{"failure": reason}` if it does not."""
    with tempfile.TemporaryDirectory(prefix="fxopt-child-") as folder:
        path = Path(folder) / "result.json"
        command = [sys.executable, "-m", "benchmarks.prune_speed.child", function, json.dumps(arguments), str(path)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        (outcome,) = run_jobs(
            [Job(function, command, SECONDS)], parallel=1, environment=lambda _: environment, on_start=lambda _: None
        )
        if outcome.returncode == 0:
            result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return result
    if outcome.returncode is None:
        return {"failure": f"still running after {SECONDS:g} s, killed"}
    last = (outcome.tail.strip() or "no output").splitlines()[-1]
    return {"failure": f"exit code {outcome.returncode}: {last}"}


def main(argv: list[str]) -> int:
    """Runs the function."""
    function, arguments, path = argv
    module, _, name = function.partition(":")
    write_json(Path(path), getattr(importlib.import_module(module), name)(**json.loads(arguments)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
