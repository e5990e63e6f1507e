"""Removes in-place operations from a captured graph: each value is written once, so that no rewrite reorders writes.

`x.add_(y)` becomes `x.add(y)`, and every later use of `x` takes the result. That is the same program unless something
else looks at the memory of `x`: a view made earlier and read later. Then the graph is refused with the reason.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxopt.errors import CaptureError
from fxopt.ops import Call, resolve

__all__ = ["functionalize"]

_VIEWS = frozenset(
    "view reshape flatten unflatten permute transpose t squeeze unsqueeze expand split chunk unbind select slice "
    "narrow getitem identity detach contiguous dropout dropout1d dropout2d dropout3d alpha_dropout drop_path to float "
    "getattr".split()
)
_PURE_FUNCTIONS: dict[Any, Any] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}


def functionalize(module: fx.GraphModule) -> None:
    """Rewrites a private graph, before it becomes a program.

    Raises:
        CaptureError: if an in-place operation has no pure counterpart, or its memory is seen through another value.
    """
    position = {node: index for index, node in enumerate(module.graph.nodes)}
    for node in list(module.graph.nodes):
        owner = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        call = resolve(node, owner)
        if not call.inplace:
            continue
        written = node.args[0] if node.args else call.arguments.get("input")
        if not isinstance(written, fx.Node):
            raise CaptureError(f"{node.name} writes into {written!r}, which is no value of the graph")
        if written.op == "get_attr":
            # state of the model (a counter, a cache): the write is meant to stay
            continue
        watcher = _watcher(module, node, written, position)
        if watcher is not None:
            raise CaptureError(f"{node.name} writes into {written.name}, whose memory {watcher.name} reads later")
        _make_pure(node, call)
        for user in list(written.users):
            if position.get(user, -1) > position[node]:
                user.replace_input_with(written, node)
    module.graph.lint()
    module.recompile()


def _watcher(module: fx.GraphModule, node: fx.Node, written: fx.Node, position: dict[fx.Node, int]) -> fx.Node | None:
    """A value before `node` that shares the memory of `written` and is read after `node`; None if there is none."""
    shared = {written}
    pending = [written]
    while pending:
        value = pending.pop()
        relatives = [user for user in value.users if user is not node and _is_view(module, user, value)]
        source = value.args[0] if value.args else None
        if isinstance(source, fx.Node) and _is_view(module, value, source):
            relatives.append(source)
        for relative in relatives:
            # a view made after the write sees what was written, as it should
            if relative not in shared and position.get(relative, -1) < position[node]:
                shared.add(relative)
                pending.append(relative)
    for value in shared - {written}:
        if any(position.get(user, -1) > position[node] and user not in shared for user in value.users):
            return value
    return None


def _is_view(module: fx.GraphModule, node: fx.Node, source: fx.Node) -> bool:
    """Whether the value of `node` may share memory with that of its first argument."""
    if not node.args or node.args[0] is not source:
        return False
    owner = module.get_submodule(str(node.target)) if node.op == "call_module" else None
    return resolve(node, owner).op in _VIEWS


def _make_pure(node: fx.Node, call: Call) -> None:
    if call.module is not None:
        # the module is the capture's own copy
        call.module.inplace = False  # type: ignore[assignment]
        return
    node.kwargs = {key: value for key, value in node.kwargs.items() if key != "inplace"}
    target: Any = node.target
    if node.op == "call_method":
        pure = str(target).removesuffix("_")
        if not hasattr(torch.Tensor, pure):
            raise CaptureError(f"{node.name}: Tensor.{target} has no counterpart that does not write")
        node.target = pure
        return
    if isinstance(target, torch._ops.OpOverload):
        packet = getattr(getattr(torch.ops, target.namespace), target.overloadpacket.__name__.removesuffix("_"), None)
        overload = getattr(packet, target._overloadname, None)
        if overload is None or target._schema.is_mutable is overload._schema.is_mutable:
            raise CaptureError(f"{node.name}: {target} has no counterpart that does not write")
        node.target = overload
        return
    _drop_positional_flag(node, call)
    if target in _PURE_FUNCTIONS:
        node.target = _PURE_FUNCTIONS[target]
    elif getattr(target, "__name__", "").endswith("_"):
        node.target = _pure_function(node, target)


def _drop_positional_flag(node: fx.Node, call: Call) -> None:
    names = list(call.arguments)
    if "inplace" in names and names.index("inplace") < len(node.args):
        place = names.index("inplace")
        node.args = (*node.args[:place], False, *node.args[place + 1 :])


def _pure_function(node: fx.Node, target: Any) -> Any:
    name = target.__name__.removesuffix("_")
    for namespace in (F, torch, nn.functional):
        if hasattr(namespace, name):
            return getattr(namespace, name)
    raise CaptureError(f"{node.name}: {target.__name__} has no counterpart that does not write")
