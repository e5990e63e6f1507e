"""What a backend must do: lower a program to an engine, and load a saved engine.

A `Backend` is its own configuration, like a pass: a frozen dataclass whose fields are its options and which prints as a
spec string. What it returns is an `Engine`: a callable from flat tensors to flat tensors that can be saved. Nesting the
tensors the way the model does is not the engine's business but the `Signature`'s.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch

from fxopt.errors import InputError
from fxopt.free_axes import BATCH
from fxopt.integer_scheme import Scheme
from fxopt.spec import spec_string

if TYPE_CHECKING:
    from fxopt.artifact import Manifest
    from fxopt.program import Program
    from fxopt.target import Target

__all__ = ["Backend", "Engine", "FixedBatchWarning", "TensorSpec", "check_inputs", "tensor_device"]


class FixedBatchWarning(UserWarning):
    """A dynamic batch was asked for, and the engine has a fixed one."""


class TensorSpec(NamedTuple):
    """What an engine expects of one flat input.

    Attributes:
        name: as in `Signature.names`.
        dtype: exact; engines do not convert.
        shape: sizes; None where any size is taken.
        axes: what the axes of any size are called, None for the others; axes of one name have one size. Empty where
            there is none but the batch, on axis 0.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int | None, ...]
    axes: tuple[str | None, ...] = ()

    def axis_name(self, axis: int) -> str:
        """What an axis of any size is called."""
        return (self.axes[axis] if self.axes else None) or (BATCH if axis == 0 else f"{self.name}_{axis}")

    @property
    def sizes(self) -> str:
        """The shape, with names in the place of sizes that are free."""
        named = (self.axis_name(axis) if size is None else str(size) for axis, size in enumerate(self.shape))
        return f"[{', '.join(named)}]"

    def takes(self, shape: Sequence[int]) -> bool:
        """Whether a tensor of that shape fits, seen by itself."""
        return len(shape) == len(self.shape) and all(
            wanted is None or wanted == size for wanted, size in zip(self.shape, shape, strict=True)
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, read by `from_json`."""
        data = {"name": self.name, "dtype": str(self.dtype).removeprefix("torch."), "shape": list(self.shape)}
        return data | ({"axes": list(self.axes)} if self.axes else {})

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TensorSpec:
        """Reads what `to_json` wrote.

        Raises:
            ValueError: if the data type is not one of torch's, or there is not one name for each axis.
        """
        dtype = getattr(torch, data["dtype"], None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{data['dtype']!r} is not a torch data type")
        shape, axes = tuple(data["shape"]), tuple(data.get("axes", ()))
        if (axes and len(axes) != len(shape)) or not all(name is None or isinstance(name, str) for name in axes):
            raise ValueError(f"{axes} are not the names of the {len(shape)} axes of {data['name']}")
        return cls(data["name"], dtype, shape, axes)

    def __str__(self) -> str:
        return f"{self.name}: {str(self.dtype).removeprefix('torch.')}{self.sizes}"

    @classmethod
    def of_program(cls, program: Program, *, dynamic_batch: bool) -> tuple[TensorSpec, ...]:
        """The inputs of a program.

        Its free axes are free, and axis 0 is where it is the batch and `dynamic_batch` is wanted.
        """
        free = program.axis_names(batch=dynamic_batch)
        found = []
        for index, (name, tensor) in enumerate(zip(program.signature.names, program.example_inputs, strict=True)):
            axes = tuple(free.get((index, axis)) for axis in range(tensor.ndim))
            shape = tuple(size if axes[axis] is None else None for axis, size in enumerate(tensor.shape))
            found.append(cls(name, tensor.dtype, shape, axes if program.free_axes else ()))
        return tuple(found)


class Engine(ABC):
    """A lowered program: flat tensors in, flat tensors out. Safe to call from several threads.

    Attributes:
        inputs: what it expects, in order.
        limits: the smallest and the largest size of free axes of which not all sizes are taken, by name ("batch").
    """

    inputs: tuple[TensorSpec, ...]
    limits: Mapping[str, tuple[int, int]] = MappingProxyType({})

    @property
    def device(self) -> torch.device:
        """Where it expects its inputs."""
        return torch.device("cpu")

    @property
    def dynamic_batch(self) -> bool:
        """Whether it takes any batch size, or any within `limits`."""
        return any(spec.shape[:1] == (None,) and spec.axis_name(0) == BATCH for spec in self.inputs)

    def cannot_run(self) -> str | None:
        """Why it cannot be called on this machine, though it could be made or loaded; None if it can.

        An engine that cannot raises `BackendUnavailable` with the same reason when it is called.
        """
        return None

    @abstractmethod
    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Runs it. The results are on the device of the inputs and share no memory with these or with the engine.

        Raises:
            InputError: naming the input whose number, data type, device or shape does not fit.
            BackendUnavailable: if `cannot_run()` has a reason.
            BackendError: if the runtime failed.
        """

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Writes the engine's files into an existing folder; `Backend.load` reads them."""

    @abstractmethod
    def info(self) -> Mapping[str, Any]:
        """Plain JSON about the engine: backend, version, device, dynamic_batch, sizes in bytes, notes."""

    def layers(self) -> list[dict[str, str]]:
        """The layers that really run, after all fusion: name, type and precision of each; none if it is not known.

        This may take as long as making the engine: where it costs nothing it is in `info` too.
        """
        return [dict(layer) for layer in self.info().get("layers", ())]


@dataclass(frozen=True, kw_only=True)
class Backend(ABC):
    """How programs are lowered. Subclasses are frozen dataclasses whose fields are the options.

    Attributes:
        name: the registry name.
        runs_training: whether a program in training mode can be lowered.
        tolerance: largest error, relative to the largest output, that is rounding and not a fault (float32).
    """

    name: ClassVar[str]
    runs_training: ClassVar[bool] = False
    tolerance: ClassVar[float] = 1e-3

    @abstractmethod
    def unavailable(self) -> str | None:
        """Why it cannot be used here and what to install; None if it can."""

    @abstractmethod
    def lower(self, program: Program, *, dynamic_batch: bool) -> Engine:
        """The engine of a program.

        Args:
            program: left unchanged. The engine does not see later changes of its weights, unless the backend is eager.
            dynamic_batch: whether the engine shall take any batch size. Where that cannot be had the engine has the
                batch of the example inputs; a `FixedBatchWarning` and a note in `Engine.info` say why.

        Raises:
            BackendUnavailable: if `unavailable()` has a reason.
            BackendError: if the program cannot be lowered.
        """

    @abstractmethod
    def load(self, directory: Path, manifest: Manifest) -> Engine:
        """The engine that `Engine.save` wrote into a folder. Neither imports the model's classes nor unpickles them.

        Raises:
            ArtifactError: if the files are not those of this backend.
            BackendUnavailable: if `cannot_load()` has a reason.
        """

    def device(self, target: Target) -> torch.device:
        """Where its engines for a target expect their inputs."""
        return tensor_device(target)

    def cannot_load(self) -> str | None:
        """Why saved engines cannot be loaded here and what to install; None if they can.

        That may take less than to lower programs: no compiler, for example.
        """
        return self.unavailable()

    def scheme(self, target: Target) -> Scheme:
        """Which integers its kernels multiply on a target."""
        return Scheme.of(target)

    def unverified(self) -> Backend:
        """The same, without comparing engines with the program as it lowers; what does not do so is itself."""
        return self

    def __str__(self) -> str:
        return spec_string(self)


def tensor_device(target: Target) -> torch.device:
    """The device of a target, as tensors name it: "cuda" is "cuda:0"."""
    return torch.device("cuda", 0) if target.device == "cuda" else torch.device(target.device)


def check_inputs(
    specs: Sequence[TensorSpec],
    device: torch.device,
    inputs: Sequence[Any],
    *,
    limits: Mapping[str, tuple[int, int]] = MappingProxyType({}),
) -> None:
    """Refuses inputs that an engine was not made for. Costs a microsecond or two per input.

    Raises:
        InputError: naming the input, what is expected and what was given.
    """
    if len(inputs) != len(specs):
        raise InputError(f"expected {len(specs)} inputs ({', '.join(map(str, specs))}), got {len(inputs)}")
    known: dict[str, int] = {}
    for spec, tensor in zip(specs, inputs, strict=True):
        if not isinstance(tensor, torch.Tensor):
            raise InputError(f"input {spec.name}: expected a tensor ({spec}), got {type(tensor).__name__}")
        if tensor.dtype is not spec.dtype:
            raise InputError(f"input {spec.name}: expected {spec.dtype} ({spec}), got {tensor.dtype}: convert it first")
        if tensor.device != device:
            raise InputError(f"input {spec.name}: expected it on {device}, got {tensor.device}: move it first")
        shape = tensor.shape
        if shape == spec.shape:
            continue
        if not spec.takes(shape):
            raise InputError(f"input {spec.name}: expected shape {spec.sizes}, got {list(shape)}")
        for axis, wanted in enumerate(spec.shape):
            if wanted is None:
                name, size = spec.axis_name(axis), shape[axis]
                low, high = limits.get(name, (size, size))
                if not low <= size <= high:
                    raise InputError(f"input {spec.name}: this engine takes a {name} of {low} to {high}, got {size}")
                if known.setdefault(name, size) != size:
                    raise InputError(
                        f"input {spec.name}: expected {name} {known[name]} as the inputs before it, got {size}"
                    )
