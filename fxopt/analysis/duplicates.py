"""Value numbering: for every node the first node that has the same value.

Two calls have the same value if they call the same operator with the same values, and are pure. A node whose value
another one has already (see `redundancy`) counts as that one, so that whole chains are recognised at once.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from fxopt.analysis.effects import is_pure
from fxopt.analysis.redundancy import Redundant, redundant
from fxopt.ops import is_known_module

if TYPE_CHECKING:
    from fxopt.program import Program

__all__ = ["Values", "values"]


class Values:
    """What every node is worth, by name: copies of a program share their analyses, but not their nodes.

    Attributes:
        first: for every node the first that has its value, perhaps itself.
        redundant: what a node that repeats the value of an operand does.
        kept: why a node that does so must stay.
    """

    def __init__(self) -> None:
        self.first: dict[str, str] = {}
        self.redundant: dict[str, str] = {}
        self.kept: dict[str, str] = {}


def values(program: Program) -> Values:
    """An analysis. Nodes are compared in execution order, so the first of equal ones runs before all others."""
    found = Values()
    known: dict[Hashable, str] = {}
    for node in program.graph.nodes:
        repeats = redundant(program, node)
        found.first[node.name] = node.name
        if isinstance(repeats, Redundant):
            found.redundant[node.name] = repeats.why
            found.first[node.name] = found.first[repeats.source.name]
            continue
        if isinstance(repeats, str):
            found.kept[node.name] = repeats
        if is_pure(program, node):
            found.first[node.name] = known.setdefault(_key(program, node, found.first), node.name)
    return found


def _key(program: Program, node: fx.Node, first: Mapping[str, str]) -> Hashable:
    if node.op == "get_attr":
        return "get_attr", id(program.tensor_of(node))
    call = program.call(node)
    arguments = tuple(sorted((name, _frozen(value, first)) for name, value in call.arguments.items()))
    return call.op, None if call.module is None else _identity(call.module), arguments


def _identity(module: nn.Module) -> Hashable:
    """Equal for modules that do the same: one object, or two known ones of the same configuration without tensors."""
    if not is_known_module(module) or any(True for _ in (*module.parameters(), *module.buffers())):
        return id(module)
    configuration = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    return type(module), repr(sorted(configuration.items()))


def _frozen(value: Any, first: Mapping[str, str]) -> str:
    """A text that tells values apart: 1 from 1.0, 0.0 from -0.0, a list from a tuple."""
    if isinstance(value, fx.Node):
        return f"%{first[value.name]}"
    if isinstance(value, tuple | list):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return f"{kind}({', '.join(_frozen(item, first) for item in value)})"
    if isinstance(value, slice):
        return f"slice({', '.join(_frozen(item, first) for item in (value.start, value.stop, value.step))})"
    if isinstance(value, dict):
        return f"dict({', '.join(f'{key!r}: {_frozen(item, first)}' for key, item in value.items())})"
    return f"tensor at {id(value)}" if isinstance(value, torch.Tensor) else repr(value)
