"""The backend `onnx`: `torch.onnx.export`, onnxoptimizer, the ONNX checker, and a session of ONNX Runtime.

Each step has a file: `onnx_export`, `onnx_optimize`, `onnx_session`; what they hand on is an `onnx_model.OnnxModel`.
"""

from __future__ import annotations

import importlib.util
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch

from fxopt.backend import Backend, Engine, TensorSpec, tensor_device
from fxopt.errors import BackendError, BackendUnavailable

if TYPE_CHECKING:
    from fxopt.artifact import Manifest
    from fxopt.program import Program

__all__ = ["SPARSITY_KEY", "OnnxBackend"]

SPARSITY_KEY = "fxopt.sparsity_2_4"
"""Under it the metadata of `model.onnx` name the layers with two zeros in every four weights, separated by commas."""

_BFLOAT16 = (
    "ONNX Runtime's CPU provider has next to no kernels for bfloat16, none for convolutions, matrix products and "
    'arithmetic: use cast_precision(dtype="float16"), which it runs, or backend="eager"'
)

_PACKAGES = ("onnx", "onnxscript", "onnxruntime", "onnxoptimizer")


@dataclass(frozen=True, kw_only=True)
class OnnxBackend(Backend):
    """Runs programs in ONNX Runtime.

    Attributes:
        num_threads: threads for one operator; None: as many as torch uses when the engine is made.
        providers: ONNX Runtime's execution providers in order of preference; None: CUDA where the target is a CUDA
            device and this onnxruntime has it, else the CPU.
        optimize: whether onnxoptimizer runs before ONNX Runtime's own optimizations.
    """

    name: ClassVar[str] = "onnx"
    tolerance: ClassVar[float] = 1e-3

    num_threads: int | None = None
    providers: tuple[str, ...] | None = None
    optimize: bool = True

    def __post_init__(self) -> None:
        # a spec string may give values of any type
        threads: object = self.num_threads
        providers: object = self.providers
        if threads is not None and (type(threads) is not int or threads < 1):
            raise ValueError(f"num_threads must be an integer of at least 1, or None, not {threads!r}")
        if isinstance(providers, str):
            raise ValueError(f"providers must be a tuple of names: write ({providers!r},) for this one alone")
        if providers is not None and not (
            isinstance(providers, tuple) and all(type(item) is str for item in providers)
        ):
            raise ValueError(f"providers must be a tuple of names, or None, not {providers!r}")

    def unavailable(self) -> str | None:
        missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
        return f"{', '.join(missing)} not installed: pip install {' '.join(missing)}" if missing else None

    def lower(self, program: Program, *, dynamic_batch: bool) -> Engine:
        self._require_available()
        from fxopt.analysis.shapes import shapes, specs_in
        from fxopt.analysis.sparsity import two_of_four
        from fxopt.lowering import onnx_export, onnx_optimize
        from fxopt.lowering.onnx_session import OnnxEngine, choose_providers, open_session

        device = tensor_device(program.target)
        providers = choose_providers(self.providers, device)
        started = time.perf_counter()
        exported = onnx_export.export(program, dynamic_batch=dynamic_batch)
        after_export = time.perf_counter()
        model, notes = exported.model, list(exported.notes)
        if self.optimize:
            model, more = onnx_optimize.optimize(model)
            notes += more
        else:
            notes += onnx_optimize.check(model)
        after_optimize = time.perf_counter()
        try:
            session = open_session(model, providers=providers, threads=self._threads())
        except BackendError as error:
            if torch.bfloat16 in {spec.dtype for spec in specs_in(tuple(program.analysis(shapes).values()))}:
                raise BackendError(f"{error}. {_BFLOAT16}") from error
            if model is exported.model:
                raise
            notes.append(f"onnxoptimizer was left out: {error}")
            model = exported.model
            session = open_session(model, providers=providers, threads=self._threads())
        seconds = {
            "export": after_export - started,
            "optimize": after_optimize - after_export,
            "session": time.perf_counter() - after_optimize,
        }
        fitting = two_of_four(program)
        if fitting:
            # for who builds an engine from the file: TensorRT looks for the pattern only where it is told to
            model = model.with_metadata(SPARSITY_KEY, ",".join(fitting))
        inputs = TensorSpec.of_program(program, dynamic_batch=exported.dynamic_batch)
        return OnnxEngine(model, session, inputs=inputs, device=device, notes=notes, seconds=seconds)

    def load(self, directory: Path, manifest: Manifest) -> Engine:
        self._require_available()
        from fxopt.lowering.onnx_model import OnnxModel
        from fxopt.lowering.onnx_session import OnnxEngine, choose_providers, open_session

        device = tensor_device(manifest.target)
        model = OnnxModel.load(directory)
        session = open_session(model, providers=choose_providers(self.providers, device), threads=self._threads())
        return OnnxEngine(model, session, inputs=manifest.inputs, device=device, notes=manifest.notes)

    def _threads(self) -> int:
        return self.num_threads or torch.get_num_threads()

    def _require_available(self) -> None:
        reason = self.unavailable()
        if reason is not None:
            raise BackendUnavailable(f"backend onnx: {reason}")
