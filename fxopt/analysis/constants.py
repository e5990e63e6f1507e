"""Which values do not depend on the inputs, and what they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import fx, nn

from fxopt.analysis.effects import is_pure
from fxopt.analysis.shapes import TensorSpec, shapes
from fxopt.interpret import call_node
from fxopt.ops import HELD

if TYPE_CHECKING:
    from fxopt.program import Program

__all__ = ["Sources", "constants", "evaluate", "held_tensors", "needed_constants", "sources"]


class Sources(NamedTuple):
    """What a constant is computed from.

    Attributes:
        tensors: the nodes that bring tensors in execution order: `get_attr`, and calls of modules that hold some.
        inside: all nodes that take part, itself included.
        trained: those of `tensors` that bring parameters which a gradient reaches through it.
    """

    tensors: tuple[fx.Node, ...]
    inside: frozenset[fx.Node]
    trained: tuple[fx.Node, ...]


def constants(program: Program) -> frozenset[str]:
    """Names of the nodes of fixed value: tensors of the program that nothing writes, and pure functions of such.

    A tensor that is held in fewer bits is none: it is computed on purpose, to save the bytes.
    """
    written = {id(program.tensor_of(node)) for node in _written(program)}
    found: set[str] = set()
    for node in program.graph.nodes:
        fixed = is_pure(program, node) and id(program.tensor_of(node)) not in written
        fixed = fixed and program.op(node) not in HELD
        if fixed and all(source.name in found for source in node.all_input_nodes):
            found.add(node.name)
    return frozenset(found)


def needed_constants(program: Program) -> list[fx.Node]:
    """Constant tensors, other than the program's own, that something which is not constant reads."""
    fixed = program.analysis(constants)
    known = program.analysis(shapes)
    return [
        node
        for node in program.graph.nodes
        if node.name in fixed
        and node.op != "get_attr"
        and isinstance(known.get(node.name), TensorSpec)
        and any(user.name not in fixed for user in node.users)
    ]


def sources(program: Program, node: fx.Node) -> Sources:
    """What the constant `node` is computed from."""
    inside = _ancestors(node, through=lambda _: True)
    trained = _ancestors(node, through=lambda item: program.op(item) != "detach")
    tensors = [item for item in program.nodes if item in inside and held_tensors(program, item)]
    parameters = [item for item in tensors if item in trained and any(map(_trains, held_tensors(program, item)))]
    return Sources(tuple(tensors), frozenset(inside), tuple(parameters))


def held_tensors(program: Program, node: fx.Node) -> list[torch.Tensor]:
    """The program's own tensors that `node` reads: that of a `get_attr`, those of a called module."""
    tensor, module = program.tensor_of(node), program.module_of(node)
    own = [] if tensor is None else [tensor]
    return own if module is None else [*module.parameters(), *module.buffers()]


def evaluate(program: Program, node: fx.Node) -> torch.Tensor:
    """The value of a constant tensor, on memory of its own and contiguous."""
    inside = _ancestors(node, through=lambda _: True)
    values: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for item in program.graph.nodes:
            if item in inside:
                values[item] = _call(program, item, values)
    value: torch.Tensor = values[node]
    return value.detach().clone(memory_format=torch.contiguous_format)


def _call(program: Program, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    if node.op == "get_attr":
        return program.tensor_of(node)
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
    return call_node(node, program.module_of(node), args, kwargs)


def _ancestors(node: fx.Node, *, through: Any) -> set[fx.Node]:
    found, waiting = {node}, [node]
    while waiting:
        item = waiting.pop()
        for source in item.all_input_nodes if through(item) else ():
            if source not in found:
                found.add(source)
                waiting.append(source)
    return found


def _written(program: Program) -> Iterator[fx.Node]:
    """The `get_attr` nodes that some call writes into."""
    for node in program.graph.nodes:
        if program.call(node).inplace:
            yield from (source for source in node.all_input_nodes if source.op == "get_attr")


def _trains(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) and tensor.requires_grad
