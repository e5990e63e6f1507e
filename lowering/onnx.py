"""The backend `onnx`: `torch.onnx.export`, onnxoptimizer, the ONNX checker, and a session of ONNX Runtime.

Each step has a file: `onnx_export` and `onnx_optimize`, which `onnx_lower` calls, and `onnx_session`; what they hand on
is an `onnx_model.OnnxModel`.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

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

_FIRST_OPSET = 18  # torch's exporter has no operators for older ones
_PACKAGES = ("onnx", "onnxscript", "onnxruntime", "onnxoptimizer")


@dataclass(frozen=True, kw_only=True)
class OnnxBackend(Backend):
    """Runs programs in ONNX Runtime.

    Attributes:
        num_threads: threads for one operator; None: as many as torch uses when the engine is made.
        providers: ONNX Runtime's execution providers in order of preference, each a name or a pair of a name and its
            options, as in ("CUDAExecutionProvider", {"device_id": 0}); None: CUDA where the target is a CUDA device and
            this onnxruntime has it, else the CPU.
        opset: the version of ONNX's operators, from 18 to what the installed onnx knows; None: the exporter's choice.
        optimize: whether onnxoptimizer runs before ONNX Runtime's own optimizations.
    """

    name: ClassVar[str] = "onnx"
    tolerance: ClassVar[float] = 1e-3

    num_threads: int | None = None
    providers: tuple[str | tuple[str, Any], ...] | None = None
    opset: int | None = None
    optimize: bool = True

    def __post_init__(self) -> None:
        # a spec string may give values of any type
        threads: object = self.num_threads
        opset: object = self.opset
        if threads is not None and (type(threads) is not int or threads < 1):
            raise ValueError(f"num_threads must be an integer of at least 1, or None, not {threads!r}")
        if opset is not None and (type(opset) is not int or opset < _FIRST_OPSET):
            raise ValueError(f"opset must be an integer of at least {_FIRST_OPSET}, or None, not {opset!r}")
        object.__setattr__(self, "providers", _frozen_providers(self.providers))

    def unavailable(self) -> str | None:
        missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
        return f"{', '.join(missing)} not installed: pip install {' '.join(missing)}" if missing else None

    def lower(self, program: Program, *, dynamic_batch: bool) -> Engine:
        self._require_available()
        from fxopt.analysis.shapes import shapes, specs_in
        from fxopt.lowering.onnx_functions import spell_functions
        from fxopt.lowering.onnx_lower import onnx_of
        from fxopt.lowering.onnx_session import OnnxEngine, choose_providers, open_session

        device = tensor_device(program.target)
        providers = choose_providers(self.providers, device)
        self._check_opset()
        spelled = spell_functions(program)
        lowered = onnx_of(spelled, dynamic_batch=dynamic_batch, optimize=self.optimize, opset=self.opset)
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

    def _check_opset(self) -> None:
        import onnx

        newest = onnx.defs.onnx_opset_version()
        if self.opset is not None and self.opset > newest:
            raise BackendError(f"opset {self.opset} is newer than the installed onnx, which knows {newest}")

    def _require_available(self) -> None:
        reason = self.unavailable()
        if reason is not None:
            raise BackendUnavailable(f"backend onnx: {reason}")


def _frozen_providers(providers: object) -> tuple[str | tuple[str, Any], ...] | None:
    """Providers in a form that can be hashed and printed: options as pairs.

    Raises:
        ValueError: if they are something else.
    """
    if providers is None:
        return None
    if isinstance(providers, str):
        raise ValueError(f"providers must be a tuple of names: write ({providers!r},) for this one alone")
    if not isinstance(providers, tuple):
        raise ValueError(f"providers must be a tuple of names, or None, not {providers!r}")
    return tuple(item if isinstance(item, str) else _frozen_provider(item) for item in providers)


def _frozen_provider(item: object) -> tuple[str, Any]:
    if isinstance(item, tuple | list) and len(item) == 2 and isinstance(item[0], str):
        pairs = item[1].items() if isinstance(item[1], Mapping) else item[1]
        try:
            options = dict(pairs)
            hash(tuple(options.items()))
        except (TypeError, ValueError) as error:
            raise ValueError(f"the options of {item[0]} must be plain values by name, not {item[1]!r}") from error
        return item[0], tuple(sorted(options.items()))
    raise ValueError(f"a provider is a name, or a pair of a name and its options, not {item!r}")
