"""Removes a ReLU whose input is never negative.

    relu(x) = x   for x >= 0

It refuses a ReLU whose input may be negative, and says which operator that comes from.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fxopt import Pass, Program, Rewrite, Skip, edit

NEVER_NEGATIVE = frozenset({"abs", "exp", "hardsigmoid", "relu", "relu6", "sigmoid", "softmax", "sqrt", "square"})

# The sign of what goes in is the sign of what comes out. (Zeros that a pooling pads with are not negative either.)
KEEPS_SIGN = frozenset(
    {
        "adaptive_avg_pool2d", "adaptive_max_pool2d", "avg_pool2d", "contiguous", "dropout", "flatten", "identity",
        "max_pool2d", "permute", "reshape", "transpose", "view",
    }
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DropNeedlessRelu(Pass):
    """Removes a ReLU whose input is never negative.

    Attributes:
        look_through: also look behind operators that keep the sign, such as poolings.
    """

    name: ClassVar[str] = "drop_needless_relu"
    exact: ClassVar[bool] = True

    look_through: bool = True

    def plan(self, program: Program) -> Iterator[Rewrite | Skip]:
        for node in program.nodes:
            if program.op(node) != "relu":
                continue
            source = self._source(program, node)
            if program.op(source) in NEVER_NEGATIVE:
                yield Rewrite(node.name, f"drop: {program.op(source)} at {source.name} is never negative")
            else:
                yield Skip(node.name, f"its input may be negative: {program.op(source)} at {source.name}")

    def apply(self, program: Program, rewrite: Rewrite) -> None:
        node = program.node(rewrite.node)
        edit.bypass(program, node, program.call(node).arguments["input"])

    def _source(self, program: Program, node: fx.Node) -> fx.Node:
        """The node that decides the sign of the input of `node`."""
        source: fx.Node = program.call(node).arguments["input"]
        while self.look_through and program.op(source) in KEEPS_SIGN:
            source = program.call(source).arguments["input"]
        return source
