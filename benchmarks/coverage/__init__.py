"""Capture, passes and engine on every model of a suite, each in a process of its own; resumable.

A rerun continues where the last one ended: models that have a row are not run again, unless `--retry-failed` or
`--fresh` asks for it. The results are `benchmarks/results/coverage_SUITE.json` and, as a table, `.md`.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.coverage.pool import Job, Outcome, run_jobs
from benchmarks.coverage.row import STAGES, Row, has_rounding, is_complete, problems
from benchmarks.coverage.table import coverage_table, summary
from benchmarks.errors import BenchmarkError
from benchmarks.results import RESULTS, environment, revision, save, write_json
from benchmarks.suites import SUITES, Entry, load_suite

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

ALONE_PARAMS = 150_000_000
"""Models with more parameters get the machine for themselves: several copies of the weights live at the same time."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--suite", required=True, help=f"{', '.join(SUITES)}, or package.module:Class")
    parser.add_argument("--models", nargs="+", default=["*"], metavar="GLOB", help="only models whose name matches one")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time; the cores are shared out among them")
    parser.add_argument("--timeout", type=float, default=1800.0, metavar="S", help="seconds for one model")
    parser.add_argument("--out", type=Path, default=None, help="JSON file [benchmarks/results/coverage_SUITE.json]")
    parser.add_argument("--retry-failed", action="store_true", help="run models again that had a problem")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results of the chosen models")
    parser.add_argument("--no-engine", action="store_true", help="stop after the passes")


def run(arguments: argparse.Namespace) -> int:
    """Runs what is missing.

    Returns:
        0 if no chosen model has a problem, else 1.
    """
    if arguments.jobs < 1:
        raise BenchmarkError(f"--jobs must be at least 1, not {arguments.jobs}")
    suite_name: str = arguments.suite
    entries = list(load_suite(suite_name).entries())
    chosen = [each for each in entries if any(fnmatch.fnmatch(each.name, glob) for glob in arguments.models)]
    if not chosen:
        raise BenchmarkError(f"no model of {suite_name} matches {' '.join(arguments.models)}; it has {_names(entries)}")
    path: Path = arguments.out or RESULTS / f"coverage_{suite_name.replace(':', '_')}.json"
    rows = _read(path)
    waiting = [
        each
        for each in chosen
        if arguments.fresh
        or each.name not in rows
        or not is_complete(rows[each.name], engine=not arguments.no_engine)
        or (arguments.retry_failed and problems(rows[each.name]))
    ]
    _run_missing(suite_name, waiting, rows, path, arguments)
    known = [rows[each.name] for each in entries if each.name in rows]
    save(path, coverage_table(suite_name, known), {"suite": suite_name, "summary": summary(known), "rows": known})
    return int(any(problems(rows[each.name]) for each in chosen))


def _run_missing(
    suite: str, entries: Sequence[Entry], rows: dict[str, Row], path: Path, arguments: argparse.Namespace
) -> None:
    by_name = {each.name: each for each in entries}
    threads = max(1, (os.cpu_count() or 1) // arguments.jobs)
    with tempfile.TemporaryDirectory(prefix="fxopt-coverage-") as folder, _Progress(len(entries)) as (progress, task):
        jobs = []
        for each in entries:
            row_path = Path(folder) / f"{each.name}.json"
            command = [sys.executable, "-m", "benchmarks.coverage.worker", suite, each.name, str(row_path)]
            jobs.append(Job(each.name, [*command, *(["--no-engine"] if arguments.no_engine else [])], _is_large(each)))

        def environment_of(job: Job) -> Mapping[str, str]:
            share = os.cpu_count() or 1 if job.alone else threads
            return {**os.environ, "OMP_NUM_THREADS": str(share), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}

        running: dict[str, float] = {}

        def started(job: Job) -> None:
            running[job.key] = time.monotonic()
            progress.update(task, description=" ".join(running))

        outcomes = run_jobs(
            jobs, parallel=arguments.jobs, timeout=arguments.timeout, environment=environment_of, on_start=started
        )
        for outcome in outcomes:
            name = outcome.job.key
            running.pop(name)
            rows[name] = _row_of(by_name[name], outcome, Path(folder) / f"{name}.json", arguments.timeout)
            write_json(path, {"environment": environment(), "suite": suite, "rows": list(rows.values())})
            progress.console.print(
                f"{name}: {_verdict(rows[name])} ({outcome.seconds:.0f} s)", highlight=False, markup=False
            )
            progress.update(task, advance=1, description=" ".join(running))


def _row_of(entry: Entry, outcome: Outcome, row_path: Path, timeout: float) -> Row:
    """What the worker wrote, completed if it did not reach its end."""
    row: Row = {"model": entry.name, "kind": entry.kind, "params": entry.params, "shapes": [], "stages": {}}
    if row_path.exists():
        row.update(json.loads(row_path.read_text(encoding="utf-8")))
    row.setdefault("revision", revision())
    row.setdefault("peak_rss", None)
    row["seconds"] = round(outcome.seconds, 2)
    if outcome.returncode != 0:
        stage = next((name for name in STAGES if name not in row["stages"]), "build")
        if outcome.returncode is None:
            reason = f"still running after {timeout:g} s, killed"
        elif outcome.returncode < 0:
            reason = f"killed by signal {-outcome.returncode}{' (out of memory?)' if outcome.returncode == -9 else ''}"
        else:
            last = outcome.tail.strip().splitlines()
            reason = f"exit code {outcome.returncode}: {last[-1] if last else 'no output'}"
        row["stages"][stage] = {"ok": False, "reason": reason, "tail": outcome.tail}
    return row


def _is_large(entry: Entry) -> bool:
    return entry.params > ALONE_PARAMS


def _verdict(row: Mapping[str, Any]) -> str:
    return "; ".join(problems(row)) or ("ok (rounding)" if has_rounding(row) else "ok")


def _names(entries: Sequence[Entry]) -> str:
    shown = ", ".join(each.name for each in entries[:8])
    return f"{shown}, ... ({len(entries)} in all)" if len(entries) > 8 else shown


def _read(path: Path) -> dict[str, Row]:
    if not path.exists():
        return {}
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        return {row["model"]: row for row in rows}
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise BenchmarkError(
            f"{path} does not hold coverage results ({error}); remove it or choose another --out"
        ) from error


class _Progress:
    """A progress bar over models; shows what runs."""

    def __init__(self, total: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self._progress = Progress(
            MofNCompleteColumn(), BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}")
        )
        self._task = self._progress.add_task("", total=total)

    def __enter__(self) -> tuple[Progress, TaskID]:
        self._progress.start()
        return self._progress, self._task

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
