"""What benchmarks over a whole suite share: a row per model, each made in processes of its own; resumable.

A rerun continues where the last one ended: what a row holds is not run again, unless `--retry-failed` or `--fresh` asks
for it. The results are `benchmarks/results/NAME_SUITE.json` and, as a table, `.md`.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.errors import BenchmarkError
from benchmarks.results import RESULTS, Table, environment, revision, save, write_json
from benchmarks.suites import SUITES, Entry, load_suite
from benchmarks.sweep.pool import Job, Outcome, run_jobs

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

__all__ = ["Part", "Row", "Sweep", "add_sweep_arguments", "run_sweep"]

ALONE_PARAMS = 150_000_000
"""Models with more parameters get the machine for themselves: several copies of the weights live at the same time."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """What one process does for a row.

    Attributes:
        key: where its record goes in the row; "" for the row itself.
        stages: gives the stages, "package.module:function"; see `worker`.
        names: of the stages to run, in order.
        timeout: seconds for the process.
        problems: what is wrong in its record, a line each.
        verdict: its record in a few words.
    """

    key: str
    stages: str
    names: Sequence[str]
    timeout: float
    problems: Callable[[Mapping[str, Any]], list[str]]
    verdict: Callable[[Mapping[str, Any]], str]

    def record(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """Its record in a row; without stages if there is none yet."""
        return row.get(self.key, {"stages": {}}) if self.key else row

    def is_complete(self, row: Mapping[str, Any]) -> bool:
        """Whether a row has what is asked for: an end at a failure counts, a stage that was left out does not."""
        stages = self.record(row)["stages"]
        return any(not stage["ok"] for stage in stages.values()) or all(name in stages for name in self.names)


@dataclass(frozen=True)
class Sweep:
    """A benchmark over a suite.

    Attributes:
        name: of its files.
        parts: the processes for each row.
        table: the table of a suite's rows.
        summary: counts over the rows, for the JSON.
    """

    name: str
    parts: Sequence[Part]
    table: Callable[[str, Sequence[Row]], Table]
    summary: Callable[[Sequence[Row]], Mapping[str, Any]]


def add_sweep_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """The options of every benchmark over a suite."""
    parser.add_argument("--suite", required=True, help=f"{', '.join(SUITES)}, or package.module:Class")
    parser.add_argument("--models", nargs="+", default=["*"], metavar="GLOB", help="only models whose name matches one")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time; the cores are shared out among them")
    parser.add_argument("--timeout", type=float, default=1800.0, metavar="S", help="seconds for one model")
    parser.add_argument("--out", type=Path, default=None, help=f"JSON file [benchmarks/results/{name}_SUITE.json]")
    parser.add_argument("--retry-failed", action="store_true", help="run models again that had a problem")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results of the chosen models")


def run_sweep(sweep: Sweep, arguments: argparse.Namespace) -> int:
    """Runs what is missing.

    Returns:
        0 if no chosen model has a problem, else 1.
    """
    if arguments.jobs < 1:
        raise BenchmarkError(f"--jobs must be at least 1, not {arguments.jobs}")
    suite: str = arguments.suite
    entries = list(load_suite(suite).entries())
    chosen = [each for each in entries if any(fnmatch.fnmatch(each.name, glob) for glob in arguments.models)]
    if not chosen:
        raise BenchmarkError(f"no model of {suite} matches {' '.join(arguments.models)}; it has {_names(entries)}")
    path: Path = arguments.out or RESULTS / f"{sweep.name}_{suite.replace(':', '_')}.json"
    rows = _read(path, sweep.name)
    if arguments.fresh:
        for each in chosen:
            rows.pop(each.name, None)
    tasks = []
    for each in chosen:
        row = rows.setdefault(each.name, _new_row(each))
        for part in sweep.parts:
            again = arguments.retry_failed and part.problems(part.record(row))
            if again or not part.is_complete(row):
                tasks.append(_Task(each, part))
    for begun in _run_tasks(suite, tasks, rows, arguments.jobs):
        write_json(path, {"environment": environment(), "suite": suite, "rows": begun})
    known = [rows[each.name] for each in entries if each.name in rows]
    save(path, sweep.table(suite, known), {"suite": suite, "summary": sweep.summary(known), "rows": known})
    return int(any(part.problems(part.record(rows[each.name])) for each in chosen for part in sweep.parts))


@dataclass(frozen=True)
class _Task:
    """One process: a part of a row."""

    entry: Entry
    part: Part

    @property
    def label(self) -> str:
        return f"{self.entry.name} {self.part.key}".rstrip()


def _run_tasks(suite: str, tasks: Sequence[_Task], rows: dict[str, Row], parallel: int) -> Iterator[list[Row]]:
    """Runs them and completes their rows; yields all rows that hold something, after each."""
    waiting = {task.entry.name for task in tasks}
    by_label = {task.label: task for task in tasks}
    threads = max(1, (os.cpu_count() or 1) // parallel)
    with tempfile.TemporaryDirectory(prefix="fxopt-sweep-") as folder, _Progress(len(tasks)) as (progress, bar):
        jobs = []
        for label, task in by_label.items():
            command = [sys.executable, "-m", "benchmarks.sweep.worker", task.part.stages, suite, task.entry.name]
            command += [str(Path(folder) / f"{label}.json"), *task.part.names]
            jobs.append(Job(label, command, task.part.timeout, alone=task.entry.params > ALONE_PARAMS))

        def environment_of(job: Job) -> Mapping[str, str]:
            share = os.cpu_count() or 1 if job.alone else threads
            return {**os.environ, "OMP_NUM_THREADS": str(share), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}

        running: dict[str, float] = {}

        def started(job: Job) -> None:
            running[job.key] = time.monotonic()
            progress.update(bar, description=", ".join(running))

        for outcome in run_jobs(jobs, parallel=parallel, environment=environment_of, on_start=started):
            task = by_label[outcome.job.key]
            running.pop(task.label)
            record = _record(task.part, outcome, Path(folder) / f"{task.label}.json")
            row = rows[task.entry.name]
            if task.part.key:
                row[task.part.key] = record
            else:
                row.update(record)
            waiting.discard(task.entry.name)
            verdict = task.part.verdict(record)
            progress.console.print(f"{task.label}: {verdict} ({outcome.seconds:.0f} s)", highlight=False, markup=False)
            progress.update(bar, advance=1, description=", ".join(running))
            yield [each for name, each in rows.items() if name not in waiting]


def _new_row(entry: Entry) -> Row:
    return {
        "model": entry.name,
        "kind": entry.kind,
        "params": entry.params,
        "shapes": [],
        "stages": {},
        "seconds": None,
        "peak_rss": None,
    }


def _record(part: Part, outcome: Outcome, path: Path) -> Row:
    """What the worker wrote, completed if it did not reach its end."""
    record: Row = {"stages": {}}
    if path.exists():
        record.update(json.loads(path.read_text(encoding="utf-8")))
    build = record["stages"].get("build", {})
    record.update({key: build[key] for key in ("params", "shapes") if key in build})
    record.setdefault("revision", revision())
    record.setdefault("peak_rss", None)
    record["seconds"] = round(outcome.seconds, 2)
    if outcome.returncode != 0:
        stage = next((name for name in part.names if name not in record["stages"]), part.names[0])
        if outcome.returncode is None:
            reason = f"still running after {outcome.job.timeout:g} s, killed"
        elif outcome.returncode < 0:
            reason = f"killed by signal {-outcome.returncode}{' (out of memory?)' if outcome.returncode == -9 else ''}"
        else:
            last = outcome.tail.strip().splitlines()
            reason = f"exit code {outcome.returncode}: {last[-1] if last else 'no output'}"
        record["stages"][stage] = {"ok": False, "reason": reason, "tail": outcome.tail}
    return record


def _names(entries: Sequence[Entry]) -> str:
    shown = ", ".join(each.name for each in entries[:8])
    return f"{shown}, ... ({len(entries)} in all)" if len(entries) > 8 else shown


def _read(path: Path, name: str) -> dict[str, Row]:
    if not path.exists():
        return {}
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        return {row["model"]: row for row in rows}
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise BenchmarkError(
            f"{path} does not hold {name} results ({error}); remove it or choose another --out"
        ) from error


class _Progress:
    """A progress bar over processes; shows what runs."""

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
