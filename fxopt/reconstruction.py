"""Fits the layers of a rewritten program, one after the other, so that they give what they gave before.

The rewritten program is run beside the original, on the calibration data and operator by operator. Where they come to a
convolution or linear layer, its weight and bias are fitted by least squares (`fxopt/regression.py`): from the patches
that it reads in the rewritten program, in which the layers before it are fitted already, to what it gives in the
original. So a layer also makes up for what those before it could not. Where its output is scaled per channel, as by a
BatchNorm in evaluation mode, and then goes into nothing but a sum, the fit is to what gives the original's sum beside
the other operands as they are now.

As many batches are used as fit in memory, the first ones. Left as they are: layers that are called at several places,
transposed convolutions, patches of more than 4608 values.

References: ThiNet (arXiv:1707.06342) for the patches; Zhang et al. (arXiv:1505.06798) for the asymmetric fit; He et al.
(arXiv:1707.06168) for the sums.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, fx, nn

from fxopt import edit
from fxopt.analysis.constants import held_tensors
from fxopt.analysis.destinations import Destination, destination
from fxopt.analysis.liveness import unused_after, windows
from fxopt.analysis.patches import PatchLayer
from fxopt.analysis.shapes import shapes
from fxopt.errors import InputError
from fxopt.interpret import call_node
from fxopt.progress import progress
from fxopt.randomness import fixed_random_state
from fxopt.regression import Regression
from fxopt.sharing import buffers_restored

if TYPE_CHECKING:
    from fxopt.program import Program

__all__ = ["Slicer", "layers_behind", "reconstruct"]

_log = logging.getLogger(__name__)

Slicer = Callable[[str, Tensor], Tensor]
"""By the name of a node: of the value that it gives in the original, what the rewritten program has left."""

_LONGEST = 4608  # values of a patch: 512 channels under 3 x 3; the sums then take 340 MiB
_MEMORY = 2**30  # bytes of the original's activations; those of the rewritten program come on top
_MULTIPLIES = 2e11  # of a layer's sums: a few seconds
_ROWS_PER_VALUE = 16  # rows that are used in any case, per value of a patch
_LEAST_SCALE = 1e-3  # of the largest of a layer's channels
_CHUNK = 2**24  # numbers of patches that are held at a time


def layers_behind(program: Program, nodes: Collection[fx.Node]) -> Iterator[tuple[fx.Node, str | None]]:
    """The convolutions and linear layers that see what depends on the value of one of these nodes.

    Yields:
        The call, and why `reconstruct` leaves that layer as it is; None if it can be fitted.
    """
    behind: set[fx.Node] = set()
    uses = Counter(id(tensor) for node in program.nodes for tensor in held_tensors(program, node))
    for node in program.nodes:
        if any(source in nodes or source in behind for source in node.all_input_nodes):
            behind.add(node)
            call = program.call(node)
            if call.op == "linear" or call.op.startswith("conv"):
                yield node, _reason_not_to_fit(program, node, call.module, uses)


def _reason_not_to_fit(program: Program, node: fx.Node, layer: Any, uses: Mapping[int, int]) -> str | None:
    if layer is None:
        return "it is a function, not a module"
    if program.op(node).startswith("conv_transpose"):
        return "it is a transposed convolution"
    places = len(program.callers(node))
    if places > 1:
        return f"it is called at {places} places"
    if uses[id(layer.weight)] > 1:
        return "its weight is tied to another layer's"
    source = program.analysis(shapes)[cast("fx.Node", program.call(node).arguments["input"]).name]
    if len(source.shape) < (2 if program.op(node) == "linear" else layer.weight.ndim):
        return "what it reads has no batch axis"
    length = layer.weight[0].numel()
    return f"each output reads {length} values, and {_LONGEST} is the most" if length > _LONGEST else None


def reconstruct(program: Program, original: Program, layers: Iterable[str], left_of: Slicer) -> None:
    """Fits layers to what the original gives.

    Args:
        program: is edited; its nodes have the names that they have in the original.
        original: the program as it was, with calibration data, in evaluation mode.
        layers: names of the nodes that call them.
        left_of: what is left of a value of the original.

    Raises:
        InputError: if a name is not that of a node, the data do not fit the model, or values are not finite on them.
    """
    order = {node.name: place for place, node in enumerate(program.nodes)}
    wanted = sorted(layers, key=lambda name: order[program.node(name).name])
    goals = {name: _goal(program, name, order) for name in wanted}
    batches = next(windows(original, _MEMORY))
    with (
        progress("fitting layers", len(wanted), "layers") as advance,
        fixed_random_state(),
        torch.no_grad(),
        buffers_restored(original.module),
        buffers_restored(program.module),
    ):
        unused = unused_after(original), unused_after(program)
        pair = [(_Run(original, unused[0], inputs), _Run(program, unused[1], inputs)) for inputs in batches]
        for name in wanted:
            for before, after in pair:
                before.up_to(name)
                after.up_to(name, itself=False)
            _fit(program, name, [_Seen.of(name, *runs, goals[name], left_of) for runs in pair])
            advance(1)


class _Run:
    """A run of a program on one batch, as far as it has come."""

    def __init__(self, program: Program, unused: Mapping[fx.Node, Sequence[fx.Node]], inputs: Sequence[Tensor]) -> None:
        self._program = program
        self._nodes = iter(program.nodes)
        self._unused = unused
        self._next: fx.Node | None = None
        self.values: dict[str, Any] = {}
        for tensor in inputs:
            node = next(self._nodes)
            self.values[node.name] = tensor.detach().clone()

    def up_to(self, name: str, *, itself: bool = True) -> None:
        """Runs all nodes up to that one."""
        while True:
            node = self._next or next(self._nodes)
            self._next = node if node.name == name and not itself else None
            if self._next is None:
                self.values[node.name] = self._value(node)
                for over in self._unused[node]:
                    if over.name != name:
                        self.values.pop(over.name, None)
            if node.name == name:
                return

    def argument(self, name: str) -> Tensor:
        """What the layer called at a node reads."""
        source = cast("fx.Node", self._program.call(self._program.node(name)).arguments["input"])
        return cast("Tensor", self.values[source.name])

    def _value(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            return self._program.tensor_of(node)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda item: self.values[item.name])
        return call_node(node, self._program.module_of(node), args, kwargs)


class _Seen(NamedTuple):
    """What there is of one batch at a layer.

    Attributes:
        value: what it reads.
        target: what it is to give.
    """

    value: Tensor
    target: Tensor

    @classmethod
    def of(cls, name: str, before: _Run, after: _Run, goal: Destination, left_of: Slicer) -> _Seen:
        target = _float(left_of(name, before.values[name]))
        for other, factor in goal.others:
            off = _float(left_of(other, before.values[other])) - _float(after.values[other])
            target = target + off * (factor * _inverse(goal.scale)).to(off)
        return cls(after.argument(name), target)


def _goal(program: Program, name: str, order: Mapping[str, int]) -> Destination:
    """The sum that a layer is fitted to; without other operands if they are not all computed before it."""
    found = destination(program, program.node(name))
    return found if all(order[other] < order[name] for other, _ in found.others) else Destination(found.scale)


def _inverse(scale: Tensor) -> Tensor:
    """1 / scale; 0 where the layer has next to no say in the sum."""
    return torch.where(scale.abs() > _LEAST_SCALE * scale.abs().max(), 1 / scale, 0.0)


def _fit(program: Program, name: str, batches: Sequence[_Seen]) -> None:
    """Fits one layer to what there is of all batches."""
    node = program.node(name)
    layer = PatchLayer(cast("nn.Module", program.module_of(node)))
    regression = Regression(layer.weight)
    rows = sum(len(seen.value) * layer.positions(seen.target) for seen in batches)
    wanted = max(_ROWS_PER_VALUE * layer.length, _MULTIPLIES / (layer.groups * layer.length**2))
    share = min(1.0, wanted / max(rows, 1))
    generator = torch.Generator().manual_seed(0)
    done = 0
    for value, target in batches:
        # batches may differ in size, and so may the positions of their samples
        positions = layer.positions(target)
        each = math.ceil(positions * share)
        picks = torch.arange(positions) if each == positions else torch.randperm(positions, generator=generator)[:each]
        picks = picks.to(value.device)
        at_once = max(1, _CHUNK // max(1, each * layer.groups * layer.length))
        for half in range(2):
            mine = slice((done + half) % 2, None, 2)
            for part, wished in _together(value[mine], target[mine], at_once):
                regression.add(half, _float(layer.patches(part, wished, picks)), _float(layer.rows(wished, picks)))
        done += len(value)
    weight, bias, left, before = regression.solve()
    if not (weight.isfinite().all() and bias.isfinite().all()):
        raise InputError(f"what {name} reads or gives is not finite on the calibration data")
    _log.debug("%s: %.3g of the variance is left, %.3g before", name, left, before)
    edit.set_tensor(program, node, "weight", layer.as_weight(weight))
    edit.set_tensor(program, node, "bias", bias.reshape(-1).to(layer.dtype))


def _together(value: Tensor, target: Tensor, at_once: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Some samples of both at a time."""
    for start in range(0, len(value), at_once):
        yield value[start : start + at_once], target[start : start + at_once]


def _float(rows: Tensor) -> Tensor:
    return rows if rows.dtype.itemsize >= torch.float32.itemsize else rows.float()
