"""Runs processes side by side, each with a time limit: a crash or a hang costs that process only."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO

_POLL_SECONDS = 0.05
_TAIL_CHARACTERS = 2000


@dataclass(frozen=True)
class Job:
    """A command to run.

    Attributes:
        key: names it.
        command: the program and its arguments.
        timeout: seconds after which it is killed.
        alone: whether it needs the machine's memory for itself.
    """

    key: str
    command: Sequence[str]
    timeout: float
    alone: bool = False


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        returncode: the exit code, negative for a signal; None if it ran into the time limit and was killed.
        tail: the end of what it wrote to its standard output and error.
    """

    job: Job
    returncode: int | None
    seconds: float
    tail: str


class _Running:
    def __init__(self, job: Job, environment: Mapping[str, str]) -> None:
        self.job = job
        self.started = time.monotonic()
        self.log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed by finish)
        self.process = subprocess.Popen(
            job.command,
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            start_new_session=True,  # so that a kill reaches its children too
        )

    def seconds(self) -> float:
        return time.monotonic() - self.started

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def finish(self, returncode: int | None) -> Outcome:
        size = self.log.seek(0, os.SEEK_END)
        self.log.seek(max(0, size - _TAIL_CHARACTERS))
        tail = self.log.read().decode(errors="replace")
        self.log.close()
        return Outcome(self.job, returncode, self.seconds(), tail)


def run_jobs(
    jobs: Sequence[Job],
    *,
    parallel: int,
    environment: Callable[[Job], Mapping[str, str]],
    on_start: Callable[[Job], None],
) -> Iterator[Outcome]:
    """Runs the jobs, `parallel` at a time, those that want the machine alone one by one at the end.

    Yields:
        the outcomes in the order in which jobs end. If the caller stops early, what runs is killed.
    """
    yield from _run([job for job in jobs if not job.alone], parallel, environment, on_start)
    yield from _run([job for job in jobs if job.alone], 1, environment, on_start)


def _run(
    jobs: Sequence[Job],
    parallel: int,
    environment: Callable[[Job], Mapping[str, str]],
    on_start: Callable[[Job], None],
) -> Iterator[Outcome]:
    waiting = deque(jobs)
    running: list[_Running] = []
    try:
        while waiting or running:
            while waiting and len(running) < parallel:
                job = waiting.popleft()
                on_start(job)
                running.append(_Running(job, environment(job)))
            for each in list(running):
                returncode = each.process.poll()
                if returncode is None and each.seconds() < each.job.timeout:
                    continue
                if returncode is None:
                    each.kill()
                running.remove(each)
                yield each.finish(returncode)
            time.sleep(_POLL_SECONDS)
    finally:
        for each in running:
            each.kill()
