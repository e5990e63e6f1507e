"""A backend: programs as TorchScript, for the C++ services that still load it.

What a backend has to do is `lower` and `load`; what it gives is an `Engine` that runs, saves itself, and tells about
itself. `fxopt.compile` compares the engine with the program before it hands it out.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from fxopt import Backend, BackendError, Engine, Program
from fxopt.artifact import Manifest
from fxopt.backend import TensorSpec, check_inputs
from fxopt.errors import ArtifactError

__all__ = ["TorchScriptBackend"]

_FILE = "model.ts"


@dataclass(frozen=True, kw_only=True)
class TorchScriptBackend(Backend):
    """Traces programs to TorchScript and freezes them.

    Attributes:
        freeze: whether weights become constants, so that TorchScript optimizes with them.
    """

    name: ClassVar[str] = "torchscript"
    tolerance: ClassVar[float] = 1e-4

    freeze: bool = True

    def unavailable(self) -> str | None:
        return None

    def lower(self, program: Program, *, dynamic_batch: bool) -> Engine:
        try:
            with _without_farewell(), torch.no_grad():
                # what is traced must share nothing with the program
                module = torch.jit.trace(program.flat_module(), program.example_inputs, check_trace=False)
                module = torch.jit.freeze(module.eval()) if self.freeze else module
        except Exception as error:  # the tracer raises whatever an operator raises
            raise BackendError(f"torch.jit.trace cannot trace this program: {error}") from error
        inputs = TensorSpec.of_program(program, dynamic_batch=dynamic_batch)
        return _ScriptEngine(module, inputs, program.example_inputs[0].device)

    def load(self, directory: Path, manifest: Manifest) -> Engine:
        path = directory / _FILE
        device = torch.device(manifest.target.device)
        try:
            with _without_farewell():
                module = torch.jit.load(path, map_location=device)
        except (RuntimeError, ValueError, OSError) as error:
            raise ArtifactError(f"{path} cannot be read: {error}") from error
        return _ScriptEngine(module, manifest.inputs, device)


class _ScriptEngine(Engine):
    def __init__(self, module: torch.jit.ScriptModule, inputs: tuple[TensorSpec, ...], device: torch.device) -> None:
        self.inputs = inputs
        self._module = module
        self._device = device

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        check_inputs(self.inputs, self._device, inputs)
        try:
            with torch.no_grad():
                # copies, as an output may be an input, or a view of one
                return tuple(output.clone() for output in self._module(*inputs))
        except RuntimeError as error:
            raise BackendError(f"TorchScript failed: {error}") from error

    def save(self, directory: Path) -> None:
        with _without_farewell():
            torch.jit.save(self._module, directory / _FILE)

    def info(self) -> Mapping[str, Any]:
        return {
            "backend": "torchscript",
            "version": torch.__version__,
            "device": str(self._device),
            "dynamic_batch": self.dynamic_batch,
            "bytes": sum(tensor.nbytes for tensor in self._module.state_dict().values()),
            "notes": [],
        }


@contextmanager
def _without_farewell() -> Iterator[None]:
    """Every use of TorchScript warns that it is deprecated; who asks for this backend knows."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*torch\.jit\..*deprecated.*")
        yield
