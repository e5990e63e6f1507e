"""The backend `onnx`: `torch.onnx.export`, onnxoptimizer, the ONNX checker, and a session of ONNX Runtime.

Each step has a file: `onnx_export` and `onnx_optimize`, which `onnx_lower` calls, and `onnx_session`; what they hand on
is an `onnx_model.OnnxModel`.
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

__all__ = ["OnnxBackend"]

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
        from fxopt.lowering.onnx_lower import onnx_of
        from fxopt.lowering.onnx_session import OnnxEngine, choose_providers, open_session

        device = tensor_device(program.target)
        providers = choose_providers(self.providers, device)
        lowered = onnx_of(program, dynamic_batch=dynamic_batch, optimize=self.optimize)
        model, notes = lowered.model, lowered.notes
        started = time.perf_counter()
        try:
            session = open_session(model, providers=providers, threads=self._threads())
        except BackendError as error:
            if torch.bfloat16 in {spec.dtype for spec in specs_in(tuple(program.analysis(shapes).values()))}:
                raise BackendError(f"{error}. {_BFLOAT16}") from error
            if model is lowered.plain:
                raise
            notes.append(f"onnxoptimizer was left out: {error}")
            model = lowered.plain
            session = open_session(model, providers=providers, threads=self._threads())
        seconds = lowered.seconds | {"session": time.perf_counter() - started}
        inputs = TensorSpec.of_program(program, dynamic_batch=lowered.dynamic_batch)
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
