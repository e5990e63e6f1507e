"""Raises functional calls that own parameters to modules at the parameters' original path.

    conv2d(x, stages.0.conv.weight, stages.0.conv.bias, [2, 2])  ->  stages.0.conv(x)   with an nn.Conv2d there

After it there is one IR, whichever frontend traced the model: parameters live in modules under their original names,
and the rest is function calls. The `Parameter` objects stay the same, so tied weights stay tied. Where the original
path cannot be taken (its owner holds other parameters, a parameter has an unusual name, two different modules share it)
the module sits at a fresh readable path near it. What no module computes exactly stays a function call.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from fxopt.frontends.blueprints import Blueprint, blueprint
from fxopt.frontends.hierarchy import find, install

__all__ = ["raise_to_modules"]

# Modules that keep their statistics in buffers, and count batches themselves.
_COUNTS_BATCHES = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_TRACKS = (*_COUNTS_BATCHES, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


def raise_to_modules(module: fx.GraphModule, *, training: bool, original: nn.Module | None = None) -> None:
    """Raises the calls of a private graph module in place; what the graph does not use is dropped from the module.

    Parameters and buffers that no module can own (a layer scale, a class token) stay get_attr nodes at their path.
    Calling it again changes nothing.

    Args:
        module: a flat graph module over functions, modules, or both.
        training: the mode of the model. A call that was traced in the other mode (a frozen BatchNorm, a dropout
            switched off) becomes a module in that mode.
        original: the model that was traced, asked for what no call shows: the rank that a BatchNorm is for, a momentum
            of None, batch counters.
    """
    raising = _Raising(module, training, original)
    groups = raising.collect()
    raising.place(groups)
    for group in groups:
        raising.rewrite(group)
    for node in reversed(module.graph.nodes):
        # a tensor whose owner was replaced by a module; lint, which dead-code elimination runs, would miss it
        if node.op == "get_attr" and not node.users:
            module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    _keep_used(module, training)
    module.recompile()


@dataclass
class _Group:
    """Calls that are one module: same class, attributes and tensors."""

    blueprint: Blueprint
    calls: list[tuple[fx.Node, fx.Node]] = field(default_factory=list)  # the call, and its input
    path: str = ""


class _Raising:
    def __init__(self, module: fx.GraphModule, training: bool, original: nn.Module | None) -> None:
        self.module = module
        self.training = training
        self.original = original
        self.raised: dict[fx.Node, fx.Node] = {}  # a functional call, and the module call in its place
        self.taken = {str(node.target) for node in module.graph.nodes if node.op == "call_module"}

    def collect(self) -> list[_Group]:
        groups: dict[Hashable, _Group] = {}
        for node in self.module.graph.nodes:
            found = blueprint(node, lambda attribute: tuple(self._tensor(attribute).shape), self._input_shape(node))
            if found is None or not self._owns(found):
                continue
            if found.training is True and not self.training:
                continue  # random or changing its statistics even in evaluation, which no module is after .eval()
            tensors = {name: None if item is None else id(self._tensor(item)) for name, item in found.tensors.items()}
            # Modules without tensors are not shared: passes can then change each by itself.
            stateful = any(value is not None for value in tensors.values())
            attributes = _frozen(found.attributes.items())
            shared_by = _frozen(tensors.items()) if stateful else node.name
            key = (found.module_class, attributes, found.training, shared_by)
            groups.setdefault(key, _Group(found)).calls.append((node, found.input))
        return list(groups.values())

    def place(self, groups: list[_Group]) -> None:
        """Chooses each group's path; those that fit their parameters' own path come first."""
        raised = {node for group in groups for node, _ in group.calls}
        counters = {f"{owner}.num_batches_tracked" for group in groups if (owner := _owner(group)) is not None}
        rest = {
            str(node.target)
            for node in self.module.graph.nodes
            if node.op == "get_attr" and (set(node.users) - raised) and str(node.target) not in counters
        }
        waiting = []
        for group in groups:
            owner = _owner(group)
            if owner:
                self._move_children_aside(owner)
            if owner is not None and self._is_free(owner, group, rest):
                self._take(owner, group)
            else:
                waiting.append(group)
        for group in waiting:
            free = (path for path in _candidates(group) if self._is_free(path, group, rest))
            self._take(next(free, None) or self._fresh(group, rest), group)

    def rewrite(self, group: _Group) -> None:
        graph = self.module.graph
        built = self._build(group)
        install(self.module, group.path, built)
        for node, source in group.calls:
            with graph.inserting_before(node):
                call = graph.call_module(group.path, (self.raised.get(source, source),))
            call.meta = node.meta
            node.replace_all_uses_with(call)
            graph.erase_node(node)
            self.raised[node] = call
        if isinstance(built, _COUNTS_BATCHES):
            self._drop_counting(built)

    def _build(self, group: _Group) -> nn.Module:
        module_class, attributes, tensors, _, mode = group.blueprint
        placed_on = {} if "p" in attributes else {"device": "meta"}
        built = module_class(**attributes, **placed_on)
        for name, node in tensors.items():
            setattr(built, name, None if node is None else self._tensor(node))
        if isinstance(built, _TRACKS) and built.track_running_stats:
            built.num_batches_tracked = self._counter(group)
            if built.momentum is None:
                built.momentum = getattr(self._original_owner(group), "momentum", None)
        built.train(self.training if mode is None else mode)
        return built

    def _counter(self, group: _Group) -> torch.Tensor:
        """The batch counter beside the running statistics; a new one where a functional call kept none."""
        node = group.blueprint.tensors["running_mean"]
        assert node is not None
        path = f"{str(node.target).rpartition('.')[0]}.num_batches_tracked".lstrip(".")
        for root in (self.module, self.original):
            found = None if root is None else find(root, path)
            if isinstance(found, torch.Tensor):
                return found
        return torch.zeros((), dtype=torch.long, device=self._tensor(node).device)

    def _drop_counting(self, built: nn.Module) -> None:
        """Erases the nodes that add one to a counter which the module now counts itself."""
        for node in list(self.module.graph.nodes):
            if node.op == "get_attr" and find(self.module, str(node.target)) is built.num_batches_tracked:
                for user in list(node.users):
                    name = getattr(user.target, "_opname", user.target)
                    if name == "add_" and not user.users:
                        self.module.graph.erase_node(user)

    def _original_owner(self, group: _Group) -> nn.Module | None:
        owner = _owner(group)
        return None if owner is None or self.original is None else find(self.original, owner)

    def _owns(self, found: Blueprint) -> bool:
        """Whether all tensors are of the kind the module registers: statistics are buffers, the rest parameters."""
        for name, node in found.tensors.items():
            if node is None:
                continue
            if isinstance(self._tensor(node), nn.Parameter) == name.startswith("running_"):
                return False
        return True

    def _tensor(self, node: fx.Node) -> torch.Tensor:
        found = find(self.module, str(node.target))
        return found if isinstance(found, torch.Tensor) else torch.empty(0, device="meta")

    def _input_shape(self, node: fx.Node) -> tuple[int | None, ...] | None:
        """What is known of the shape of a call's input: from its value, else from the class of the calling module."""
        source = node.args[0] if node.args else node.kwargs.get("input")
        if not isinstance(source, fx.Node):
            return None
        value = source.meta.get("val", source.meta.get("tensor_meta"))
        if value is not None and hasattr(value, "shape"):
            return tuple(size if isinstance(size, int) else None for size in value.shape)
        owners = [find(self.original, path) for path in _scopes(node)[:1]] if self.original is not None else []
        for rank, classes in {
            3: (nn.BatchNorm1d, nn.InstanceNorm1d),
            4: (nn.BatchNorm2d, nn.InstanceNorm2d),
            5: (nn.BatchNorm3d, nn.InstanceNorm3d),
        }.items():
            if any(isinstance(owner, classes) for owner in owners):
                return (None,) * rank
        return None

    def _is_free(self, path: str, group: _Group, rest: set[str]) -> bool:
        """Whether the module can sit at `path` without hiding what else the graph uses at or below it."""
        if not path or any(_within(path, other) for other in self.taken):
            return False
        if any(_within(other, path) for other in self.taken):
            return False
        own = {f"{path}.{name}": node for name, node in group.blueprint.tensors.items() if node is not None}
        for target in rest:
            if _within(target, path):
                mine = own.get(target)
                if mine is None or find(self.module, target) is not self._tensor(mine):
                    return False
        return True

    def _fresh(self, group: _Group, rest: set[str]) -> str:
        """A path near the group's parameters, or near where the call was made."""
        base = next(iter(_candidates(group)), "")
        name = _snake(group.blueprint.module_class.__name__)
        inside = f"{base}.{name}" if base else name
        blocked = any(_within(inside, other) for other in self.taken)
        stem = f"{base.replace('.', '_')}_{name}" if blocked else inside
        path, number = stem, 1
        while not self._is_free(path, group, rest) or find(self.module, path) is not None:
            path, number = f"{stem}_{number}", number + 1
        return path

    def _move_children_aside(self, owner: str) -> None:
        """Gives the stateless modules below `owner` (the activation inside a norm) a path of their own beside it."""
        children = sorted(path for path in self.taken if path != owner and _within(path, owner))
        modules = {path: self.module.get_submodule(path) for path in children}
        if any(True for child in modules.values() for _ in (*child.parameters(), *child.buffers())):
            return
        for path, child in modules.items():
            stem = beside = f"{owner}_{path.removeprefix(owner + '.').replace('.', '_')}"
            number = 1
            while find(self.module, beside) is not None:
                beside, number = f"{stem}_{number}", number + 1
            install(self.module, beside, child)
            for node in self.module.graph.nodes:
                if node.op == "call_module" and node.target == path:
                    node.target = beside
            self.taken = self.taken - {path} | {beside}

    def _take(self, path: str, group: _Group) -> None:
        group.path = path
        self.taken.add(path)


def _owner(group: _Group) -> str | None:
    """The path under which all tensors of the group have the module's own names."""
    owners = set()
    for name, node in group.blueprint.tensors.items():
        if node is not None:
            owner, _, last = str(node.target).rpartition(".")
            owners.add(owner if last == name else None)
    return owners.pop() if len(owners) == 1 else None


def _candidates(group: _Group) -> list[str]:
    """Where the module may sit if its parameters' path is not free: "attn.in_proj" for "attn.in_proj_weight"."""
    found = []
    weight = group.blueprint.tensors.get("weight")
    if weight is not None and str(weight.target).endswith("_weight"):
        found.append(str(weight.target).removesuffix("_weight"))
    found.extend(_scopes(group.calls[0][0])[:1])
    if weight is not None:
        found.append(str(weight.target).rpartition(".")[0])
    return found


def _scopes(node: fx.Node) -> list[str]:
    """Paths of the modules in whose `forward` the call was made, innermost first."""
    stack = node.meta.get("nn_module_stack") or {}
    return [re.sub(r"@\d+", "", str(path)) for path, _ in reversed(list(stack.values()))]


def _within(path: str, other: str) -> bool:
    return path == other or path.startswith(f"{other}.")


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def _frozen(value: Any) -> Hashable:
    if isinstance(value, tuple | list) or (isinstance(value, Iterable) and not isinstance(value, str)):
        return tuple(_frozen(item) for item in value)
    return value  # type: ignore[no-any-return]


def _keep_used(module: fx.GraphModule, training: bool) -> None:
    """Rebuilds the module's hierarchy from what its graph uses."""
    used: dict[str, tuple[Any, bool]] = {}
    for node in module.graph.nodes:
        if node.op in ("call_module", "get_attr"):
            target = str(node.target)
            owner, _, name = target.rpartition(".")
            container = find(module, owner)
            used[target] = find(module, target), name not in container._non_persistent_buffers_set
    for tensors in (module._modules, module._parameters, module._buffers):
        tensors.clear()
    module._non_persistent_buffers_set.clear()
    for name in [name for name, value in vars(module).items() if isinstance(value, torch.Tensor)]:
        delattr(module, name)
    # Modules first: a tensor below one of them is already there.
    for target, (value, persistent) in sorted(used.items(), key=lambda item: not isinstance(item[1][0], nn.Module)):
        if find(module, target) is not value:
            install(module, target, value, persistent=persistent)
    leaves = [value for value, _ in used.values() if isinstance(value, nn.Module)]
    below = {child for leaf in leaves for child in leaf.modules()}
    for container in module.modules():
        if container not in below:
            container.training = training
