"""What tests of several backends share."""

from __future__ import annotations

from pathlib import Path

from fxopt import artifact
from fxopt.backend import Backend, Engine
from fxopt.program import Program

__all__ = ["saved"]


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
