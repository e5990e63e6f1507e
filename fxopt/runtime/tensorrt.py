"""Runs a saved TensorRT engine with numpy arrays, in a process without torch: `pip install pycuda`, and the flavour.

    with Runner("resnet18/") as runner:
        (scores,) = runner(pixels)

The folder is what `Compiled.save` wrote with the backend `tensorrt` or `tensorrt_rtx`; all in it is checked first.
Inputs and outputs are flat, in the order of the model's signature (`Runner.inputs`).
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fxopt.errors import ArtifactError, BackendError, BackendUnavailable, InputError, first_line
from fxopt.runtime.tensorrt_plan import (
    PACKAGES,
    PLAN_FILE,
    context_for,
    deserialize,
    errors_of,
    load_module,
    why_invalid,
)
from fxopt.saved_folder import checked, engine_files

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Input", "Runner", "unavailable"]


class Input(NamedTuple):
    """What an engine expects of one input.

    Attributes:
        name: as in the model's signature.
        dtype: exact; nothing is converted.
        shape: sizes; None where the engine takes several.
        axes: what such axes are called; axes of one name have one size.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | None, ...]
    axes: tuple[str | None, ...]


def unavailable() -> str | None:
    """Why engines cannot be run here, and what to install; None if they can, as far as pycuda knows."""
    try:
        _driver(0)
    except BackendUnavailable as error:
        return str(error)
    return None


class Runner:
    """A saved engine. Calls from several threads take turns: for more, make one runner for each.

    Args:
        directory: the folder that was saved.
        cuda_graph: with TensorRT-RTX, whether it captures and replays CUDA graphs.

    Attributes:
        inputs: what it expects, in order.
        limits: the smallest and the largest size of free axes, by name ("batch").

    Raises:
        ArtifactError: if the folder is incomplete, altered, or holds an engine of another kind.
        BackendUnavailable: if pycuda, the flavour's package or a GPU is missing, or the engine is for other GPUs.
        BackendError: if the engine cannot be loaded.
    """

    def __init__(self, directory: str | Path, *, cuda_graph: bool = False) -> None:
        saved = checked(Path(directory))
        described = _Described.of(saved.data, saved.place)
        self.inputs = described.inputs
        self.limits = described.limits
        self._outputs = described.outputs
        module = load_module(described.backend)
        self._module = module
        with engine_files(saved.place, saved.packed) as folder:
            plan = (folder / PLAN_FILE).read_bytes()
        self._driver = _driver(described.device)
        self._cuda = self._driver.Device(described.device).retain_primary_context()
        self._lock = threading.Lock()
        self._memory: dict[str, Any] = {}
        with self._current():
            reason = why_invalid(module, plan)
            if reason is not None:
                raise BackendUnavailable(f"{saved.place}: {reason}")
            self._engine = deserialize(module, plan, host_code=described.host_code)
            self._context = context_for(
                module, self._engine, cuda_graph=cuda_graph and hasattr(module, "CudaGraphStrategy")
            )
            self._stream = self._driver.Stream()
        self._names = {self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)}

    def __call__(self, *inputs: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], ...]:
        """Runs it, and waits for the results.

        Raises:
            InputError: naming the input whose number, data type or shape does not fit.
            BackendError: if TensorRT failed.
        """
        check_arrays(self.inputs, inputs, self.limits)
        with self._lock, self._current(), errors_of(self._module) as errors:
            arrays = [np.ascontiguousarray(array) for array in inputs]  # kept until the stream has read them
            bound = True
            for spec, array in zip(self.inputs, arrays, strict=True):
                if spec.name in self._names:  # what nothing reads may be missing
                    address = self._buffer(spec.name, array.nbytes)
                    self._driver.memcpy_htod_async(address, _bytes_of(array), self._stream)
                    bound = bound and self._context.set_input_shape(spec.name, array.shape)
                    bound = bound and self._context.set_tensor_address(spec.name, int(address))
            results = [self._result(name, dtype) for name, dtype in self._outputs] if bound else []
            if not bound or not self._context.execute_async_v3(self._stream.handle):
                raise BackendError(f"{self._module.__name__} failed: {'; '.join(errors) or 'no reason given'}")
            for (name, _), result in zip(self._outputs, results, strict=True):
                self._driver.memcpy_dtoh_async(_bytes_of(result), self._memory[name].address, self._stream)
            self._stream.synchronize()
        return tuple(results)

    def close(self) -> None:
        """Frees what it holds on the GPU. It cannot be called any more."""
        with self._lock, self._current():
            self._memory.clear()
            del self._context, self._engine, self._stream
        self._cuda.detach()

    def __enter__(self) -> Runner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def _current(self) -> Iterator[None]:
        """Has this thread use the GPU's context."""
        self._cuda.push()
        try:
            yield
        finally:
            self._cuda.pop()

    def _buffer(self, name: str, size: int) -> Any:
        """Memory on the GPU for a tensor: what it had, if that is large enough."""
        held = self._memory.get(name)
        if held is None or held.size < size:
            self._memory[name] = held = _Memory(self._driver.mem_alloc(max(1, size)), size)
        return held.address

    def _result(self, name: str, dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
        """A new array for an output, whose memory on the GPU is bound to the context."""
        sizes = tuple(self._context.get_tensor_shape(name))
        if any(size < 0 for size in sizes):
            raise BackendError(f"the size of the output {name} depends on values, which this runner does not support")
        result = np.empty(sizes, dtype)
        self._context.set_tensor_address(name, int(self._buffer(name, result.nbytes)))
        return result


class _Memory(NamedTuple):
    """Memory on the GPU, and how many bytes of it were asked for."""

    address: Any
    size: int


class _Described(NamedTuple):
    """What a manifest says of an engine of TensorRT."""

    backend: str
    device: int
    inputs: tuple[Input, ...]
    outputs: tuple[tuple[str, np.dtype[Any]], ...]
    limits: Mapping[str, tuple[int, int]]
    host_code: bool

    @classmethod
    def of(cls, data: Mapping[str, Any], place: Path) -> _Described:
        """Reads a manifest.

        Raises:
            ArtifactError: if it is not that of such an engine, or one of its tensors has no type in numpy.
        """
        try:
            info = data["engine"]
            backend = str(info["backend"])
            if backend not in PACKAGES:
                raise ArtifactError(f"{place} holds an engine of the backend {backend}: fxopt.load runs it")
            return cls(
                backend,
                int(str(info["device"]).partition(":")[2] or 0),
                tuple(_input(item) for item in data["inputs"]),
                tuple((str(item["name"]), _numpy_type(item["dtype"])) for item in info["outputs"]),
                {name: (int(sizes[0]), int(sizes[-1])) for name, sizes in info["ranges"].items()},
                info["host_code"] is True,
            )
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(
                f"{place}: the manifest lacks an entry or has a wrong one ({type(error).__name__}: "
                f"{first_line(error)}): save the engine again"
            ) from error


def _input(item: Mapping[str, Any]) -> Input:
    """Reads what a manifest says of an input; free is the batch, if no axis has a name."""
    shape = tuple(item["shape"])
    axes = tuple(item.get("axes", ())) or tuple("batch" if size is None else None for size in shape)
    return Input(str(item["name"]), _numpy_type(item["dtype"]), shape, axes)


def check_arrays(specs: Sequence[Input], inputs: Sequence[Any], limits: Mapping[str, tuple[int, int]]) -> None:
    """Refuses inputs that an engine was not made for.

    Raises:
        InputError: naming the input, what is expected and what was given.
    """
    if len(inputs) != len(specs):
        raise InputError(f"expected {len(specs)} inputs ({', '.join(spec.name for spec in specs)}), got {len(inputs)}")
    known: dict[str | None, int] = {}
    for spec, array in zip(specs, inputs, strict=True):
        if not isinstance(array, np.ndarray):
            raise InputError(f"input {spec.name}: expected a numpy array, got {type(array).__name__}")
        if array.dtype != spec.dtype:
            raise InputError(f"input {spec.name}: expected {spec.dtype}, got {array.dtype}: convert it first")
        fits = len(array.shape) == len(spec.shape) and all(
            wanted in (None, size) for wanted, size in zip(spec.shape, array.shape, strict=True)
        )
        if not fits:
            named = (name if size is None else str(size) for name, size in zip(spec.axes, spec.shape, strict=True))
            raise InputError(
                f"input {spec.name}: expected shape [{', '.join(map(str, named))}], got {list(array.shape)}"
            )
        for name, wanted, size in zip(spec.axes, spec.shape, array.shape, strict=True):
            if wanted is None:
                low, high = limits.get(str(name), (size, size))
                if not low <= size <= high:
                    raise InputError(f"input {spec.name}: this engine takes a {name} of {low} to {high}, got {size}")
                if known.setdefault(name, size) != size:
                    raise InputError(
                        f"input {spec.name}: expected {name} {known[name]} as the inputs before it, got {size}"
                    )


def _bytes_of(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The memory of a contiguous array, whatever its type."""
    return array.reshape(-1).view(np.uint8)


def _numpy_type(name: str) -> np.dtype[Any]:
    try:
        return np.dtype(name)
    except TypeError as error:
        raise ArtifactError(f"numpy has no {name}: import ml_dtypes first, which adds it") from error


def _driver(device: int) -> Any:
    """The driver as pycuda has it, on a machine that has a certain GPU.

    Raises:
        BackendUnavailable: saying what is missing.
    """
    try:
        import pycuda.driver as driver
    except (ImportError, OSError) as error:  # without a driver of CUDA its library is missing
        raise BackendUnavailable(f"pycuda cannot be imported ({first_line(error)}): pip install pycuda") from error
    try:
        driver.init()
        count = driver.Device.count()
    except driver.Error as error:
        raise BackendUnavailable(f"there is no GPU that CUDA can use here: {first_line(error)}") from error
    if device >= count:
        raise BackendUnavailable(f"the engine is for cuda:{device}, and this machine has {count} CUDA devices")
    return driver
