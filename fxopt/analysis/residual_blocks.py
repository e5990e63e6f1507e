"""Residual blocks: sums of a value, or a 1 x 1 convolution of it, and a chain of convolutions of the same value.

    z = shortcut(x) + branch(x)

The branch is made of convolutions, BatchNorms and elementwise operators, each of which only the next one reads. Of the
branch is found which part of x an output depends on: its receptive field.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from torch import fx, nn

from fxopt.analysis.affine import formula_of
from fxopt.analysis.costs import macs_by_node
from fxopt.analysis.identities import is_identity
from fxopt.analysis.patches import padding_along
from fxopt.analysis.shapes import TensorSpec, shapes
from fxopt.analysis.weight_uses import reason_shared
from fxopt.masking import mask_of
from fxopt.ops import operators

if TYPE_CHECKING:
    from fxopt.program import Program

__all__ = ["Field", "ResidualBlock", "block_module", "residual_block"]


class Field(NamedTuple):
    """The receptive field of a chain of convolutions along one axis.

    Attributes:
        size: how many input positions an output depends on, those in between included.
        start: where it begins for the first output; negative in the padding.
        stride: how far it moves from output to output.
        step: the distance of the positions in it, if they are not all of them.
    """

    size: int
    start: int
    stride: int
    step: int


class ResidualBlock(NamedTuple):
    """A residual block.

    Attributes:
        source: gives x.
        branch: the nodes of the branch, in the order in which they run.
        shortcut: the nodes of the shortcut, likewise; none, or identities, where x itself is added.
        fields: of the branch, per axis.
        inputs: shape of x.
        outputs: shape of z.
        macs: of branch and shortcut, for the example.
    """

    source: fx.Node
    branch: tuple[fx.Node, ...]
    shortcut: tuple[fx.Node, ...]
    fields: tuple[Field, Field]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    macs: int

    def convolutions(self, program: Program) -> list[fx.Node]:
        """The nodes of the branch that call one."""
        return [node for node in self.branch if program.op(node) == "conv2d"]


def residual_block(program: Program, node: fx.Node) -> ResidualBlock | str:
    """The two-dimensional residual block that ends in a sum, or why there is none.

    Args:
        program: the program.
        node: an "add".
    """
    call = program.call(node)
    operands = [call.arguments.get(name) for name in ("input", "other")]
    if not all(isinstance(operand, fx.Node) for operand in operands):
        return "it adds a constant"
    if call.arguments.get("alpha", 1) != 1:
        return "it scales what it adds"
    known = program.analysis(shapes)
    spec = known[node.name]
    if not isinstance(spec, TensorSpec) or any(known[cast("fx.Node", operand).name] != spec for operand in operands):
        return "what it adds has not the shape and type of the sum"
    chains = [_chain(program, cast("fx.Node", operand)) for operand in operands]
    source = next((item for item in chains[0] if item in chains[1]), None)
    if source is None:
        ends = [f"{chain[-1].name} ({program.op(chain[-1])})" for chain in chains]
        return f"its operands come from different values: {ends[0]} and {ends[1]}"
    paths = [tuple(reversed(chain[: chain.index(source)])) for chain in chains]
    shortcut, branch = sorted(paths, key=lambda path: (sum(program.op(item) == "conv2d" for item in path), len(path)))
    if not _is_shortcut(program, shortcut):
        return f"neither operand is {source.name} or a 1 x 1 convolution of it"
    convolutions = [item for item in branch if program.op(item) == "conv2d"]
    if not convolutions:
        return f"neither operand is made of two-dimensional convolutions of {source.name}"
    if len(spec.shape) != 4:
        return "its values have no batch axis"
    reason = next((found for item in (*branch, *shortcut) if (found := _reason(program, item)) is not None), None)
    if reason is not None:
        return reason
    layers = [program.module_of(item) for item in convolutions]
    costs = program.analysis(macs_by_node)
    return ResidualBlock(
        source,
        branch,
        shortcut,
        (_field(layers, 0), _field(layers, 1)),
        known[source.name].shape,
        spec.shape,
        sum(costs.get(item.name, 0) for item in (*branch, *shortcut)),
    )


def block_module(program: Program, node: fx.Node, block: ResidualBlock) -> fx.GraphModule:
    """A residual block as a module of its own, from x to z; it shares the program's layers.

    Args:
        program: the program.
        node: the sum that ends the block.
        block: the block.
    """
    graph = fx.Graph()
    values = {block.source: graph.placeholder("x")}
    layers: dict[str, nn.Module] = {}
    for item in (*block.branch, *block.shortcut, node):
        if item in values:
            continue
        values[item] = copied = graph.node_copy(item, lambda argument: values[argument])
        module = program.module_of(item)
        if module is not None:
            # names that say nothing of where the block is: equal blocks are equal programs
            copied.target = f"layer{len(layers)}"
            layers[copied.target] = module
    graph.output(values[node])
    return fx.GraphModule(layers, graph)


def _chain(program: Program, node: fx.Node) -> list[fx.Node]:
    """A node and what it is computed from, as far back as that is one value."""
    found = [node]
    while _passes(program, node):
        (node,) = node.all_input_nodes
        found.append(node)
    return found


def _passes(program: Program, node: fx.Node) -> bool:
    """Whether a node may be part of a branch: of one value, at the same or neighbouring positions."""
    if len(node.all_input_nodes) != 1:
        # a convolution by a weight that is computed is told from other operators later
        return False
    op = program.op(node)
    known = operators()
    return op in ("conv2d", "batch_norm") or (op in known and known[op].elementwise) or is_identity(program, node)


def _is_shortcut(program: Program, path: Sequence[fx.Node]) -> bool:
    """Whether it is no more than a 1 x 1 convolution and a BatchNorm."""
    layers = [node for node in path if not is_identity(program, node)]
    ops = [program.op(node) for node in layers]
    first: Any = program.module_of(layers[0]) if layers else None
    return not layers or (ops in (["conv2d"], ["conv2d", "batch_norm"]) and set(first.kernel_size) == {1})


def _reason(program: Program, node: fx.Node) -> str | None:
    """Why a node of a block cannot go; None if it can."""
    if len(node.users) > 1:
        return f"{node.name} is read elsewhere too"
    op = program.op(node)
    if op == "batch_norm":
        formula = formula_of(program, node)
        return formula if isinstance(formula, str) else None
    if op != "conv2d":
        return None
    layer: Any = program.module_of(node)
    shared = reason_shared(program, node)
    if shared is not None:
        return f"{node.target}: {shared}"
    if layer.groups > 1:
        return f"{node.target} is grouped, and a block is dense"
    if mask_of(layer) is not None:
        return f"{node.target} has a mask, which would be lost: substitute before prune_weights"
    return None


def _field(layers: Sequence[Any], axis: int) -> Field:
    size, start, jump, step = 1, 0, 1, 0
    for layer in layers:
        if layer.kernel_size[axis] > 1:
            step = gcd(step, jump * layer.dilation[axis])
        start -= jump * padding_along(layer, axis)[0]
        size += jump * layer.dilation[axis] * (layer.kernel_size[axis] - 1)
        jump *= layer.stride[axis]
    return Field(size, start, jump, step or 1)
