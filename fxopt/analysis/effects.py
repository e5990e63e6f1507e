"""What a call does besides giving its value: whether it is random, or changes state.

Only pure calls may be merged or folded.
"""

from __future__ import annotations

import types
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxopt.analysis.identities import is_identity
from fxopt.ops import DROPOUTS, MODE_DEPENDENT, Call

if TYPE_CHECKING:
    from fxopt.program import Program

__all__ = ["is_pure"]

_BUILTINS = frozenset({int, float, bool, len, max, min, abs})


def is_pure(program: Program, node: fx.Node) -> bool:
    """Whether the same arguments always give `node` the same value, and running it changes nothing.

    What is not known to be pure is not: calls of other libraries, modules that the operator table does not know.
    """
    call = program.call(node)
    if call.op in ("placeholder", "output") or call.inplace:
        return False
    if call.op == "get_attr":
        return True
    if call.op.startswith("unknown:"):
        return _is_pure_target(node)
    if call.op in DROPOUTS:
        return is_identity(program, node)
    if call.op in MODE_DEPENDENT:
        return _keeps_no_statistics(call) or _evaluates(call)
    if call.op == "embedding":
        limit = call.arguments.get("max_norm") if call.module is None else call.module.max_norm
        return limit is None
    return call.op != "scaled_dot_product_attention" or bool(call.arguments.get("dropout_p", 0.0) == 0.0)


def _keeps_no_statistics(call: Call) -> bool:
    if call.op not in ("batch_norm", "instance_norm"):
        return False
    kept = call.arguments.get("running_mean") if call.module is None else call.module.running_mean
    return kept is None


def _evaluates(call: Call) -> bool:
    return call.arguments.get("training") is False if call.module is None else not call.module.training


def _is_pure_target(node: fx.Node) -> bool:
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        name = target.overloadpacket.__name__
        if name in ("batch_norm", "instance_norm") and target.namespace == "aten":
            return node.args[3] is None  # running_mean, which its schema does not say is written
        return target.namespace == "aten" and not target._schema.is_mutable and _is_pure_operator(name)
    if node.op == "call_method":
        return not str(target).endswith("_") and _is_pure_operator(str(target))
    if node.op != "call_function":
        return False
    if getattr(target, "__module__", None) in ("_operator", "math") or target in _BUILTINS:
        return True
    # A function written in Python may draw random numbers around the operator of the same name.
    return isinstance(target, types.BuiltinFunctionType) and _is_pure_operator(target.__name__)


@lru_cache(maxsize=1024)
def _is_pure_operator(name: str) -> bool:
    """Whether ATen has an operator of this name, with no overload that is random, uninitialised or keeps statistics."""
    if name.startswith(("empty", "new_empty")) or "batch_norm" in name or "instance_norm" in name:
        return False
    packet = getattr(torch.ops.aten, name, None)
    if packet is None:
        return False
    overloads = [getattr(packet, overload) for overload in packet.overloads()]
    random = any(torch.Tag.nondeterministic_seeded in overload.tags for overload in overloads)
    writes = any(item._schema.is_mutable and "out" not in item._overloadname for item in overloads)
    return not random and not writes
