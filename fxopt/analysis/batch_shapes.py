"""What is the same at every batch size: shapes and sizes compared between the example's batch and a very different one.

A reshape that changes nothing at the example's batch of 1 may well change something at 2. The other batch size is a large
prime: no axis is likely to have it, and sums, quotients and remainders of it differ from those of a small batch. Fake tensors
need no memory for it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from fxopt.analysis.shapes import TensorSpec, shapes

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
        values = [sample.get(node.name) for sample in self.samples]
        first = values[0]
        plain = isinstance(first, int | float) and all(type(value) is type(first) and value == first for value in values)
        return first if plain else None

    def same(self, node: fx.Node, other: fx.Node) -> bool:
        """Whether both are tensors of one shape and dtype, at every batch size."""
        pairs = [(sample.get(node.name), sample.get(other.name)) for sample in self.samples]
        return all(isinstance(left, TensorSpec) and left == right for left, right in pairs)

    def literal_shape(self, node: fx.Node) -> list[int] | None:
        """The shape as an argument of `reshape`, -1 for the one axis that varies; None if more than one does."""
        specs = [sample.get(node.name) for sample in self.samples]
        if not all(isinstance(spec, TensorSpec) for spec in specs) or len({len(spec.shape) for spec in specs}) != 1:
            return None
        axes = [set(sizes) for sizes in zip(*(spec.shape for spec in specs), strict=True)]
        literal = [axis.pop() if len(axis) == 1 else -1 for axis in axes]
        return None if literal.count(-1) > 1 or 0 in literal else literal


def batch_shapes(program: Program) -> BatchShapes | None:
    """An analysis; None if a shape or size depends on data, or if an operator refuses the other batch size."""
    try:
        other = _on_fakes(program)
    except Exception as error:  # noqa: BLE001 (any operator may refuse fake values in its own way: nothing is assumed then)
        _log.info("shapes at another batch size are not known: %s: %s", type(error).__name__, error)
        return None
    return BatchShapes(program.analysis(shapes), other)


def _on_fakes(program: Program) -> Mapping[str, Any]:
    """Shapes at the other batch size, or at the example's if that is fixed: only fakes prove that no data is looked at."""
    recorder = _Recorder(program.flat_module())
    batched = () if program.batch is None else program.batch.inputs
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        inputs = [
            _resized(tensor) if index in batched else mode.from_tensor(tensor.detach())
            for index, tensor in enumerate(program.example_inputs)
        ]
        recorder.run(*inputs)
    return recorder.found


def _resized(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty((_OTHER_SIZE, *tensor.shape[1:]), dtype=tensor.dtype, device=tensor.device)


class _Recorder(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.found: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.found[n.name] = TensorSpec(tuple(value.shape), value.dtype) if isinstance(value, torch.Tensor) else value
        return value
