"""The backend `eager`: the program itself, run by torch.

It is the reference that other backends are compared with, and the one that trains. It is saved as a `torch.export`
archive, which holds operators and tensors and no class of the model.
"""

from __future__ import annotations

import contextlib
import importlib
import warnings
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from torch.export import ExportedProgram

from fxopt.backend import Backend, Engine, FixedBatchWarning, TensorSpec, check_inputs
from fxopt.errors import ArtifactError, BackendError
from fxopt.frontends.exported_sizes import input_values
from fxopt.lowering.eager_archive import load_archive, runnable, save_archive
from fxopt.lowering.torch_export import example_inputs, export, quiet
from fxopt.masking import without_masks
from fxopt.recurrent_shapes import whole_recurrences

if TYPE_CHECKING:
    from fxopt.artifact import Manifest
    from fxopt.program import Program

__all__ = ["EagerBackend"]

_FILE = "model.pt2"


@dataclass(frozen=True, kw_only=True)
class EagerBackend(Backend):
    """Runs programs in torch. The engine shares the program's weights: training the program trains the engine."""

    name: ClassVar[str] = "eager"
    runs_training: ClassVar[bool] = True
    tolerance: ClassVar[float] = 1e-5

    def unavailable(self) -> str | None:
        return None

    def lower(self, program: Program, *, dynamic_batch: bool) -> Engine:
        dynamic = dynamic_batch and program.batch is not None
        if not program.training:
            program = without_masks(program)
        return _ProgramEngine(program, TensorSpec.of_program(program, dynamic_batch=dynamic))

    def load(self, directory: Path, manifest: Manifest) -> Engine:
        # what archives may call: importing these registers it
        importlib.import_module("fxopt.quantization")
        importlib.import_module("fxopt.integer_operators")
        path = directory / _FILE
        with quiet():
            exported = load_archive(path)
        values = input_values(exported)
        if len(values) != len(manifest.inputs):
            raise ArtifactError(f"{path} takes {len(values)} inputs, not {len(manifest.inputs)}: save the engine again")
        # the archive may have a fixed batch where the engine had none
        inputs = tuple(
            spec._replace(shape=tuple(size if isinstance(size, int) else None for size in value.shape))
            for spec, value in zip(manifest.inputs, values, strict=True)
        )
        return _ArchiveEngine(exported, inputs, values[0].device, manifest)


class _TorchEngine(Engine):
    """What the two have in common: a flat callable and how to run it."""

    def __init__(
        self, module: nn.Module, inputs: tuple[TensorSpec, ...], device: torch.device, *, training: bool
    ) -> None:
        self.inputs = inputs
        self._module = module
        self._device = device
        self._training = training
        self._own = {address for address in map(_memory, _held_tensors(module)) if address}

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        check_inputs(self.inputs, self._device, inputs)
        try:
            with contextlib.nullcontext() if self._training else torch.no_grad():
                return self._separated(self._module(*inputs), inputs)
        except Exception as error:  # operators raise errors of all classes: IndexError for an index out of range
            raise BackendError(f"torch failed to run the program: {type(error).__name__}: {error}") from error

    def _separated(self, outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The outputs; in place of those that lie in memory of an input or of the engine, copies (gradients pass)."""
        given = {_memory(tensor) for tensor in inputs}
        return tuple(
            output.clone() if (address := _memory(output)) and (address in given or address in self._own) else output
            for output in outputs
        )

    @property
    def device(self) -> torch.device:
        return self._device

    def info(self) -> Mapping[str, Any]:
        return {
            "backend": "eager",
            "version": torch.__version__,
            "device": str(self._device),
            "dynamic_batch": self.dynamic_batch,
            "training": self._training,
            "bytes": self._nbytes(),
            "notes": self._notes(),
        }

    @abstractmethod
    def _nbytes(self) -> int:
        """Bytes of parameters and buffers."""

    def _notes(self) -> list[str]:
        return []


class _ProgramEngine(_TorchEngine):
    """Runs a program's own graph."""

    def __init__(self, program: Program, inputs: tuple[TensorSpec, ...]) -> None:
        module = program.flat_module()
        device = program.example_inputs[0].device
        super().__init__(module, inputs, device, training=program.training)
        self._graph_module = module
        self._examples = example_inputs(program, inputs)
        self._free = program.axis_names(batch=any(spec.shape and spec.shape[0] is None for spec in inputs))
        self._fixed_reason = ""

    def save(self, directory: Path) -> None:
        exported = self._export()
        with quiet():
            save_archive(exported, directory / _FILE)

    def _export(self) -> ExportedProgram:
        # Inductor is wrong about recurrent layers that are kept whole, but this is for torch itself
        with whole_recurrences():
            exported, reason = export(self._graph_module, self._examples, self._free)
        if reason:
            self._fixed_reason = f"saved with a fixed batch of {self._examples[0].shape[0]}: {reason}"
            warnings.warn(self._fixed_reason, FixedBatchWarning, stacklevel=4)
        return exported

    def _nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._graph_module.state_dict().values())

    def _notes(self) -> list[str]:
        return [self._fixed_reason] if self._fixed_reason else []


class _ArchiveEngine(_TorchEngine):
    """Runs a saved archive."""

    def __init__(
        self, exported: ExportedProgram, inputs: tuple[TensorSpec, ...], device: torch.device, manifest: Manifest
    ) -> None:
        super().__init__(runnable(exported), inputs, device, training=bool(manifest.info.get("training", False)))
        self._exported = exported
        self._saved_notes = manifest.notes

    def save(self, directory: Path) -> None:
        with quiet():
            save_archive(self._exported, directory / _FILE)

    def _nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._exported.state_dict.values())

    def _notes(self) -> list[str]:
        return list(self._saved_notes)


def _held_tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    """Parameters, buffers, and tensors that are plain attributes."""
    yield from module.parameters()
    yield from module.buffers()
    for part in module.modules():
        yield from (value for value in vars(part).values() if isinstance(value, torch.Tensor))


def _memory(tensor: torch.Tensor) -> int:
    """Where the tensor's storage begins, the same for all views of it; 0 if it has none (no elements, sparse)."""
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else 0
