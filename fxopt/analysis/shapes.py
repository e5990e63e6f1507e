"""Shape and dtype of every value, found by running the graph on fake tensors (no arithmetic, no memory)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import fx
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

if TYPE_CHECKING:
    from fxopt.program import Program

__all__ = ["TensorSpec", "shapes"]


class TensorSpec(NamedTuple):
    """Shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{_SHORT.get(self.dtype, str(self.dtype).removeprefix('torch.'))}[{', '.join(map(str, self.shape))}]"


_SHORT = {
    torch.float32: "f32",
    torch.float64: "f64",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
}


def shapes(program: Program) -> Mapping[str, Any]:
    """By node name: a `TensorSpec`, a tuple of them for nodes that give several, or the plain value (sizes).

    Sizes are those of the example inputs.
    """
    recorder = _Recorder(program.flat_module())
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fakes = [mode.from_tensor(tensor.detach()) for tensor in program.example_inputs]
            recorder.run(*fakes)
    except (DataDependentOutputException, DynamicOutputShapeException):
        # a value depends on the data: only a real run knows its shape
        recorder.found.clear()
        recorder.run(*(tensor.detach().clone() for tensor in program.example_inputs))
    return recorder.found


class _Recorder(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.found: dict[str, Any] = {}

    def run(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return super().run(*args, **kwargs)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.found[n.name] = _spec(value)
        return value


def _spec(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return TensorSpec(tuple(value.shape), value.dtype)
    if isinstance(value, tuple | list):
        return tuple(_spec(item) for item in value)
    return value
