"""What is the same at every batch size: shapes and sizes compared between the example's batch and a very different one.

A reshape that changes nothing at the example's batch of 1 may well change something at 2. The other batch size is a
large prime: no axis is likely to have it, and sums, quotients and remainders of it differ from those of a small batch.
Fake tensors need no memory for it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from fxopt.analysis.shapes import TensorSpec, shapes
from fxopt.interpret import run_graph
from fxopt.sharing import share_module

if TYPE_CHECKING:
    from fxopt.program import Program

__all__ = ["BatchShapes", "batch_shapes"]

_log = logging.getLogger(__name__)
_OTHER_SIZE = 7919


class BatchShapes:
    """Shapes at all batch sizes, as far as they are known.

    Attributes:
        samples: by node name what `shapes` gives, for the example's batch, and for another if the batch is free.
    """

    def __init__(self, *samples: Mapping[str, Any]) -> None:
        self.samples = samples

    def spec(self, node: fx.Node) -> TensorSpec | None:
        """Shape and dtype of a tensor at the example's batch; None for what is no tensor."""
        found = self.samples[0].get(node.name)
        return found if isinstance(found, TensorSpec) else None

    def number(self, node: fx.Node) -> int | float | None:
        """The number that `node` gives at every batch size; None if it varies, or is no number."""
        first, *others = [sample.get(node.name) for sample in self.samples]
        if not isinstance(first, int | float):
            return None
        return first if all(type(value) is type(first) and value == first for value in others) else None

    def same(self, node: fx.Node, other: fx.Node) -> bool:
        """Whether both are tensors of one shape and dtype, at every batch size."""
        pairs = [(sample.get(node.name), sample.get(other.name)) for sample in self.samples]
        return all(isinstance(left, TensorSpec) and left == right for left, right in pairs)

    def literal_shape(self, node: fx.Node) -> list[int] | None:
        """The shape as an argument of `reshape`, -1 for the one axis that varies; None if more than one does."""
        found = [sample.get(node.name) for sample in self.samples]
        specs = [spec for spec in found if isinstance(spec, TensorSpec)]
        if len(specs) != len(found) or len({len(spec.shape) for spec in specs}) != 1:
            return None
        axes = [set(sizes) for sizes in zip(*(spec.shape for spec in specs), strict=True)]
        literal = [axis.pop() if len(axis) == 1 else -1 for axis in axes]
        return None if literal.count(-1) > 1 or 0 in literal else literal


def batch_shapes(program: Program) -> BatchShapes | None:
    """An analysis; None if a shape or size depends on data, or if an operator refuses the other batch size."""
    for attempt in (_on_meta, _on_fakes):
        try:
            other = attempt(program)
        except Exception as error:  # noqa: BLE001 (operators refuse values without data in many ways: nothing is assumed then)
            _log.debug("shapes at another batch size %s: %s", attempt.__name__, error)
        else:
            return BatchShapes(program.analysis(shapes), other)
    return None


def _on_meta(program: Program) -> Mapping[str, Any]:
    """Shapes at the other batch size, or at the example's if that is fixed: what has no data depends on none."""
    twin = program.copy()
    twin.example_inputs = tuple(_resized(program, index, "meta") for index in range(len(program.example_inputs)))
    return shapes(twin)


def _on_fakes(program: Program) -> Mapping[str, Any]:
    """The same for programs that name a device."""
    found: dict[str, Any] = {}

    def record(node: fx.Node, value: Any) -> None:
        found[node.name] = TensorSpec(tuple(value.shape), value.dtype) if isinstance(value, torch.Tensor) else value

    with FakeTensorMode(allow_non_fake_inputs=True):
        inputs = [_resized(program, index, tensor.device) for index, tensor in enumerate(program.example_inputs)]
        run_graph(share_module(program.module), program.graph, inputs, record)
    return found


def _resized(program: Program, index: int, device: str | torch.device) -> torch.Tensor:
    tensor = program.example_inputs[index]
    batched = program.batch is not None and index in program.batch.inputs
    shape = (_OTHER_SIZE, *tensor.shape[1:]) if batched else tuple(tensor.shape)
    return torch.empty(shape, dtype=tensor.dtype, device=device)
