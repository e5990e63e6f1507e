"""The one door for changes: the only functions that edit a program's graph or its tensors.

Every edit counts (`Program.edits`), drops the program's analyses, and keeps the graph legal:
a module gets a fresh path unless it replaces one that nobody else calls, a tensor is assigned and never written into,
and a module that is called at several places is cloned before one of the calls is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from fxopt.errors import InputError
from fxopt.program import Program
from fxopt.sharing import share_module, without_graph

__all__ = [
    "bypass",
    "clean",
    "insert_after",
    "insert_before",
    "insert_call",
    "insert_tensor",
    "raise_calls",
    "replace",
    "set_arguments",
    "set_call",
    "set_io_dtype",
    "set_module",
    "set_operand",
    "set_parameter",
    "set_tensor",
]

Target = nn.Module | Callable[..., Any] | str


def insert_before(
    program: Program,
    anchor: fx.Node,
    target: Target,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    name: str | None = None,
) -> fx.Node:
    """Adds a node in front of `anchor`.

    Args:
        program: the program to edit.
        anchor: the node in front of which the new one runs.
        target: a module, a function, or the name of a tensor method.
        args: arguments; nodes or constants.
        kwargs: keyword arguments.
        name: suggested name for the node, and path for a module; made unique.

    Returns:
        The new node.
    """
    with program.graph.inserting_before(anchor):
        node = _create(program, target, args, kwargs or {}, name)
    program._changed()
    return node


def insert_after(
    program: Program,
    anchor: fx.Node,
    target: Target,
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    name: str | None = None,
) -> fx.Node:
    """Adds a node behind `anchor` that takes its value and gives its own to all of the former users.

    Args:
        program: the program to edit.
        anchor: the node whose value is changed on the way.
        target: a module, a function, or the name of a tensor method.
        args: arguments; `(anchor,)` by default.
        kwargs: keyword arguments.
        name: suggested name for the node, and path for a module; made unique.

    Returns:
        The new node.
    """
    users = list(anchor.users)
    with program.graph.inserting_after(anchor):
        node = _create(program, target, (anchor,) if args is None else args, kwargs or {}, name)
    for user in users:
        user.replace_input_with(anchor, node)
    program._changed()
    return node


def insert_call(program: Program, anchor: fx.Node, like: fx.Node, args: Sequence[Any]) -> fx.Node:
    """Adds a node in front of `anchor` that calls the module which `like` calls, on other arguments.

    Raises:
        InputError: if `like` calls no module.
    """
    if like.op != "call_module":
        raise InputError(f"{like.name} calls no module")
    with program.graph.inserting_before(anchor):
        node = program.graph.create_node("call_module", like.target, tuple(args))
    program._changed()
    return node


def replace(
    program: Program,
    node: fx.Node,
    target: Target,
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> fx.Node:
    """Puts another call in the place of `node`.

    A module that replaces a module nobody else calls takes over its path, so that parameters keep their names.

    Args:
        program: the program to edit.
        node: the node to replace; it is removed.
        target: a module, a function, or the name of a tensor method.
        args: arguments; those of `node` by default.
        kwargs: keyword arguments; those of `node` if `args` is not given either.

    Returns:
        The new node.
    """
    if kwargs is None:
        kwargs = node.kwargs if args is None else {}
    args = node.args if args is None else args
    if (
        isinstance(target, nn.Module)
        and len(program.callers(node)) == 1
        and not _read_inside(program, str(node.target))
    ):
        program._place(str(node.target), target)
        target.train(program.training)
        node.args, node.kwargs = tuple(args), dict(kwargs)
        program._changed()
        return node
    with program.graph.inserting_before(node):
        new = _create(program, target, args, kwargs, node.name)
    node.replace_all_uses_with(new)
    program.graph.erase_node(node)
    program._changed()
    return new


def bypass(program: Program, node: fx.Node, source: fx.Node) -> None:
    """Removes `node`; its users take the value of `source` instead."""
    node.replace_all_uses_with(source)
    program.graph.erase_node(node)
    program._changed()


def set_arguments(
    program: Program, node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None
) -> None:
    """Gives `node` other arguments; what it calls stays."""
    node.args, node.kwargs = tuple(args), dict(kwargs or {})
    program._changed()


def set_call(
    program: Program,
    node: fx.Node,
    target: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
) -> None:
    """Makes `node`, which calls no module, call another function; unlike with `replace`, its name stays.

    Raises:
        InputError: if it calls a module, or nothing.
    """
    if node.op not in ("call_function", "call_method"):
        raise InputError(f"{node.name} calls no function")
    node.op, node.target = "call_function", target
    node.args, node.kwargs = tuple(args), dict(kwargs or {})
    program._changed()


def set_io_dtype(program: Program, dtype: torch.dtype) -> None:
    """Lets the program take and give numbers in `dtype` where the model takes and gives float32.

    It is for the caller to rewrite the graph accordingly.
    """
    program.io_dtype = dtype
    program.example_inputs = program.in_io_dtype(program.example_inputs)
    program._changed()


def set_module(program: Program, node: fx.Node, module: nn.Module) -> None:
    """Puts another module in the place of the one that `node` calls, for all of its callers.

    Raises:
        InputError: if the node calls no module.
    """
    callers = program.callers(node)
    if not callers:
        raise InputError(f"{node.name} calls no module")
    module.train(program.training)
    for path in {str(caller.target) for caller in callers}:
        program._place(path, module)
    program._changed()


def set_operand(program: Program, readers: Sequence[fx.Node], old: fx.Node, new: fx.Node) -> None:
    """Has some nodes read `new` wherever they read `old`."""
    for reader in readers:
        reader.replace_input_with(old, new)
    program._changed()


def set_parameter(program: Program, node: fx.Node, value: torch.Tensor) -> None:
    """Gives the path that a `get_attr` node reads another tensor, for all of its readers.

    A parameter stays a parameter (with the old `requires_grad`), a buffer a buffer.

    Raises:
        InputError: if the node reads no tensor.
    """
    old = program.tensor_of(node)
    if old is None:
        raise InputError(f"{node.name} reads no tensor")
    owner, _, name = str(node.target).rpartition(".")
    holder = program._root.get_submodule(owner)
    if isinstance(old, nn.Parameter):
        setattr(holder, name, nn.Parameter(value.detach(), requires_grad=old.requires_grad))
    else:
        setattr(holder, name, value.detach())
    program._changed()


def set_tensor(program: Program, node: fx.Node, name: str, value: torch.Tensor | None) -> None:
    """Gives the module called at `node` another parameter or buffer.

    A parameter stays a parameter (with the old `requires_grad`; a new one trains if its siblings do), a buffer a
    buffer. The module object and its tensors are not written into; a module that other nodes call too is cloned for
    this node first.

    Args:
        program: the program to edit.
        node: a `call_module` node.
        name: attribute of the module, such as "weight".
        value: the new tensor, or None to remove it. A name that was None before becomes a parameter.

    Raises:
        InputError: if the module has no such parameter or buffer.
    """
    module = program.module_of(node)
    if module is None or (name not in module._parameters and name not in module._buffers):
        raise InputError(f"{node.name} calls no module with a parameter or buffer {name!r}")
    private = share_module(module)
    if name in module._buffers or value is None:
        setattr(private, name, value)
    else:
        old = module._parameters[name]
        siblings = [old] if old is not None else list(module.parameters(recurse=False))
        trains = value.is_floating_point() and any(item.requires_grad for item in siblings)
        setattr(private, name, nn.Parameter(value.detach(), requires_grad=trains))
    if len(program.callers(node)) > 1 or _read_inside(program, str(node.target)):
        node.target = _attach(program, private, str(node.target))
    else:
        program._place(str(node.target), private)
    program._changed()


def insert_tensor(program: Program, anchor: fx.Node, value: torch.Tensor, *, name: str) -> fx.Node:
    """Adds a node in front of `anchor` that reads a tensor of the program's own.

    Args:
        program: the program to edit.
        anchor: the node in front of which it stands.
        value: the tensor; an `nn.Parameter` is held as a parameter, with its `requires_grad`, others as a buffer.
        name: suggested path; made unique.

    Returns:
        The new `get_attr` node.
    """
    path = _free_path(program._root, name)
    owner, _, attribute = path.rpartition(".")
    if owner and not _exists(program._root, owner):
        program._place(owner, nn.Module())
    holder = program._root.get_submodule(owner)
    if isinstance(value, nn.Parameter):
        holder.register_parameter(attribute, nn.Parameter(value.detach(), requires_grad=value.requires_grad))
    else:
        holder.register_buffer(attribute, value.detach())
    with program.graph.inserting_before(anchor):
        node = program.graph.create_node("get_attr", path)
    program._changed()
    return node


def clean(program: Program) -> None:
    """Removes nodes whose values nobody uses, and modules and tensors that no node uses."""
    before = len(program.graph.nodes)
    program.graph.eliminate_dead_code(is_impure_node=_has_effect)
    _drop_unused(program)
    if len(program.graph.nodes) != before:
        program._changed()


def _create(
    program: Program, target: Target, args: Sequence[Any], kwargs: Mapping[str, Any], name: str | None
) -> fx.Node:
    if isinstance(target, nn.Module):
        target.train(program.training)
        path = _attach(program, target, (name or type(target).__name__.lower()))
        return program.graph.create_node("call_module", path, tuple(args), dict(kwargs))
    kind = "call_method" if isinstance(target, str) else "call_function"
    return program.graph.create_node(kind, target, tuple(args), dict(kwargs), name=name)


def _attach(program: Program, module: nn.Module, path: str) -> str:
    """Registers a module under `path`, or the first free path like it."""
    fresh = _free_path(program._root, path)
    program._place(fresh, module)
    return fresh


def _free_path(root: nn.Module, path: str) -> str:
    fresh, number = path, 1
    while _exists(root, fresh):
        fresh, number = f"{path}_{number}", number + 1
    return fresh


def _exists(root: nn.Module, path: str) -> bool:
    owner: Any = root
    for part in path.split("."):
        if not hasattr(owner, part):
            return False
        owner = getattr(owner, part)
    return True


def _read_inside(program: Program, path: str) -> bool:
    """Whether a `get_attr` node reads a tensor of the module at `path`."""
    return any(node.op == "get_attr" and str(node.target).startswith(f"{path}.") for node in program.graph.nodes)


def _has_effect(node: fx.Node) -> bool:
    """Whether a node must stay although nobody uses its value: it writes state of the model, or ends the graph."""
    return node.op != "call_module" and node.is_impure(impure_random=False)


def _drop_unused(program: Program) -> None:
    """Drops modules that no node calls or reads from, and tensors outside of called modules that no node reads."""
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_module"}
    read = {str(node.target) for node in program.graph.nodes if node.op == "get_attr"}
    _prune(program._root, "", called, read)


def _prune(module: nn.Module, path: str, called: set[str], read: set[str]) -> bool:
    """Prunes what is below `path`; whether anything is left there."""
    prefix = f"{path}." if path else ""
    for name, child in list(module._modules.items()):
        if child is None or (prefix + name not in called and not _prune(child, prefix + name, called, read)):
            del module._modules[name]
    for tensors in (module._parameters, module._buffers):
        for name in [name for name in tensors if prefix + name not in read]:
            del tensors[name]
            module._non_persistent_buffers_set.discard(name)
    return bool(module._modules or module._parameters or module._buffers)


def raise_calls(program: Program) -> None:
    """Raises functional calls whose tensors are parameters by now to modules, at their weight's path if it is free.

    As at capture: see `fxopt.frontends.raising`.
    """
    from fxopt.frontends.blueprints import blueprint
    from fxopt.frontends.hierarchy import find, install
    from fxopt.frontends.raising import raise_to_modules

    module = program.flat_module()
    for node in module.graph.nodes:
        found = blueprint(node, lambda item: tuple(find(module, str(item.target)).shape), None)
        for name, item in found.tensors.items() if found is not None else ():
            path = "" if item is None else f"{str(item.target).rpartition('.')[0]}.{name}".lstrip(".")
            if item is not None and find(module, path) is None:
                # the module's own name for it, so that both can sit at the same path
                install(module, path, find(module, str(item.target)))
                for other in module.graph.find_nodes(op="get_attr", target=item.target):
                    other.target = path
    raise_to_modules(module, training=program.training)
    program._root, program._graph, program._modules_by_path = without_graph(module), module.graph, {}
    program._changed()
