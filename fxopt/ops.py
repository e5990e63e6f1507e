"""Operators by canonical name: every spelling -> its name and its named arguments, by the table in `operator_table.py`.

`nn.ReLU`, `F.relu`, `torch.relu`, `Tensor.relu_` and `aten.relu.default` are all "relu". Passes ask for canonical names
through `Program.op` and `Program.call` and never list spellings themselves. A spelling that is not in the table is an
operator of its own, "unknown:<target>": nothing is assumed about it.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from fxopt.operator_table import OPERATORS, Operator

__all__ = ["DROPOUTS", "DYNAMIC", "HELD", "MODE_DEPENDENT", "Call", "cast", "is_known_module", "operators", "resolve"]

DROPOUTS = frozenset({"dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "drop_path"})
"""Operators that draw random zeros in training and hand their input on otherwise."""

MODE_DEPENDENT = DROPOUTS | {"batch_norm", "instance_norm", "lstm", "gru", "rnn", "multi_head_attention"}
"""Operators that are random, or update statistics, in training only."""

HELD = frozenset({"codebook_weight", "fake_quantized_weight", "packed_weight", "quantized_tensor"})
"""Operators that give a tensor of the model's which is, or will be, held in fewer bits: to compute it ahead would undo
that."""

DYNAMIC = frozenset({"dynamic_gru", "dynamic_linear", "dynamic_lstm"})
"""Layers that quantize what they read as they run."""


def cast(input: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:  # noqa: A002 (the operator's name for it)
    """The same values in another data type: "to" as passes spell it, to be told from casts of the model."""
    return input.to(dtype)


class Call(NamedTuple):
    """What a node calls.

    Attributes:
        op: canonical name.
        arguments: the node's arguments by canonical parameter name; values are nodes or constants.
        module: the module called, or None for functions and methods.
        inplace: whether the spelling writes into its first argument.
    """

    op: str
    arguments: Mapping[str, Any]
    module: nn.Module | None
    inplace: bool

    def option(self, name: str, default: Any = None) -> Any:
        """What was said of an option, or is by the module that is called; else the default."""
        return self.arguments.get(name, getattr(self.module, name, default))


def operators() -> Mapping[str, Operator]:
    """All canonical operators by name."""
    return {item.name: item for item in OPERATORS}


@lru_cache(maxsize=1)
def _index() -> tuple[dict[Any, Operator], dict[str, Operator], dict[str, Operator]]:
    """Lookup by function or class (object or qualified name), by method name, by ATen name."""
    targets: dict[Any, Operator] = {}
    methods: dict[str, Operator] = {}
    aten: dict[str, Operator] = {}
    for item in OPERATORS:
        targets.update(dict.fromkeys(item.functions + item.modules, item))
        methods.update(dict.fromkeys(item.methods, item))
        aten.update(dict.fromkeys(item.aten, item))
    return targets, methods, aten


def is_known_module(module: nn.Module) -> bool:
    """Whether the table has an operator for this class of modules."""
    targets = _index()[0]
    return type(module) in targets or _qualified(type(module)) in targets


def resolve(node: fx.Node, module: nn.Module | None) -> Call:
    """What `node` calls, by canonical name.

    Args:
        node: any node of a graph.
        module: the module it calls, for `call_module` nodes.
    """
    if node.op in ("placeholder", "get_attr", "output"):
        return Call(node.op, {}, None, False)
    targets, methods, aten = _index()
    found: Operator | None
    inplace = False
    if node.op == "call_module":
        found = targets.get(type(module)) or targets.get(_qualified(type(module)))
        inplace = bool(getattr(module, "inplace", False))
    elif node.op == "call_method":
        found = methods.get(str(node.target))
        inplace = str(node.target).endswith("_") and not str(node.target).endswith("__")
    elif isinstance(node.target, torch._ops.OpOverload):
        name = node.target.overloadpacket.__name__
        found = aten.get(name) if node.target.namespace == "aten" else targets.get(str(node.target))
        inplace = node.target._schema.is_mutable
    else:
        found = targets.get(node.target) or targets.get(_qualified(node.target))
        inplace = _is_inplace_function(node.target)
    if found is None:
        return Call(f"unknown:{_spell(node, module)}", _positional(node.args, node.kwargs), module, inplace)
    arguments = _named(found, node.args, node.kwargs)
    return Call(found.name, arguments, module, inplace or arguments.get("inplace") is True)


def _named(found: Operator, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    names = found.parameters
    if found.variadic and len(args) >= len(names):
        spread = args[len(names) - 1 :]
        if len(spread) > 1 or not isinstance(spread[0], tuple | list):
            args = (*args[: len(names) - 1], tuple(spread))
    arguments: dict[str, Any] = dict(zip(names, args, strict=False))
    for position, value in enumerate(args[len(names) :], start=len(names)):
        arguments[f"arg{position}"] = value
    for name, value in kwargs.items():
        arguments[names[0] if name in ("self", "x") and "self" not in names else name] = value
    return arguments


def _positional(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {f"arg{position}": value for position, value in enumerate(args)} | dict(kwargs)


def _is_inplace_function(target: Any) -> bool:
    name = getattr(target, "__name__", "")
    if target in (operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.setitem):
        return True
    return name.endswith("_") and not name.endswith("__")


def _spell(node: fx.Node, module: nn.Module | None) -> str:
    if node.op == "call_module":
        return _qualified(type(module))
    return str(node.target) if isinstance(node.target, str | torch._ops.OpOverload) else _qualified(node.target)


def _qualified(target: Any) -> str:
    module = getattr(target, "__module__", None) or "builtins"
    return f"{module}.{getattr(target, '__qualname__', getattr(target, '__name__', repr(target)))}"
