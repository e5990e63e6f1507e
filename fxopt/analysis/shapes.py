"""Shape and dtype of every value of a program, at the sizes of the example inputs.

Found without arithmetic, by running the graph on meta tensors, or on fake ones where an operator insists on a device. A
real run knows the shapes too: `record_shapes` keeps what it saw, so that verification pays for the analysis.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import fx

from fxopt.interpret import Watch, run_graph
from fxopt.recurrent_shapes import ShapesAlone
from fxopt.sharing import share_module

if TYPE_CHECKING:
    from fxopt.program import Program

__all__ = ["TensorSpec", "axes_of", "record_shapes", "shape_of", "shapes", "specs_in"]

_log = logging.getLogger(__name__)


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
    """By node name: a `TensorSpec`, a tuple of them for nodes that give several, or the plain value (sizes)."""
    for attempt in (_on_meta, _on_fakes):
        try:
            return attempt(program)
        except Exception as error:  # noqa: BLE001 (operators that have no kernel for it refuse in many ways; the next one decides)
            _log.debug("shapes %s: %s", attempt.__name__, error)
    record_shapes(program)
    return program.analysis(shapes)


def axes_of(given: Any, rank: int) -> list[int]:
    """The axes that an operator is given, one or several, counted from the front; none if that are no numbers."""
    listed = list(given) if isinstance(given, tuple | list) else [given]
    return [axis % rank for axis in listed] if all(isinstance(axis, int) for axis in listed) else []


def shape_of(program: Program, value: Any) -> tuple[int, ...]:
    """The shape of what a node gives; empty for what is no tensor, or no node."""
    spec = program.analysis(shapes).get(value.name) if isinstance(value, fx.Node) else None
    return tuple(spec.shape) if isinstance(spec, TensorSpec) else ()


def record_shapes(program: Program) -> tuple[torch.Tensor, ...]:
    """Runs the program on its example inputs, and keeps the shapes that it saw as the program's `shapes`.

    Returns:
        The flat outputs.
    """
    found: dict[str, Any] = {}
    outputs = program.run(*program.example_inputs, watch=_recorder(found))
    program.remember(shapes, found)
    return outputs


def specs_in(known: Any) -> Iterator[TensorSpec]:
    """The tensors in what is known of a node, or of several, however nested."""
    if isinstance(known, TensorSpec):
        yield known
    elif isinstance(known, tuple | list):
        for item in known:
            yield from specs_in(item)


def _on_meta(program: Program) -> dict[str, Any]:
    """A run on tensors without storage: fast, but every operator must have a meta kernel and name no device."""
    root = share_module(program.module)
    for module in root.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                tensors[name] = None if tensor is None else _meta(tensor)
    found: dict[str, Any] = {}
    with torch.device("meta"), ShapesAlone():
        run_graph(root, program.graph, [_meta(tensor) for tensor in program.example_inputs], _recorder(found))
    return found


def _on_fakes(program: Program) -> dict[str, Any]:
    from torch._subclasses.fake_tensor import FakeTensorMode

    found: dict[str, Any] = {}
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, ShapesAlone():
        inputs = [mode.from_tensor(tensor.detach()) for tensor in program.example_inputs]
        run_graph(share_module(program.module), program.graph, inputs, _recorder(found))
    return found


def _meta(tensor: torch.Tensor) -> Any:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _recorder(found: dict[str, Any]) -> Watch:
    def record(node: fx.Node, value: Any) -> None:
        found[node.name] = _spec(value)

    return record


def _spec(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return TensorSpec(tuple(value.shape), value.dtype)
    if isinstance(value, tuple | list):
        return tuple(_spec(item) for item in value)
    return value
