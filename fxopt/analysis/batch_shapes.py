"""What is the same at every batch size: shapes and sizes compared between the example's batch and a very different one.

A reshape that changes nothing at the example's batch of 1 may well change something at 2. The other batch size is a
large prime: no axis is likely to have it, and sums, quotients and remainders of it differ from those of a small batch.
Fake tensors need no memory for it. Other axes of any size (`fxopt/free_axes.py`) become far larger, too, by an odd
factor, as they may have to be multiples of something; or, where the program refuses that, have the size that is known
to work.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from fxopt.analysis.shapes import TensorSpec, shapes
from fxopt.interpret import run_graph
from fxopt.recurrent_shapes import ShapesAlone
from fxopt.sharing import share_module

if TYPE_CHECKING:
    from fxopt.program import Program

__all__ = ["BatchShapes", "batch_shapes"]

_log = logging.getLogger(__name__)
_OTHER_SIZE = 7919
_FAR = 121  # times the example's size, odd like all that follow for further axes


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
    # what a program makes on a device of its own would be real, and as large as the other sizes say
    attempts = (_on_fakes,) if _names_a_device(program) else (_on_meta, _on_fakes)
    for far, attempt in product((True, False) if program.free_axes else (True,), attempts):
        try:
            other = attempt(program, far=far)
        except Exception as error:  # noqa: BLE001 (operators refuse values without data in many ways: nothing is assumed then)
            _log.debug("shapes at other sizes, %s, far=%s: %s", attempt.__name__, far, error)
        else:
            return BatchShapes(program.analysis(shapes), other)
    return None


def _names_a_device(program: Program) -> bool:
    return any(isinstance(value, torch.device) for node in program.nodes for value in node.kwargs.values())


def _on_meta(program: Program, *, far: bool) -> Mapping[str, Any]:
    """Shapes at the other sizes, or at the example's where they are fixed: what has no data depends on none."""
    twin = program.copy()
    devices: list[str | torch.device] = ["meta"] * len(program.example_inputs)
    twin.example_inputs = _resized(program, devices, far=far)
    return shapes(twin)


def _on_fakes(program: Program, *, far: bool) -> Mapping[str, Any]:
    """The same for programs that name a device."""
    found: dict[str, Any] = {}

    def record(node: fx.Node, value: Any) -> None:
        found[node.name] = TensorSpec(tuple(value.shape), value.dtype) if isinstance(value, torch.Tensor) else value

    with FakeTensorMode(allow_non_fake_inputs=True), ShapesAlone():
        inputs = _resized(program, [tensor.device for tensor in program.example_inputs], far=far)
        run_graph(share_module(program.module), program.graph, inputs, record)
    return found


def _resized(program: Program, devices: Sequence[str | torch.device], *, far: bool) -> tuple[torch.Tensor, ...]:
    """Tensors of the other sizes, on these devices."""
    carriers = program.batch.inputs if program.batch is not None else ()
    sizes = {(index, 0): _OTHER_SIZE for index in carriers}
    for rank, axis in enumerate(program.free_axes):
        sizes |= dict.fromkeys(axis.places, axis.size * (_FAR + 2 * rank) if far else axis.other)
    return tuple(
        torch.empty(
            [sizes.get((index, axis), size) for axis, size in enumerate(tensor.shape)],
            dtype=tensor.dtype,
            device=device,
        )
        for index, (tensor, device) in enumerate(zip(program.example_inputs, devices, strict=True))
    )
