"""What ONNX Runtime computes sooner in other operators: functions between integers, and shuffled channels.

    hardsigmoid(x) = clip(x + 3, 0, 6) / 6      a sum, whose integers are cut off at both ends as they are
    hardswish(x)   = x hardsigmoid(x)           a sum and a product
    silu(x)        = x sigmoid(x)               a sigmoid (a table of 256 integers) and a product
    means over all places                       GlobalAveragePool
    channels shuffled by two reshapes           Gather: blocks of bytes are copied
    max_pool(relu(x)) = relu(max_pool(x))       in floating point, with integers behind it

The second factor has 8 bits, from 0 to the largest that it takes: of x it loses at most x / 510, which is about half a
step of the result. Measured (ONNX Runtime 1.32, AVX2, 200,000 numbers): hardswish takes 93 us so, and 190 in floating
point with the conversions; a mean 21 and 236. The transpose of shuffled channels it may run with places ahead of
channels, byte by byte (380 us for 91,000, and 8 as blocks); it does not look through a Gather. Conversions it moves
ahead of maxima, for which it has no fast kernel on integers with channels first (1.4 ms, and 0.04 in floating point);
an activation keeps them behind, and is then done by their rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxopt import edit
from fxopt.analysis.redundancy import PERMUTES, permutation
from fxopt.analysis.shapes import axes_of, shape_of
from fxopt.integer_scheme import UINT8
from fxopt.lowering.onnx_nodes import node as _node
from fxopt.quantization import Affine, dequantize, quantize

if TYPE_CHECKING:
    from fxopt.program import Program

__all__ = ["spell_functions"]

_GATES: Mapping[str, Callable[[Tensor], Tensor]] = {"hardswish": F.hardsigmoid, "silu": torch.sigmoid}
"""What each of these products multiplies a number by."""

_ROUNDING = 1e-6
_WIDTH = 6.0  # over which hardsigmoid rises from 0 to 1
_MEANS = frozenset({"mean", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"})
_MAXIMA = frozenset({"max_pool1d", "max_pool2d", "max_pool3d"})
_RESHAPES = frozenset({"view", "reshape"})
_COPIES = frozenset({"contiguous", "clone", "quantize", "dequantize"})
_FEWEST_AXES = 3


def spell_functions(program: Program) -> Program:
    """The program itself if it has no such function, else a copy in which they are spelled."""
    names = [node.name for node in program.nodes if _is_between_integers(program, node) and _is_spelled(program, node)]
    shuffles = [found for node in program.nodes if (found := _shuffle(program, node)) is not None]
    maxima = [node.name for node in program.nodes if _is_maximum(program, node)]
    if not names and not shuffles and not maxima:
        return program
    spelled = program.copy()
    for shuffle in shuffles:
        _spell_shuffle(spelled, shuffle)
    for name in maxima:
        _spell_maximum(spelled, spelled.node(name))
    for name in names:
        node = spelled.node(name)
        op = spelled.op(node)
        if op in _MEANS:
            _spell_mean(spelled, node)
        elif op == "hardsigmoid":
            _spell_gate(spelled, node)
        else:
            _spell_product(spelled, node)
    return spelled


class _Shuffle(NamedTuple):
    """Channels that are shuffled between groups.

    Attributes:
        node: name of what gives them.
        source: name of what gives them in order.
        order: which channel of the source stands where.
    """

    node: str
    source: str
    order: list[int]


def _shuffle(program: Program, node: fx.Node) -> _Shuffle | None:
    """The shuffle that a node ends: a call of it, or a reshape, a transpose and a reshape back; None if it is none."""
    shape = shape_of(program, node)
    if program.op(node) == "channel_shuffle":
        groups = program.call(node).option("groups")
        source = program.call(node).arguments["input"]
    else:
        steps = _reshaped_and_back(program, node)
        if not steps:
            return None
        _, swapped, grid, source = steps
        sizes = shape_of(program, grid)
        if (
            len(sizes) != len(shape) + 1
            or permutation(program, swapped, len(sizes)) != (0, 2, 1, *range(3, len(sizes)))
            or shape_of(program, source) != shape
            or sizes[0] != shape[0]
            or sizes[3:] != shape[2:]
        ):
            return None
        groups = sizes[1]
    if type(groups) is not int or len(shape) < _FEWEST_AXES or shape[1] % groups != 0:
        return None
    order = torch.arange(shape[1]).reshape(groups, -1).t().flatten().tolist()
    return _Shuffle(node.name, source.name, order)


def _reshaped_and_back(program: Program, node: fx.Node) -> list[fx.Node]:
    """A reshape, the permutation in front of it, the reshape in front of that, and what it reads; else nothing."""
    steps: list[fx.Node] = []
    rounded: set[Any] = set()
    for ops in (_RESHAPES, PERMUTES, _RESHAPES):
        while steps and program.op(node) in _COPIES:
            rounded |= {node.args[1:]} if program.op(node) in ("quantize", "dequantize") else set()
            node = program.call(node).arguments["input"]
        if program.op(node) not in ops:
            return []
        steps.append(node)
        node = program.call(node).arguments["input"]
    # what integers stand for is rounded to the same ones again
    known = {node.args[1:]} if program.op(node) == "dequantize" else set()
    return [*steps, node] if rounded <= known else []


def _spell_shuffle(program: Program, shuffle: _Shuffle) -> None:
    node = program.node(shuffle.node)
    order = edit.insert_tensor(program, node, torch.tensor(shuffle.order), name=f"{node.name}_order")
    edit.replace(program, node, torch.index_select, (program.node(shuffle.source), 1, order))
    edit.clean(program)


def _is_between_integers(program: Program, node: fx.Node) -> bool:
    """Whether a node reads nothing but what integers stand for, and is read as integers alone."""
    source, users = program.call(node).arguments.get("input"), list(node.users)
    if not isinstance(source, fx.Node) or program.op(source) != "dequantize":
        return False
    if len(users) != 1 or program.op(users[0]) != "quantize":
        return False
    return _affine(source).type == _affine(users[0]).type == UINT8


def _is_spelled(program: Program, node: fx.Node) -> bool:
    op = program.op(node)
    if op == "hardsigmoid":
        # its integers end where it does
        affine = _affine(next(iter(node.users)))
        return affine.zero_point == 0 and affine.range[1] < 1 + _ROUNDING
    return op in _GATES or (op in _MEANS and _means_all_places(program, node))


def _means_all_places(program: Program, node: fx.Node) -> bool:
    """Whether a node gives the mean of each channel."""
    call = program.call(node)
    source, given = (shape_of(program, item) for item in (call.arguments["input"], node))
    if len(source) < _FEWEST_AXES:
        return False
    if call.op != "mean":
        return call.op.endswith(f"{len(source) - 2}d") and given[2:] == (1,) * (len(source) - 2)
    axes = axes_of(call.arguments.get("dim"), len(source))
    return call.arguments.get("dtype") is None and sorted(axes) == list(range(2, len(source)))


def _is_maximum(program: Program, node: fx.Node) -> bool:
    """Whether a node gives maxima of what a relu gives to it alone, to be quantized."""
    if program.op(node) not in _MAXIMA or any(program.op(user) != "quantize" for user in node.users):
        return False
    source = program.call(node).arguments["input"]
    alone = len(source.users) == 1 and all(len(before.users) == 1 for before in source.all_input_nodes)
    return program.op(source) == "relu" and alone


def _spell_maximum(program: Program, node: fx.Node) -> None:
    relu = program.call(node).arguments["input"]
    edit.set_operand(program, [node], relu, program.call(relu).arguments["input"])
    edit.insert_after(program, node, torch.relu, (node,))
    edit.clean(program)


def _spell_mean(program: Program, node: fx.Node) -> None:
    """The mean as an operator of its own, whose integers lose the axes that the node does."""
    source = cast("fx.Node", program.call(node).arguments["input"])
    flat = len(shape_of(program, node)) < len(shape_of(program, source))
    (reader,) = node.users
    found = edit.replace(program, node, _GlobalMean(), (source,))
    if flat:
        affine = _affine(reader)
        codes = edit.insert_before(program, reader, quantize, (found, *affine.arguments))
        numbers = edit.insert_before(program, reader, dequantize, (codes, *affine.arguments))
        edit.set_operand(program, [reader], found, edit.insert_before(program, reader, torch.flatten, (numbers, 1)))


def _spell_gate(program: Program, node: fx.Node) -> None:
    """Hardsigmoid as the sum x + 3, whose integers are taken for a sixth of what they stand for."""
    (read,) = node.users
    affine = _affine(read)
    source = cast("fx.Node", program.call(node).arguments["input"])
    shifted = _shifted(program, node, source)
    edit.set_operand(program, [read], node, shifted)
    edit.set_arguments(program, read, (shifted, *affine._replace(scale=affine.scale * _WIDTH).arguments))
    edit.clean(program)


def _spell_product(program: Program, node: fx.Node) -> None:
    """A function x g(x) as the product of the integers of x and those of g."""
    op = program.op(node)
    source = cast("fx.Node", program.call(node).arguments["input"])
    _, highest = _affine(source).range
    affine = Affine.over(UINT8, 0.0, float(_GATES[op](torch.tensor(highest))))
    if op == "hardswish":
        gate, read = _shifted(program, node, source), affine._replace(scale=affine.scale * _WIDTH)
    else:
        gate, read = edit.insert_before(program, node, torch.sigmoid, (source,)), affine
    codes = edit.insert_before(program, node, quantize, (gate, *read.arguments))
    numbers = edit.insert_before(program, node, dequantize, (codes, *affine.arguments))
    edit.replace(program, node, torch.mul, (source, numbers))


def _shifted(program: Program, anchor: fx.Node, source: fx.Node) -> fx.Node:
    """The sum x + 3, of which the second is an integer too."""
    constant = edit.insert_before(program, anchor, _Half(), ())
    return edit.insert_before(program, anchor, torch.add, (source, constant))


def _affine(node: fx.Node) -> Affine:
    """Of a node that quantizes or dequantizes."""
    scale, zero_point, low, high, dtype = cast("tuple[Any, ...]", node.args[1:])
    return Affine(UINT8._replace(dtype=dtype, low=low, high=high), scale, zero_point)


class _GlobalMean(nn.Module):
    """GlobalAveragePool: [batch, channels, ...] to [batch, channels, 1, ...]."""

    def forward(self, value: Tensor) -> Tensor:
        sizes = (*value.shape[:2], *(1 for _ in value.shape[2:]))
        return _node("GlobalAveragePool", [value], torch.float32, sizes)


class _Half(nn.Module):
    """Half the width of hardsigmoid, as one integer. Engines look for a scalar."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.tensor(1, dtype=torch.uint8))
        self.register_buffer("scale", torch.tensor(_WIDTH / 2))
        self.register_buffer("zero_point", torch.tensor(0, dtype=torch.uint8))

    def forward(self) -> Tensor:
        operands = [self.codes, self.scale, self.zero_point]
        return _node("DequantizeLinear", operands, torch.float32, ())
