"""What tests of several backends share."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from fxopt import artifact
from fxopt.backend import Backend, Engine
from fxopt.program import Program

__all__ = ["in_threads", "saved"]


def saved(program: Program, engine: Engine, backend: Backend, folder: Path) -> artifact.Manifest:
    """Saves an engine as `Compiled.save` does, and reads what is said of it."""
    artifact.write(
        folder,
        engine=engine,
        backend=backend,
        signature=program.signature,
        report=program.report,
        target=program.target,
    )
    return artifact.read(folder)


def in_threads(work: Callable[[int], None], count: int) -> None:
    """Calls `work` with 0 to `count` - 1, each in a thread of its own, and waits for all."""
    workers = [threading.Thread(target=work, args=(index,)) for index in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
