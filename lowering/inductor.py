"""The backend `inductor`: programs compiled ahead of time by torch's Inductor (AOTInductor).

`torch.compile` compiles while the model runs, anew for what its guards do not cover, and what it made cannot be saved.
So this backend always makes an AOTInductor package, and runs that: what is saved is what was compared with the program;
one compilation serves every batch, of 0 and 1 too; and a call has no guards to check. Measured (2 cores, AVX2, one
thread): see `docs/architecture.md`.

A package is a shared library. Loading one runs its code, so load only what you trust; fxopt checks that the files are
those that were saved, which says nothing about who saved them.

Integers: quantize and dequantize nodes become oneDNN's integer kernels, by patterns that torchao brings and that look
for constant weights, for which `freezing` is needed. `info()["layers"]` says what became of them.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from fxopt.analysis.costs import macs_by_node
from fxopt.backend import Backend, Engine, FixedBatchWarning, TensorSpec, tensor_device
from fxopt.errors import BackendUnavailable
from fxopt.integer_scheme import Scheme
from fxopt.masking import without_masks
from fxopt.ops import DYNAMIC
from fxopt.options import check_choice, check_flag

if TYPE_CHECKING:
    from fxopt.artifact import Manifest
    from fxopt.program import Program
    from fxopt.target import Target

__all__ = ["InductorBackend"]

Mode = Literal["default", "max-autotune"]

_SIMULATED = "integers are computed with as floating numbers"
_INTEGER_KERNELS = "torchao.quantization.pt2e.quantizer.x86_inductor_quantizer"


@dataclass(frozen=True, kw_only=True)
class InductorBackend(Backend):
    """Runs programs compiled by torch's Inductor. It computes on as many threads as torch does when it is called.

    Attributes:
        mode: "default", or "max-autotune", which tries several kernels for each matrix product and takes long.
        freezing: whether weights become constants, in the layout that kernels read fastest; integer kernels need it.
            None: they do, unless most products are those of linear layers in floating point, which then take longer
            (measured: 1.10 and 1.15 times as long in ViT-Tiny, 1.03 to 1.3 in an encoder; ResNet-18 takes 0.7).
    """

    name: ClassVar[str] = "inductor"
    tolerance: ClassVar[float] = 1e-3

    mode: Mode = "default"
    freezing: bool | None = None

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, get_args(Mode))
        if self.freezing is not None:
            check_flag("freezing", self.freezing)

    def unavailable(self) -> str | None:
        compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
        if shutil.which(compiler) is None:
            return f"no C++ compiler: {compiler} not found; install it, or name another in CXX"
        return None

    def cannot_load(self) -> str | None:
        return None

    def scheme(self, target: Target) -> Scheme:
        return Scheme.of(target).adding("within_places")

    def lower(self, program: Program, *, dynamic_batch: bool) -> Engine:
        reason = self.unavailable()
        if reason is not None:
            raise BackendUnavailable(f"backend inductor: {reason}")
        from fxopt.lowering.inductor_legalize import legalize
        from fxopt.lowering.inductor_package import PrivateFolder, build
        from fxopt.lowering.inductor_session import InductorEngine
        from fxopt.lowering.torch_export import example_inputs, export, quiet

        started = time.perf_counter()
        notes = self._notes(program)
        options = self._options(program)
        program = legalize(without_masks(program))
        inputs = TensorSpec.of_program(program, dynamic_batch=dynamic_batch and program.batch is not None)
        examples = example_inputs(program, inputs)
        exported, reason = export(program.flat_module(), examples, program.axis_names(batch=dynamic_batch))
        if reason:
            assert program.batch is not None
            notes.append(f"fixed batch of {examples[0].shape[0]}: {reason}")
            warnings.warn(
                f"the engine takes a {notes[-1]}. Pass dynamic_batch=False to accept that without a warning.",
                FixedBatchWarning,
                stacklevel=2,
            )
            inputs = TensorSpec.of_program(program, dynamic_batch=False)
        after_export = time.perf_counter()
        folder = PrivateFolder()
        if _has_integers(program) and importlib.util.find_spec("torchao"):
            with quiet():
                importlib.import_module(_INTEGER_KERNELS)  # which registers them
        build(exported, folder.path, options)
        seconds = {"export": after_export - started, "compile": time.perf_counter() - after_export}
        return InductorEngine(folder, inputs=inputs, device=tensor_device(program.target), notes=notes, seconds=seconds)

    def load(self, directory: Path, manifest: Manifest) -> Engine:
        from fxopt.lowering.inductor_package import PrivateFolder, copy_package
        from fxopt.lowering.inductor_session import InductorEngine

        # what a package may call: importing this registers it
        importlib.import_module("fxopt.integer_operators")
        folder = PrivateFolder()
        copy_package(directory, folder.path)
        device = tensor_device(manifest.target)
        return InductorEngine(folder, inputs=manifest.inputs, device=device, notes=manifest.notes)

    def _notes(self, program: Program) -> list[str]:
        ops = {program.op(node) for node in program.nodes}
        notes = []
        if _has_integers(program):
            if not importlib.util.find_spec("torchao"):
                notes.append(f"{_SIMULATED}: torchao, which has the patterns, is not installed: pip install torchao")
            elif self.freezing is False:
                notes.append(f"{_SIMULATED}: freezing is off")
        if ops & DYNAMIC:
            notes.append(
                "layers that are quantized dynamically are simulated by torch, which is slower than floating point: "
                "backend='onnx' has integer kernels for them"
            )
        if ops & {"codebook_weight", "packed_weight"}:
            notes.append("weights that are held as codes are unpacked as the program is compiled: they save no bytes")
        return notes

    def _options(self, program: Program) -> dict[str, Any]:
        from torch._inductor import list_mode_options

        mode = list_mode_options("max-autotune-no-cudagraphs") if self.mode == "max-autotune" else {}
        # else the number of threads of this moment would be written into the code
        freezing = _gains_by_freezing(program) if self.freezing is None else self.freezing
        return {**mode, "freezing": freezing, "cpp.dynamic_threads": True}


def _has_integers(program: Program) -> bool:
    return any(program.op(node) == "dequantize" for node in program.nodes)


def _gains_by_freezing(program: Program) -> bool:
    """Whether it has integers to multiply, or linear layers have no more than half of the MACs."""
    macs = macs_by_node(program)
    linear = sum(count for name, count in macs.items() if program.op(program.node(name)) == "linear")
    return _has_integers(program) or 2 * linear <= sum(macs.values())
