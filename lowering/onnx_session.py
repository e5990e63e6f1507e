"""An ONNX Runtime session that takes and returns torch tensors without copying them.

On the CPU tensors go in and come back as numpy arrays over the same memory, which is what the runtime does soonest
(measured: 27 us for a call of one sum, 72 with inputs and outputs by DLPack). On CUDA, and for numbers that numpy does
not have, inputs are bound by address, and outputs come back by DLPack. Every call has outputs of its own. Weights are
given to the session as tensors too, so no message of the model's size is ever built.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.dlpack import from_dlpack

from fxopt.backend import Engine, TensorSpec, check_inputs
from fxopt.errors import BackendError, BackendUnavailable
from fxopt.lowering.onnx_model import OnnxModel

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["OnnxEngine", "choose_providers", "open_session"]

_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_ERRORS_ONLY = 3
_NUMBERS = "bool float16 float double int8 int16 int32 int64 uint8 uint16 uint32 uint64"
_ARRAYS = frozenset(f"tensor({name})" for name in _NUMBERS.split())
"""What numpy has, and torch takes from it."""
_SLOW_ON_CPU = ("SkipLayerNormFusion",)
"""What is left out where nothing but the CPU runs a model: its kernel for a sum and the norm behind it takes twice the
time of both (1.32, AVX2, 64 tokens)."""


class OnnxEngine(Engine):
    """Runs an `OnnxModel` in ONNX Runtime."""

    def __init__(
        self,
        model: OnnxModel,
        session: onnxruntime.InferenceSession,
        *,
        inputs: tuple[TensorSpec, ...],
        device: torch.device,
        notes: Sequence[str] = (),
        seconds: Mapping[str, float] | None = None,
    ) -> None:
        from onnx_ir.tensor_adapters import from_torch_dtype

        self.inputs = inputs
        self._model = model
        self._session = session
        self._device = device
        self._notes = list(notes)
        self._seconds = dict(seconds or {})
        self._on_cuda = device.type == "cuda" and _CUDA in session.get_providers()
        if device.type == "cuda" and not self._on_cuda:
            self._notes.append("runs on the CPU: this onnxruntime has no CUDA; tensors are copied to and fro")
        self._place = (device.type, device.index or 0) if self._on_cuda else ("cpu", 0)
        # an input that the model does not use may be missing from the graph
        kept = {item.name for item in session.get_inputs()}
        self._feeds = [(spec.name, int(from_torch_dtype(spec.dtype))) if spec.name in kept else None for spec in inputs]
        self._outputs = [item.name for item in session.get_outputs()]
        types = {item.type for item in (*session.get_inputs(), *session.get_outputs())}
        self._in_arrays = not self._on_cuda and types <= _ARRAYS

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        check_inputs(self.inputs, self._device, inputs)
        moved = not self._on_cuda and self._device.type == "cuda"
        if moved:
            inputs = tuple(tensor.cpu() for tensor in inputs)
        try:
            outputs = self._run_arrays(inputs) if self._in_arrays else self._run_bound(inputs)
        except Exception as error:  # ONNX Runtime's own exceptions share no base class
            raise BackendError(f"ONNX Runtime failed: {error}") from error
        return tuple(tensor.to(self._device) for tensor in outputs) if moved else outputs

    def _run_arrays(self, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        pairs = zip(self._feeds, inputs, strict=True)
        arrays = {feed[0]: tensor.detach().contiguous().numpy() for feed, tensor in pairs if feed is not None}
        return tuple(map(torch.from_numpy, self._session.run(self._outputs, arrays)))

    def _run_bound(self, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        binding = self._session.io_binding()
        kind, index = self._place
        # the binding knows no more than addresses: these are held until it has run
        held = [tensor.contiguous() for tensor in inputs]
        for feed, tensor in zip(self._feeds, held, strict=True):
            if feed is not None:
                binding.bind_input(feed[0], kind, index, feed[1], tensor.shape, tensor.data_ptr())
        for name in self._outputs:
            binding.bind_output(name, kind, index)
        if self._on_cuda:
            # the runtime has a stream of its own: what torch has queued must be finished before it reads
            torch.cuda.current_stream(self._device).synchronize()
        self._session.run_with_iobinding(binding)
        if self._on_cuda:
            binding.synchronize_outputs()
        return tuple(from_dlpack(value) for value in binding.get_outputs())

    @property
    def device(self) -> torch.device:
        return self._device

    def save(self, directory: Path) -> None:
        self._model.save(directory)

    def layers(self) -> list[dict[str, str]]:
        """The operators that ONNX Runtime runs: read from a second session, as the first one does not tell."""
        from fxopt.lowering.onnx_layers import layers_in

        threads = self._session.get_session_options().intra_op_num_threads
        with tempfile.TemporaryDirectory(prefix="fxopt-") as folder:
            path = Path(folder) / "optimized.onnx"
            providers = list(self._session.get_provider_options().items())
            open_session(self._model, providers=providers, threads=threads, optimized=path)
            return layers_in(path)

    def info(self) -> Mapping[str, Any]:
        import onnxruntime

        return {
            "backend": "onnx",
            "version": onnxruntime.__version__,
            "providers": list(self._session.get_providers()),
            "device": str(self._device),
            "dynamic_batch": self.dynamic_batch,
            "threads": self._session.get_session_options().intra_op_num_threads,
            "nodes": len(self._model.graph.graph.node),
            "opset": {item.domain or "ai.onnx": item.version for item in self._model.graph.opset_import},
            "bytes": self._model.nbytes,
            "seconds": dict(self._seconds),
            "notes": list(self._notes),
        }


def choose_providers(
    providers: Sequence[str | tuple[str, Any]] | None, device: torch.device
) -> list[str | tuple[str, dict[str, Any]]]:
    """The execution providers for a device: those asked for with their options, else CUDA where it is and the CPU.

    Raises:
        BackendUnavailable: if one that was asked for is not in this onnxruntime.
    """
    import onnxruntime

    available = onnxruntime.get_available_providers()
    asked = dict((item, ()) if isinstance(item, str) else item for item in providers or ())
    missing = [name for name in asked if name not in available]
    if missing:
        raise BackendUnavailable(f"this onnxruntime has no {', '.join(missing)}; it has {', '.join(available)}")
    own = (_CUDA, _CPU) if device.type == "cuda" and _CUDA in available else (_CPU,)
    chosen: list[str | tuple[str, dict[str, Any]]] = []
    for name, options in (asked or dict.fromkeys(own, ())).items():
        given = ({"device_id": device.index or 0} if name == _CUDA else {}) | dict(options)
        chosen.append((name, given) if given else name)
    return chosen


def open_session(
    model: OnnxModel,
    *,
    providers: Sequence[str | tuple[str, dict[str, Any]]],
    threads: int,
    optimized: Path | None = None,
) -> onnxruntime.InferenceSession:
    """A session with all graph optimizations that make it faster.

    It keeps the model's weights alive and may read them in place.

    Args:
        model: the model.
        providers: ONNX Runtime's execution providers.
        threads: for one operator.
        optimized: a file to write the optimized model to, with its weights beside it.

    Raises:
        BackendError: if ONNX Runtime refuses the model.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = threads
    options.log_severity_level = _ERRORS_ONLY
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
        prefix = "session.optimized_model_external_initializers"
        options.add_session_config_entry(f"{prefix}_file_name", f"{optimized.name}.data")
        options.add_session_config_entry(f"{prefix}_min_size_in_bytes", "1024")
    slow = list(_SLOW_ON_CPU) if {_name(item) for item in providers} == {_CPU} else []
    values = [onnxruntime.OrtValue.from_dlpack(tensor) for tensor in model.weights.values()]
    options.add_external_initializers(list(model.weights), values)
    try:
        return onnxruntime.InferenceSession(
            model.as_external().SerializeToString(), options, providers=list(providers), disabled_optimizers=slow
        )
    except Exception as error:
        raise BackendError(f"ONNX Runtime cannot load the model: {error}") from error


def _name(provider: str | tuple[str, dict[str, Any]]) -> str:
    return provider if isinstance(provider, str) else provider[0]
