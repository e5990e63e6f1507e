"""Which parts of a program compute with integers, and so which of its values have to be quantized.

Layers with weights begin it: they read integers, and a convolution gives some, behind the activation that its kernel
takes in. From there on

    joins     (a sum, a product, a concatenation) and
    functions (a sigmoid, a mean over places) compute with integers where all that they read is quantized anyway, and
              somebody reads integers from them,
    layouts   (a reshape, a maximum over windows, a slice) hand integers on as they are: what they give has the range
              of what they read.

A value that an integer kernel gives is read as integers by everyone: else the engine would have to compute it twice.
One that a floating kernel gives is quantized for the integer kernels alone. A linear layer gives floating numbers
unless integers are asked for: its kernel can, and nothing is lost.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import fx

from fxopt.analysis.constants import constants
from fxopt.analysis.identities import is_identity
from fxopt.analysis.shapes import TensorSpec, shapes

if TYPE_CHECKING:
    from fxopt.program import Program

__all__ = ["Regions", "integer_regions"]

_JOINS = frozenset({"add", "cat", "mul"})
_FUNCTIONS = frozenset(
    {
        "hardsigmoid",
        "hardswish",
        "sigmoid",
        "silu",
        "mean",
        "avg_pool1d",
        "avg_pool2d",
        "avg_pool3d",
        "adaptive_avg_pool1d",
        "adaptive_avg_pool2d",
        "adaptive_avg_pool3d",
    }
)
_ACTIVATIONS = frozenset({"relu", "relu6", "hardtanh", "clamp"})
_PRODUCTS = frozenset({"matmul", "bmm"})
_SPLITS = frozenset({"chunk", "split", "unbind"})
_LAYOUTS = frozenset(
    {
        "identity",
        "contiguous",
        "clone",
        "detach",
        "view",
        "reshape",
        "flatten",
        "unflatten",
        "permute",
        "transpose",
        "t",
        "squeeze",
        "unsqueeze",
        "select",
        "slice",
        "narrow",
        "getitem",
        "flip",
        "roll",
        "expand",
        "channel_shuffle",
        "pixel_shuffle",
        "pixel_unshuffle",
        "max_pool1d",
        "max_pool2d",
        "max_pool3d",
    }
)


class Regions(NamedTuple):
    """What is quantized for some layers to compute with integers.

    Attributes:
        readers: by value to quantize, in the order of the program: who reads it as integers.
        same: by value that has the integers of another: that one.
    """

    readers: Mapping[str, tuple[str, ...]]
    same: Mapping[str, str]


def integer_regions(program: Program, layers: Collection[str]) -> Regions:
    """The regions that begin with some layers.

    Args:
        program: the program.
        layers: names of nodes that call convolutions, linear layers and matrix products.
    """
    return _Search(program, layers).found()


class _Search:
    def __init__(self, program: Program, layers: Collection[str]) -> None:
        self._program = program
        self._known = program.analysis(shapes)
        self._fixed = program.analysis(constants)
        self._readers: dict[str, set[str]] = {}
        self._same: dict[str, str] = {}
        self._giving: dict[str, str] = {}
        for node in program.nodes:
            if node.name in layers and program.op(node) in _PRODUCTS:
                for operand in node.all_input_nodes:
                    self._read(operand, node)
            elif node.name in layers:
                source, reader = cast("fx.Node", program.call(node).arguments["input"]), node
                if _pads_with_zeros(program, source):
                    # engines have kernels pad, but for this they must find it beside the layer
                    source, reader = cast("fx.Node", program.call(source).arguments["input"]), source
                self._read(source, reader)
                if program.op(node) != "linear":
                    self._give(node)

    def found(self) -> Regions:
        while self._extend():
            pass
        self._drop_unread()
        produced = {*self._giving.values(), *self._same}
        readers = {}
        for node in self._program.nodes:
            if node.name in produced:
                readers[node.name] = tuple(user.name for user in node.users)
            elif self._readers.get(node.name):
                readers[node.name] = tuple(user.name for user in node.users if user.name in self._readers[node.name])
        return Regions(readers, self._same)

    def _extend(self) -> bool:
        """Takes in joins and layouts whose operands are quantized; whether there were any."""
        grown = False
        for node in self._program.nodes:
            op = self._program.op(node)
            if node.name not in self._giving and (
                (op in _JOINS and self._is_join(node)) or (op in _FUNCTIONS and self._is_function(node))
            ):
                for source in node.all_input_nodes:
                    self._read(source, node)
                self._give(node)
                grown = True
            laid_out = self._laid_out(node)
            if laid_out is not None and node.name not in self._same and laid_out.name in self._quantized():
                self._same[node.name] = laid_out.name
                self._read(laid_out, self._reads_for(node))
                grown = True
        return grown

    def _quantized(self) -> set[str]:
        return {*self._readers, *self._giving.values(), *self._same}

    def _is_join(self, node: fx.Node) -> bool:
        call = self._program.call(node)
        operands = call.arguments.get("tensors", [call.arguments.get("input"), call.arguments.get("other")])
        if (
            call.inplace
            or call.arguments.get("alpha", 1) != 1
            or not isinstance(operands, (list, tuple))
            or not all(isinstance(each, fx.Node) for each in operands)
        ):
            return False
        quantized = self._quantized()
        return all(self._is_float(each) and each.name in quantized for each in operands)

    def _is_function(self, node: fx.Node) -> bool:
        call = self._program.call(node)
        source = call.arguments.get("input")
        return (
            not call.inplace
            and isinstance(source, fx.Node)
            and node.all_input_nodes == [source]
            and self._is_float(node)
            and self._is_float(source)
            and source.name in self._quantized()
        )

    def _laid_out(self, node: fx.Node) -> fx.Node | None:
        """Whose numbers a node gives in another layout; None if it computes."""
        op = self._program.op(node)
        if not self._is_float(node) or not (op in _LAYOUTS or is_identity(self._program, node)):
            return None
        source = self._program.call(node).arguments.get("input")
        if isinstance(source, fx.Node) and op == "getitem" and self._program.op(source) in _SPLITS:
            source = self._program.call(source).arguments.get("input")
        return source if isinstance(source, fx.Node) and self._is_float(source) else None

    def _reads_for(self, layout: fx.Node) -> fx.Node:
        """What reads the numbers that a layout gives: itself, or what splits them in front of it."""
        source = self._program.call(layout).arguments.get("input")
        return source if isinstance(source, fx.Node) and self._program.op(source) in _SPLITS else layout

    def _drop_unread(self) -> None:
        """What computes with integers for nobody computes with floating numbers, and a layout hands those on."""
        for node in reversed(self._program.nodes):
            op = self._program.op(node)
            if (
                node.name in self._giving
                and op in _JOINS | _FUNCTIONS
                and not self._readers.get(self._giving[node.name])
            ):
                del self._giving[node.name]
                for operand in node.all_input_nodes:
                    self._readers[operand.name].discard(node.name)
            elif node.name in self._same and not self._readers.get(node.name):
                source = self._same.pop(node.name)
                reader = self._reads_for(node)
                if not any(user.name in self._same for user in (reader.users if reader is not node else ())):
                    self._readers[source].discard(reader.name)

    def _is_float(self, node: fx.Node) -> bool:
        spec = self._known.get(node.name)
        is_float = isinstance(spec, TensorSpec) and spec.dtype is torch.float32
        return is_float and node.name not in self._fixed

    def _read(self, source: fx.Node, reader: fx.Node) -> None:
        self._readers.setdefault(source.name, set()).add(reader.name)

    def _give(self, node: fx.Node) -> None:
        self._giving[node.name] = _behind_activation(self._program, node).name


def _pads_with_zeros(program: Program, node: fx.Node) -> bool:
    """Whether a node puts zeros around what it reads, for one reader."""
    call = program.call(node)
    if call.op not in ("pad", "constant_pad") or len(node.users) != 1:
        return False
    filled = call.arguments.get("value") if call.module is None else 0
    return call.arguments.get("mode", "constant") == "constant" and filled in (None, 0)


def _behind_activation(program: Program, node: fx.Node) -> fx.Node:
    """The activation behind a node, if that is all that reads it and its kernel takes it in; else the node."""
    users = list(node.users)
    if len(users) != 1 or program.op(users[0]) not in _ACTIVATIONS:
        return node
    call = program.call(users[0])
    lowest: Any = call.arguments.get("min", 0 if call.op in ("relu", "relu6") else None)
    if call.op == "hardtanh":
        lowest = call.option("min_val", -1.0)
    return users[0] if lowest == 0 else node
