"""What all tests share."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import hypothesis
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

# Each xdist worker is a process; threads on top of them only get in each other's way.
torch.set_num_threads(1)

# A first example that imports or compiles takes long, on a busy machine any does: time is no sign of a fault.
hypothesis.settings.register_profile("fxopt", deadline=None, print_blob=True)
hypothesis.settings.load_profile("fxopt")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def fresh_log() -> Iterator[None]:
    """The command line sets up logs and warnings for its whole process; here the next test must not hear of it."""
    logger, root = logging.getLogger("fxopt"), logging.getLogger()
    level, root_level, handlers, show = logger.level, root.level, root.handlers[:], warnings.showwarning
    yield
    logger.setLevel(level)
    root.setLevel(root_level)
    root.handlers[:] = handlers
    warnings.showwarning = show


@pytest.fixture(scope="module")
def integers_everywhere() -> Iterator[None]:
    """Small convolutions become integers whatever the target: the networks of tests have few others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fxopt.integer_scheme._FEWEST_TERMS", 0)
        yield


class NewProcess:
    """Runs Python where nothing of this process is imported, with folders in front of the installed packages."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def run(
        self,
        arguments: Sequence[str],
        *,
        path: Sequence[Path] = (),
        environment: Mapping[str, str] | None = None,
        timeout: float = 300,
    ) -> subprocess.CompletedProcess[str]:
        """`python ARGUMENTS`, in an empty folder; its output is returned, whatever the exit code."""
        variables = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "COV_"))}
        variables |= {"PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=self._folder,
            env=variables | dict(environment or {}),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def code(self, source: str, *, path: Sequence[Path] = ()) -> str:
        """Runs `source` with warnings as they are by default, and returns its standard output; it must not fail."""
        result = self.run(["-c", source], path=path)
        assert result.returncode == 0, result.stderr
        return result.stdout


@pytest.fixture
def new_process(tmp_path: Path) -> NewProcess:
    folder = tmp_path / "new_process"
    folder.mkdir()
    return NewProcess(folder)
