"""Sizes that a graph has written out: shapes of views, sizes of parts, bounds of slices, the scale of attention.

When channels are removed, sizes that the graph asks a tensor for follow by themselves. Numbers that are written out,
or that are computed and come to something else now, are replaced by what they have to be.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx, nn

from fxopt import edit
from fxopt.analysis.channels import Channels
from fxopt.analysis.labels import Labels, labels_in
from fxopt.ops import Call, operators
from fxopt.program import Program

__all__ = ["rewrite_sizes"]


def rewrite_sizes(program: Program, old: Channels, new: Channels) -> None:
    """Replaces the numbers that no longer fit.

    Args:
        program: is edited.
        old: its channels.
        new: the channels that will be left; the tensors of the program may still hold all.
    """
    old_numbers, numbers = _Numbers(program, old), _Numbers(program, new)
    for node in program.nodes:
        call = program.call(node)
        rewrite = _REWRITES.get(call.op)
        if rewrite is not None and _is_touched(node, old, new):
            rewrite(_Site(program, node, call, old, new, old_numbers, numbers))


def _is_touched(node: fx.Node, old: Channels, new: Channels) -> bool:
    """Whether sizes change at a node, or may as they are computed; nodes that were added since compute numbers."""
    touched = [item.name for item in (node, *node.all_input_nodes)]
    return any(
        not labels_in(old.values.get(name)) or _shape(old.values[name]) != _shape(new.values[name]) for name in touched
    )


@dataclass(frozen=True)
class _Site:
    """A call whose operands or results change size."""

    program: Program
    node: fx.Node
    call: Call
    old: Channels
    new: Channels
    old_numbers: _Numbers
    numbers: _Numbers

    @property
    def source(self) -> fx.Node:
        return cast("fx.Node", self.call.arguments.get("input", self.node.args[0]))

    @property
    def before(self) -> Labels:
        """Of the first argument."""
        return cast("Labels", self.old.values[self.source.name])

    @property
    def after(self) -> Labels:
        """Of the first argument."""
        return cast("Labels", self.new.values[self.source.name])

    def number(self, name: str, default: Any = None) -> Any:
        """What an argument comes to afterwards."""
        return self.numbers.of(self.call.arguments.get(name, default))

    def moves(self, dim: int, *numbers: Any) -> bool:
        """Whether an axis of the first argument shrinks, or numbers that say where to cut it come to something else."""
        return self.before.shape[dim] != self.after.shape[dim] or self.was(numbers) != self.numbers.of(numbers)

    def was(self, argument: Any) -> Any:
        """What an argument came to before."""
        return self.old_numbers.of(argument)

    def set(self, target: Callable[..., Any], *args: Any) -> None:
        edit.set_call(self.program, self.node, target, (self.source, *args))


class _Numbers:
    """What the nodes that compute numbers give once the channels are gone."""

    def __init__(self, program: Program, new: Channels) -> None:
        self._program = program
        self._new = new
        self._found: dict[fx.Node, Any] = {}

    def of(self, argument: Any) -> Any:
        """The number, or structure of numbers, that an argument stands for."""
        return fx.node.map_arg(argument, self._of_node)

    def _of_node(self, node: fx.Node) -> Any:
        if node not in self._found:
            self._found[node] = self._compute(node)
        return self._found[node]

    def _compute(self, node: fx.Node) -> Any:
        call = self._program.call(node)
        source = call.arguments.get("input")
        # what an earlier rewrite added has no labels: it computes numbers
        value = self._new.values.get(source.name) if isinstance(source, fx.Node) else None
        if isinstance(value, Labels) and call.op == "size":
            dim = call.arguments.get("dim")
            return value.shape if dim is None else value.shape[self.of(dim)]
        if isinstance(value, Labels) and call.op == "getattr" and call.arguments["name"] == "shape":
            return value.shape
        if isinstance(value, Labels) or node.op != "call_function":
            return self._new.values[node.name]
        return cast("Any", node.target)(*self.of(node.args), **self.of(dict(node.kwargs)))


def _reshape(site: _Site) -> None:
    _set_sizes(site, "shape", torch.reshape, may_infer=True)


def _expand(site: _Site) -> None:
    _set_sizes(site, "sizes", torch.Tensor.expand, may_infer=False)


def _set_sizes(site: _Site, name: str, target: Callable[..., Any], *, may_infer: bool) -> None:
    listed = list(site.call.arguments[name])
    wanted = site.new.values[site.node.name].shape
    whole = site.numbers.of(listed[0])
    if isinstance(whole, tuple | list):
        # one value for the whole shape; -1 keeps the batch free
        if tuple(whole) != wanted:
            site.set(target, [-1, *wanted[1:]])
        return
    fitting = _fitting(site, listed, wanted, may_infer=may_infer)
    if fitting != listed:
        site.set(target, fitting)


def _unflatten(site: _Site) -> None:
    module = cast("nn.Unflatten | None", site.call.module)
    dim: Any = site.number("dim") if module is None else module.dim
    sizes: Any = site.call.arguments["sizes"] if module is None else module.unflattened_size
    listed = list(site.numbers.of(sizes)) if isinstance(sizes, fx.Node) else list(sizes)
    start = site.before.index(dim)
    wanted = site.new.values[site.node.name].shape[start : start + len(listed)]
    fitting = _fitting(site, listed, wanted, may_infer=True)
    if fitting != listed and module is not None:
        edit.set_module(site.program, site.node, nn.Unflatten(dim, tuple(fitting)))
    elif fitting != listed:
        site.set(torch.unflatten, dim, fitting)


def _fitting(site: _Site, sizes: Sequence[Any], wanted: Sequence[int], *, may_infer: bool) -> list[Any]:
    """Each size as it is if it comes to what is wanted, or is left open (-1); else what is wanted.

    One that is computed may hold the batch: it is left open, or, where another is or `may_infer` is not set, scaled.
    """
    pairs = list(zip(sizes, wanted, strict=True))
    misfits = [item for item, size in pairs if site.numbers.of(item) not in (-1, size)]
    infer = may_infer and -1 not in sizes and sum(isinstance(item, fx.Node) for item in misfits) == 1
    fitting = []
    for item, size in pairs:
        now = site.numbers.of(item)
        if now in (-1, size):
            fitting.append(item)
        elif not isinstance(item, fx.Node):
            fitting.append(size)
        else:
            fitting.append(-1 if infer else _scaled(site, item, size, now))
    return fitting


def _scaled(site: _Site, number: fx.Node, wanted: int, now: int) -> fx.Node:
    """A computed size times wanted / now, a whole number at every batch size."""
    common = math.gcd(wanted, now)
    product = edit.insert_before(site.program, site.node, operator.mul, (number, wanted // common))
    return edit.insert_before(site.program, site.node, operator.floordiv, (product, now // common))


def _parts(site: _Site) -> None:
    """Parts that no longer follow from a count, a size or bounds are given a list of sizes."""
    dim = site.before.index(site.number("dim", site.node.kwargs.get("dim", 0)))
    sizes = [item.shape[dim] for item in site.new.values[site.node.name]]
    places = torch.arange(site.after.shape[dim])
    parts: Sequence[Any] = ()
    if site.call.op == "chunk":
        parts = places.chunk(site.number("chunks"))
    elif site.call.op == "split" and isinstance(site.number("split_size"), int):
        parts = cast("Any", places).split(site.number("split_size"))
    if [len(part) for part in parts] != sizes:
        site.set(torch.split, sizes, dim)


def _tensor_split(site: _Site) -> None:
    dim = site.before.index(
        cast("int", site.node.args[2] if len(site.node.args) > 2 else site.node.kwargs.get("dim", 0))
    )
    if site.before.shape[dim] != site.after.shape[dim]:
        site.set(torch.split, [item.shape[dim] for item in site.new.values[site.node.name]], dim)


def _slice(site: _Site) -> None:
    dim = site.before.index(site.number("dim", 0))
    bounds = site.call.arguments.get("start"), site.call.arguments.get("end")
    if site.moves(dim, *bounds):
        site.set(torch.ops.aten.slice.Tensor, dim, *_moved(site, dim, *bounds), site.call.arguments.get("step", 1))


def _narrow(site: _Site) -> None:
    dim = site.before.index(site.number("dim"))
    start, length = site.call.arguments["start"], site.call.arguments["length"]
    if site.moves(dim, start, length):
        begin, end = _moved(site, dim, start, site.was(start) + site.was(length))
        site.set(torch.narrow, dim, begin, end - begin)


def _getitem(site: _Site) -> None:
    if not isinstance(site.old.values.get(site.source.name), Labels):
        return  # one of several tensors, or sizes
    index = site.call.arguments["index"]
    items = list(index) if isinstance(index, tuple | list) else [index]
    changed = list(items)
    axis = 0
    for position, item in enumerate(items):
        if item is Ellipsis:
            axis = len(site.before.shape) - sum(1 for later in items[position + 1 :] if later is not None)
        elif item is not None:
            if isinstance(item, slice) and item != slice(None) and site.moves(axis, item.start, item.stop):
                changed[position] = slice(*_moved(site, axis, item.start, item.stop), item.step)
            axis += 1
    if changed != items:
        edit.set_arguments(site.program, site.node, (site.source, tuple(changed)))


def _moved(site: _Site, dim: int, start: Any, stop: Any) -> tuple[int, int]:
    """Where a range of places along an axis of the first argument begins and ends once some of them are gone."""
    count = site.before.shape[dim]
    kept = [True] * count
    if count != site.after.shape[dim]:
        left = set(site.after.compact.reshape(-1).tolist())
        kept = [label in left for label in site.before.compact.reshape(-1).tolist()]
    begin, end, _ = slice(site.was(start), site.was(stop)).indices(count)
    return sum(kept[:begin]), sum(kept[:end])


def _normalized_shape(site: _Site) -> None:
    if site.call.module is None and site.before.shape[-1] != site.after.shape[-1]:
        _set_argument(site, "normalized_shape", [site.after.shape[-1]])


def _num_groups(site: _Site) -> None:
    """Groups of one channel each are as many as the channels."""
    count = site.after.shape[1]
    if site.call.module is None and site.number("num_groups") == site.before.shape[1] != count:
        _set_argument(site, "num_groups", count)


def _set_argument(site: _Site, name: str, value: Any) -> None:
    position = operators()[site.call.op].parameters.index(name)
    args, kwargs = list(site.node.args), dict(site.node.kwargs)
    if position < len(args):
        args[position] = value
    else:
        kwargs[name] = value
    edit.set_arguments(site.program, site.node, args, kwargs)


def _attention(site: _Site) -> None:
    """The scale stays what it was, one over the root of the original number of channels."""
    query = cast("fx.Node", site.call.arguments["query"]).name
    before, after = site.old.values[query].shape[-1], site.new.values[query].shape[-1]
    if before != after and site.call.arguments.get("scale") is None:
        edit.set_arguments(site.program, site.node, (), {**site.call.arguments, "scale": 1 / math.sqrt(before)})


def _shape(value: Any) -> Any:
    if isinstance(value, Labels):
        return value.shape
    return tuple(map(_shape, value)) if isinstance(value, tuple | list) else None


_REWRITES: Mapping[str, Callable[[_Site], None]] = {
    "view": _reshape,
    "reshape": _reshape,
    "expand": _expand,
    "unflatten": _unflatten,
    "split": _parts,
    "chunk": _parts,
    "unknown:aten.tensor_split.indices": _tensor_split,
    "unknown:aten.tensor_split.sections": _tensor_split,
    "slice": _slice,
    "narrow": _narrow,
    "getitem": _getitem,
    "layer_norm": _normalized_shape,
    "rms_norm": _normalized_shape,
    "group_norm": _num_groups,
    "scaled_dot_product_attention": _attention,
}
