"""An AOTInductor package as an engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fxopt.backend import Engine, TensorSpec, check_inputs
from fxopt.errors import BackendError, BackendUnavailable, first_line
from fxopt.lowering.inductor_package import PACKAGE_FILE, Facts, PrivateFolder, copy_package, kernels

__all__ = ["InductorEngine"]

_MODEL = "model"  # the name that torch gives it in a package


class InductorEngine(Engine):
    """Runs a package. Calls from several threads take turns, as each computes on all of torch's threads."""

    def __init__(
        self,
        folder: PrivateFolder,
        *,
        inputs: tuple[TensorSpec, ...],
        device: torch.device,
        notes: Sequence[str] = (),
        seconds: Mapping[str, float] | None = None,
    ) -> None:
        self.inputs = inputs
        self._device = device
        self._notes = list(notes)
        self._seconds = dict(seconds or {})
        self._folder = folder  # deleted with the engine
        path = folder.path
        facts = Facts.read(path)
        here = torch.backends.cpu.get_cpu_capability()
        if facts.instruction_set != here:
            raise BackendUnavailable(
                f"backend inductor: the engine is for {facts.instruction_set}, and this processor has {here}: "
                "compile the model here"
            )
        self._held = frozenset(facts.held)
        try:
            # the loader itself: torch's Python function also reads what else an archive may hold, pickles among it
            self._loader = torch._C._aoti.AOTIModelPackageLoader(
                str(path / PACKAGE_FILE), _MODEL, False, 1, device.index if device.type == "cuda" else -1
            )
        except Exception as error:
            raise BackendError(f"torch cannot load the compiled engine: {first_line(error)}") from error

    @property
    def device(self) -> torch.device:
        return self._device

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        check_inputs(self.inputs, self._device, inputs)
        # the code was made for the strides of the examples
        given = [tensor.detach().contiguous() for tensor in inputs]
        try:
            outputs = self._loader.boxed_run(list(given))
        except Exception as error:
            raise BackendError(f"the compiled engine failed: {first_line(error)}") from error
        addresses = {_memory(tensor) for tensor in given}
        return tuple(
            output.clone() if place in self._held or _memory(output) in addresses else output
            for place, output in enumerate(outputs)
        )

    def save(self, directory: Path) -> None:
        copy_package(self._folder.path, directory)

    def info(self) -> Mapping[str, Any]:
        folder = self._folder.path
        return {
            "backend": "inductor",
            "version": torch.__version__,
            "device": str(self._device),
            "dynamic_batch": self.dynamic_batch,
            "bytes": (folder / PACKAGE_FILE).stat().st_size,
            "seconds": dict(self._seconds),
            "layers": kernels(folder),
            "notes": list(self._notes),
        }


def _memory(tensor: torch.Tensor) -> int:
    """Where the tensor's storage begins; nothing has no place."""
    return tensor.untyped_storage().data_ptr() or -1
