"""Which channels of a program can be removed, and what has to go with each.

Every channel has an identity, its label; the rules of `channel_rules` carry labels through all operators. Labels that
must be removed together become one, a *unit*. A unit is removed by deleting the same slices of every member: the
parameters that produce, scale and read it. Units with the same members form a `ChannelGroup`. What cannot be removed is
locked, with the reason.

The removal is exact by construction: at every value the removed elements are slices along one axis, and every operator
gives the remaining elements of its result from the remaining elements of its operands, as it did before; only those
that sum over channels (the next layer, and norms over channels) miss what the removed ones brought.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import fx

from fxopt.analysis.channel_rules import Rule, builtin_rules
from fxopt.analysis.channel_scope import Attention, Member, Scope
from fxopt.analysis.labels import FIXED, Labels, LabelSpace, labels_in
from fxopt.analysis.shapes import TensorSpec, shapes
from fxopt.errors import first_line

if TYPE_CHECKING:
    from fxopt.program import Program

__all__ = ["BY_ATTENTION", "ChannelGroup", "Channels", "Member", "find_channels", "member_tensor"]


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels that the same tensors hold.

    Attributes:
        name: of the tensor that produces them, "layer1.0.conv1.weight", numbered if it produces several groups.
        node: the call that produces them.
        units: one label per channel that can be removed by itself, in the order of the producing tensor.
        members: indices into `Channels.members`: all axes that hold them.
        locked: why none of them may be removed, or None.
    """

    name: str
    node: str
    units: tuple[int, ...]
    members: tuple[int, ...]
    locked: str | None

    def __len__(self) -> int:
        return len(self.units)


@dataclass(frozen=True, eq=False)
class Channels:
    """The channels of a program.

    Attributes:
        values: by node name, the labels of what it gives (by unit), or the plain value.
        members: all axes that hold channels, labels by unit.
        groups: the units by what holds them, locked ones too.
    """

    values: Mapping[str, Any]
    members: tuple[Member, ...]
    groups: tuple[ChannelGroup, ...]

    def group(self, name: str) -> ChannelGroup | None:
        """The group of that name."""
        return next((group for group in self.groups if group.name == name), None)

    def produces(self, program: Program, member: Member) -> bool:
        """Whether a member is the axis of a weight along which a layer computes channels."""
        return member.axis is not None and _produces(program, program.node(member.node), member.axis)

    def without(self, units: Sequence[int]) -> Channels:
        """The channels of the same program after these units were removed."""
        gone = torch.tensor(sorted(units))
        removed = frozenset(units)
        holding = self.holding(units)
        return Channels(
            {name: _map_labels(value, lambda item: _kept(item, gone)) for name, value in self.values.items()},
            tuple(
                item._replace(labels=item.labels[~torch.isin(item.labels, gone)]) if index in holding else item
                for index, item in enumerate(self.members)
            ),
            tuple(
                group
                if removed.isdisjoint(group.units)
                else replace(group, units=tuple(unit for unit in group.units if unit not in removed))
                for group in self.groups
            ),
        )

    def holding(self, units: Sequence[int]) -> set[int]:
        """Indices of the members that hold any of these units, none of which is locked."""
        wanted = frozenset(units)
        return {index for group in self.groups if not wanted.isdisjoint(group.units) for index in group.members}


def find_channels(
    program: Program, *, attention: Attention = "head_dim", rules: Mapping[str, Rule] | None = None
) -> Channels:
    """Follows all channels through a program.

    Args:
        program: what is analysed.
        attention: what may be removed of a grid of heads and channels: "heads", "head_dim" or "none".
        rules: of operators, by canonical name; those built in and those of plugins by default.

    Raises:
        RegistryError: if a plugin's rule for an operator of the program cannot be imported, or replaces a built-in one.
    """
    scope = Scope(program, attention, LabelSpace(), {}, [])
    _propagate(scope, _known_rules(program) if rules is None else rules)
    _tie_members(scope)
    _tie_grids(scope)
    values = {name: _map_labels(value, lambda item: _by_unit(scope, item)) for name, value in scope.values.items()}
    members = tuple(item._replace(labels=scope.space.roots(item.labels)) for item in scope.members)
    return Channels(values, members, tuple(_groups(scope, members)))


def member_tensor(program: Program, member: Member) -> torch.Tensor | None:
    """The tensor of which a member is an axis; None if there is none, as of a layer without bias."""
    if member.axis is None:
        return None
    node = program.node(member.node)
    found = getattr(program.module_of(node), member.name) if member.name else program.tensor_of(node)
    return cast("torch.Tensor | None", found)


BY_ATTENTION: Mapping[Attention, Callable[[Program], Channels]] = {
    "heads": partial(find_channels, attention="heads"),
    "head_dim": partial(find_channels, attention="head_dim"),
    "none": partial(find_channels, attention="none"),
}
"""The analysis for each way to treat attention, for `Program.analysis`."""


def _known_rules(program: Program) -> Mapping[str, Rule]:
    """The built-in rules and those that plugins give for operators of the program."""
    from fxopt.registry import channel_rules

    builtin = builtin_rules()
    operators = dict.fromkeys(program.op(node) for node in program.graph.nodes)
    return {**builtin, **channel_rules(operators, builtin)}


def _propagate(scope: Scope, rules: Mapping[str, Rule]) -> None:
    known = scope.program.analysis(shapes)
    read: dict[int, Labels] = {}
    for node in scope.program.graph.nodes:
        if node.op == "get_attr":
            tensor = scope.program.tensor_of(node)
            scope.values[node.name] = read.setdefault(id(tensor), _read(scope, cast("torch.Tensor", tensor)))
        elif node.op == "output" or any(True for _ in _specs(known[node.name])):
            scope.values[node.name] = _computed(scope, node, rules)
        else:
            scope.values[node.name] = known[node.name]


def _computed(scope: Scope, node: fx.Node, rules: Mapping[str, Rule]) -> Any:
    """The labels of what a node computes."""
    call = scope.call(node)
    name = call.op.removeprefix("unknown:")
    makes_channels = call.op.startswith(_LAYERS) and call.module is not None
    if all(item.is_fixed for item in scope.operands(node)) and not makes_channels:
        return scope.fixed(node)
    if call.op not in rules:
        return scope.barrier(node, f"{name} at {node.name} has no rule")
    try:
        found = rules[call.op](scope, node)
    except Exception as error:  # noqa: BLE001 (operators refuse labels in ways of their own; what is not followed is locked)
        return scope.barrier(node, f"the rule of {name} failed at {node.name}: {first_line(error)}")
    if node.op != "output" and [item.shape for item in labels_in(found)] != [
        spec.shape for spec in _specs(scope.program.analysis(shapes)[node.name])
    ]:
        return scope.barrier(node, f"the rule of {name} does not fit what it gives at {node.name}")
    return found


_LAYERS = (
    "conv",
    "linear",
    "embedding",
    "batch_norm",
    "instance_norm",
    "layer_norm",
    "rms_norm",
    "group_norm",
    "prelu",
)


def _read(scope: Scope, tensor: torch.Tensor) -> Labels:
    """A tensor of the program: what it holds may go with the channels that it meets."""
    if not tensor.is_floating_point() or not tensor.ndim:
        return Labels.fixed(tensor.shape)
    return Labels.of(scope.space.fresh(tensor.numel()).reshape(tensor.shape))


def _tie_members(scope: Scope) -> None:
    """One tensor has one set of indices, wherever it is used."""
    first: dict[tuple[int, int | None], torch.Tensor] = {}
    read = {id(scope.program.tensor_of(node)): node for node in scope.program.graph.nodes if node.op == "get_attr"}
    for item in scope.members:
        tensor = member_tensor(scope.program, item)
        if tensor is None:
            continue
        tied = first.setdefault((id(tensor), item.axis), item.labels)
        scope.space.join(tied, item.labels, f"shared with fixed channels at {item.node}")
        if id(tensor) in read:
            why = f"a tensor of {scope.program.node(item.node).target} is read at {read[id(tensor)].name} too"
            scope.space.lock(item.labels, why)
            scope.space.lock(scope.tensor(read[id(tensor)]).compact, why)


def _tie_grids(scope: Scope) -> None:
    """Makes what is removed of any value slices along one axis: of a grid, along its longest axis."""
    for name, value in scope.values.items():
        for item in labels_in(value):
            reduced = scope.space.reduced(item)
            axes = reduced.axes
            if len(axes) > 1:
                longest = max(axes, key=lambda axis: (reduced.shape[axis], axis))
                others = [axis for axis in axes if axis != longest]
                scope.mixed(item, others, f"part of a grid with fixed channels at {name}")
    for node in scope.program.graph.nodes:
        if node.op != "get_attr":
            continue
        value = scope.values[node.name]
        for axis in scope.space.reduced(value).axes:
            scope.members.append(Member(node.name, "", axis, scope.vector(value, axis, f"held by {node.name}")))


def _groups(scope: Scope, members: Sequence[Member]) -> list[ChannelGroup]:
    """Units by the set of members that hold them."""
    holders: dict[int, list[int]] = {}
    order: dict[int, tuple[int, int]] = {}
    for index, item in enumerate(members):
        for position, unit in enumerate(item.labels.tolist()):
            if unit != FIXED:
                holders.setdefault(unit, []).append(index)
                order.setdefault(unit, (index, position))
    by_holders: dict[tuple[int, ...], list[int]] = {}
    for unit in sorted(holders, key=order.__getitem__):
        by_holders.setdefault(tuple(holders[unit]), []).append(unit)
    nodes = {node.name: node for node in scope.program.graph.nodes}
    given = _given_weights(scope.program)
    taken: dict[str, int] = {}
    found = []
    for held_by, units in by_holders.items():
        # parameters that are read come last, also those that layers called as functions compute channels with
        makers = [index for index in held_by if members[index].node in given]
        producer = members[held_by[0]]
        if makers and not (producer.axis is not None and _produces(scope.program, nodes[producer.node], producer.axis)):
            producer = members[makers[0]]
        name = ".".join(filter(None, [str(nodes[producer.node].target), producer.name]))
        taken[name] = taken.get(name, 0) + 1
        numbered = name if taken[name] == 1 else f"{name}#{taken[name]}"
        found.append(ChannelGroup(numbered, producer.node, tuple(units), tuple(dict.fromkeys(held_by)), None))
    return found + _locked_groups(scope, taken)


def _locked_groups(scope: Scope, taken: dict[str, int]) -> list[ChannelGroup]:
    """What every layer computes and may not be removed, with the first reason."""
    nodes = {node.name: node for node in scope.program.graph.nodes}
    found = []
    for item in scope.members:
        if item.name != "weight" or item.axis is None or not _produces(scope.program, nodes[item.node], item.axis):
            continue
        locked = item.labels[scope.space.roots(item.labels) == FIXED]
        locked = locked[locked != FIXED]
        if not len(locked):
            continue
        why = next(iter(scope.space.reasons(locked)), "fixed")
        name = f"{nodes[item.node].target}.{item.name}"
        taken[name] = taken.get(name, 0) + 1
        numbered = name if taken[name] == 1 else f"{name}#{taken[name]}"
        found.append(ChannelGroup(numbered, item.node, tuple(locked.tolist()), (), why))
    return found


def _given_weights(program: Program) -> set[str]:
    """The nodes that read the weights of layers which are called as functions: of each the largest tensor behind it."""
    found = set()
    for node in program.graph.nodes:
        call = program.call(node)
        weight = call.arguments.get("weight")
        if call.module is None and call.op.startswith(("conv", "linear")) and isinstance(weight, fx.Node):
            waiting, seen = [weight], {weight}
            while waiting:
                more = [item for item in waiting.pop().all_input_nodes if item not in seen]
                waiting += more
                seen.update(more)
            read = {item: program.tensor_of(item) for item in seen if item.op == "get_attr"}
            sizes = {item: tensor.numel() for item, tensor in read.items() if tensor is not None}
            found.update([max(sizes, key=sizes.__getitem__).name] if sizes else [])
    return found


def _produces(program: Program, node: fx.Node, axis: int) -> bool:
    op = program.op(node)
    if op.startswith("conv"):
        return axis == (1 if "transpose" in op else 0)
    return (op == "linear" and axis == 0) or (op == "embedding" and axis == 1)


def _by_unit(scope: Scope, value: Labels) -> Labels:
    return Labels(Labels.of(scope.space.roots(value.compact)).compact, value.shape)


def _kept(value: Labels, gone: torch.Tensor) -> Labels:
    """The labels without those that are gone: slices along the one axis on which they depend."""
    if not len(value.axes):
        return value
    (axis,) = value.axes
    vector = value.compact.reshape(-1)
    left = vector[~torch.isin(vector, gone)]
    if len(left) == len(vector):
        return value
    shape = (*value.shape[:axis], len(left), *value.shape[axis + 1 :])
    return Labels.along(left, axis, shape)


def _map_labels(value: Any, function: Any) -> Any:
    if isinstance(value, Labels):
        return function(value)
    return tuple(_map_labels(item, function) for item in value) if isinstance(value, tuple | list) else value


def _specs(spec: Any) -> list[TensorSpec]:
    if isinstance(spec, TensorSpec):
        return [spec]
    return [item for part in spec for item in _specs(part)] if isinstance(spec, tuple | list) else []
