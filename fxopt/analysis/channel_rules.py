"""How each operator passes channels on: one rule per operator, in one table.

A layout operator is its own rule: it is run on the labels. Elementwise operators make the labels of their operands one,
contractions those of the axis that they sum over; the rules of layers are in `channel_layers`. An operator
that mixes along an axis whose channels could be removed locks them, unless they form a grid: then the removal is the
same at every place of that axis. An operator without a rule locks whatever reaches it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import fx

from fxopt.analysis import channel_layers
from fxopt.analysis.channel_scope import Scope
from fxopt.analysis.labels import Labels
from fxopt.interpret import call_node
from fxopt.ops import Call, operators

__all__ = ["Rule", "builtin_rules"]

Rule = Callable[[Scope, fx.Node], Any]
"""Gives the labels of a node's value: `Labels`, or a tuple of them where it gives several tensors."""


def builtin_rules() -> Mapping[str, Rule]:
    """The rules by canonical operator name."""
    rules: dict[str, Rule] = {}
    rules.update({name: item for names, item in _RULES for name in names.split()})
    elementwise = {item.name: _elementwise for item in operators().values() if item.elementwise}
    return {**elementwise, **rules}


def _elementwise(scope: Scope, node: fx.Node) -> Labels:
    shape = scope.shape(node)
    why = f"meets a value of fixed size at {node.name}"
    result: Labels | None = None
    for item in scope.operands(node):
        padded = item.with_rank(len(shape))
        result = padded if result is None else _joined(scope, result, padded, why)
    scope.lock_numbers(node)
    return Labels.fixed(shape) if result is None else Labels(result.compact, shape)


def _joined(scope: Scope, left: Labels, right: Labels, why: str) -> Labels:
    """The labels of two broadcast operands, made one."""
    shape = tuple(max(sizes) for sizes in zip(left.shape, right.shape, strict=True))
    pair = [left, right]
    for place in (0, 1):
        one, other = pair[place], pair[1 - place]
        spread = [axis for axis in scope.space.reduced(other).axes if one.shape[axis] == 1]
        if not spread:
            continue
        if set(scope.space.reduced(one).axes).isdisjoint(scope.space.reduced(other).axes):
            # each element of it stands for all channels of the other: it stays whatever is removed there
            scope.space.lock(one.compact, f"{why}, with every channel of the other operand")
            return Labels(other.compact, shape)
        pair[1 - place] = scope.mixed(other, spread, why)
    left, right = pair
    scope.space.join(left.compact, right.compact, why)
    return Labels(torch.maximum(left.compact, right.compact), shape)


def _layout(scope: Scope, node: fx.Node) -> Any:
    return _run(scope, node, *scope.labelled(node))


def _reshape(scope: Scope, node: fx.Node) -> Labels:
    # labels are expanded, which `view` does not take
    return Labels.of(scope.input(node).full().reshape(scope.shape(node)))


def _view_as(scope: Scope, node: fx.Node) -> Labels:
    """The shape is another tensor's: what is removed of one is removed of the other."""
    other = scope.tensor(scope.call(node).arguments["other"])
    viewed = Labels.of(scope.input(node).full().reshape(other.shape))
    return _joined(scope, viewed, other, f"given the shape of a value of fixed size at {node.name}")


def _same(scope: Scope, node: fx.Node) -> Labels:
    return scope.input(node)


def _repeat_interleave(scope: Scope, node: fx.Node) -> Any:
    arguments = scope.call(node).arguments
    value = scope.input(node)
    dim = arguments.get("dim")
    if not isinstance(arguments["repeats"], int):
        axes = range(len(value.shape)) if dim is None else [dim]
        value = scope.mixed(value, axes, f"repeated at {node.name}")
    return _layout_of(scope, node, value)


def _run(scope: Scope, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The operator itself, on labels."""
    found = call_node(node, scope.call(node).module, args, kwargs)
    return tuple(map(Labels.of, found)) if isinstance(found, tuple | list) else Labels.of(found)


def _select(scope: Scope, node: fx.Node) -> Any:
    """Indices along an axis: what is at other places of it must go along, as the index would be another."""
    axis = scope.value(scope.call(node).arguments.get("dim", 0))
    return _layout_of(scope, node, scope.mixed(scope.input(node), [axis], f"indexed at {node.name}"))


def _getitem(scope: Scope, node: fx.Node) -> Any:
    arguments = scope.call(node).arguments
    value, index = scope.value(arguments["input"]), arguments["index"]
    if isinstance(value, tuple | list):
        return value[scope.value(index)]
    axes, axis = [], 0
    items = index if isinstance(index, tuple | list) else (index,)
    for position, item in enumerate(items):
        if item is None:
            continue
        if item is Ellipsis:
            axis = len(value.shape) - sum(1 for later in items[position + 1 :] if later is not None)
            continue
        if not isinstance(item, slice) or item.step not in (None, 1):
            axes.append(axis)
        axis += 1
    return _layout_of(scope, node, scope.mixed(value, axes, f"indexed at {node.name}"))


def _index(scope: Scope, node: fx.Node) -> Any:
    value = scope.input(node)
    axes = [axis for axis, item in enumerate(cast("Sequence[Any]", node.args[1])) if item is not None]
    return _layout_of(scope, node, scope.mixed(value, axes, f"indexed at {node.name}"))


def _index_select(scope: Scope, node: fx.Node) -> Any:
    value = scope.input(node)
    return _layout_of(scope, node, scope.mixed(value, [scope.value(node.args[1])], f"indexed at {node.name}"))


def _layout_of(scope: Scope, node: fx.Node, value: Labels) -> Any:
    """A layout operator on its first argument's labels after these were tied; its other tensors are constants."""
    return _run(scope, node, *scope.labelled(node, first=value))


def _unbind(scope: Scope, node: fx.Node) -> Any:
    call = scope.call(node)
    value = scope.input(node)
    axis = scope.value(call.arguments.get("dim", 0))
    return _layout_of(scope, node, scope.mixed(value, [axis], f"taken apart at {node.name}"))


def _slice(scope: Scope, node: fx.Node) -> Any:
    call = scope.call(node)
    value = scope.input(node)
    if call.arguments.get("step", 1) != 1:
        value = scope.mixed(value, [call.arguments.get("dim", 0)], f"taken in steps at {node.name}")
    return _layout_of(scope, node, value)


def _roll(scope: Scope, node: fx.Node) -> Any:
    call = scope.call(node)
    value = scope.input(node)
    dims = call.arguments.get("dims")
    axes = range(len(value.shape)) if dims is None else dims if isinstance(dims, tuple | list) else [dims]
    return _layout_of(scope, node, scope.mixed(value, list(axes), f"rolled at {node.name}"))


def _shuffle(scope: Scope, node: fx.Node) -> Any:
    """Shuffles of channels see them as a grid: (groups, channels of a group), or (channels, places of a block)."""
    call = scope.call(node)
    value = scope.input(node)
    why = f"shuffled with fixed channels at {node.name}"
    if call.op == "channel_shuffle":
        grid = scope.vector(value, 1, why).reshape(_option(scope, node, "groups"), -1).T
    else:
        grid = scope.vector(value, -3, why).reshape(-1, _option(scope, node, "upscale_factor") ** 2)
    scope.space.join(grid[:, :1], grid, why)
    return _layout(scope, node)


def _option(scope: Scope, node: fx.Node, name: str) -> Any:
    """An option of a call, or of the module that is called."""
    call = scope.call(node)
    return scope.value(call.arguments[name]) if call.module is None else getattr(call.module, name)


def _pad(scope: Scope, node: fx.Node) -> Labels:
    value = scope.input(node)
    shape = scope.shape(node)
    padded = [axis for axis, (old, new) in enumerate(zip(value.shape, shape, strict=True)) if old != new]
    return scope.resized(value, padded, shape, f"padded at {node.name}")


def _pool(scope: Scope, node: fx.Node) -> Labels:
    call = scope.call(node)
    value = scope.input(node)
    shape = scope.shape(node)
    count = int(call.op[-2]) if call.op[-1] == "d" else len(shape) - 2
    return scope.resized(value, range(len(shape) - count, len(shape)), shape, f"pooled at {node.name}")


def _unfold(scope: Scope, node: fx.Node) -> Labels:
    """Windows along one axis; the places in a window become the last."""
    axis, shape = scope.value(scope.call(node).arguments["dim"]), scope.shape(node)
    value = scope.input(node)
    return Labels(scope.resized(value, [axis], value.shape, f"unfolded at {node.name}").compact.unsqueeze(-1), shape)


def _im2col(scope: Scope, node: fx.Node) -> Labels:
    """[B, C, H, W] -> [B, C * places of the kernel, windows]."""
    vector, shape = scope.vector(scope.input(node), 1, f"unfolded at {node.name}"), scope.shape(node)
    return Labels.along(vector.repeat_interleave(shape[1] // len(vector)), 1, shape)


def _col2im(scope: Scope, node: fx.Node) -> Labels:
    """[B, C * places of the kernel, windows] -> [B, C, H, W]."""
    vector, shape = scope.vector(scope.input(node), 1, f"folded at {node.name}"), scope.shape(node)
    grid = vector.reshape(shape[1], -1)
    scope.space.join(grid[:, :1], grid, f"folded with fixed channels at {node.name}")
    return Labels.along(grid[:, 0], 1, shape)


def _glu(scope: Scope, node: fx.Node) -> Labels:
    """The first half times the sigmoid of the second."""
    call = scope.call(node)
    axis = scope.value(call.arguments.get("dim", getattr(call.module, "dim", -1)))
    first, second = scope.input(node).full().chunk(2, axis)
    return _joined(scope, Labels.of(first), Labels.of(second), f"meets fixed channels at {node.name}")


def _reduce(scope: Scope, node: fx.Node) -> Labels:
    call = scope.call(node)
    value = scope.input(node)
    shape = scope.shape(node)
    dims = scope.value(call.arguments.get("dim", call.arguments.get("arg1")))
    listed = (
        range(len(value.shape))
        if dims is None or isinstance(dims, bool) or dims in ((), [])
        else dims
        if isinstance(dims, tuple | list)
        else [dims]
    )
    axes = [value.index(axis) for axis in listed]
    mixed = scope.mixed(value, axes, f"{_noun(call)} over channels at {node.name}")
    compact = mixed.compact
    for axis in sorted(axes, reverse=True):
        compact = compact.narrow(axis, 0, 1)
        if len(shape) < len(value.shape):
            compact = compact.squeeze(axis)
    return Labels(compact, shape)


def _along(scope: Scope, node: fx.Node) -> Labels:
    """Operators that mix along one axis and keep the shape: softmax, normalisation to unit length, ..."""
    call = scope.call(node)
    value = scope.input(node)
    dim = scope.value(call.arguments.get("dim", call.arguments.get("arg1", getattr(call.module, "dim", None))))
    dim = (1 if call.op == "normalize" else -1) if dim is None else dim
    axes = dim if isinstance(dim, tuple | list) else [dim]
    return scope.mixed(value, [value.index(axis) for axis in axes], f"{_noun(call)} over channels at {node.name}")


def _matmul(scope: Scope, node: fx.Node) -> Any:
    call = scope.call(node)
    left, right = (scope.tensor(call.arguments[name]) for name in ("input", "other"))
    shape = scope.shape(node)
    if len(left.shape) < 2 or len(right.shape) < 2:
        return scope.barrier(node, f"a product with a vector at {node.name}")
    batch = [f"batch {index}" for index in range(len(shape) - 2)]
    rows = [*batch[len(shape) - len(left.shape) :], "x", "k"]
    columns = [*batch[len(shape) - len(right.shape) :], "k", "y"]
    return scope.contracted(node, [(left, rows), (right, columns)], [*batch, "x", "y"])


def _einsum(scope: Scope, node: fx.Node) -> Any:
    call = scope.call(node)
    equation = str(call.arguments["equation"]).replace(" ", "")
    operands = call.arguments["operands"]
    values = [scope.tensor(item) for item in (operands if isinstance(operands, tuple | list) else (operands,))]
    if "->" not in equation or "." in equation:
        return scope.barrier(node, f"einsum {equation!r} at {node.name} has no rule")
    inputs, output = equation.split("->")
    terms = inputs.split(",")
    if any(len(set(term)) != len(term) for term in terms):
        return scope.barrier(node, f"einsum {equation!r} at {node.name} has no rule")
    return scope.contracted(node, list(zip(values, map(list, terms), strict=True)), list(output))


def _attention(scope: Scope, node: fx.Node) -> Any:
    call = scope.call(node)
    query, key, value = (scope.tensor(call.arguments[name]) for name in ("query", "key", "value"))
    mask = call.arguments.get("attn_mask")
    shape = scope.shape(node)
    batch = [f"batch {index}" for index in range(len(shape) - 2)]
    if call.arguments.get("enable_gqa") and len(shape) > 2:
        key, value = (_repeated(item, query.shape[-3]) for item in (key, value))
    terms = [(query, [*batch, "n", "d"]), (key, [*batch, "m", "d"]), (value, [*batch, "m", "e"])]
    if any(len(item.shape) != len(shape) for item, _ in terms):
        return scope.barrier(node, f"attention over operands of different ranks at {node.name}")
    if isinstance(mask, fx.Node):
        bias = scope.tensor(mask)
        terms.append((bias, [*batch, "n", "m"][len(shape) - len(bias.shape) :]))
    return scope.contracted(node, terms, [*batch, "n", "e"])


def _repeated(value: Labels, heads: int) -> Labels:
    """Keys or values shared by several query heads, once for each."""
    return Labels.of(value.full().repeat_interleave(heads // value.shape[-3], dim=-3))


def _made(scope: Scope, node: fx.Node) -> Any:
    """New values of fixed size: only the type of a tensor is read."""
    return scope.fixed(node)


def _output(scope: Scope, node: fx.Node) -> None:
    for item in scope.operands(node):
        scope.space.lock(item.compact, "an output of the model")


def _noun(call: Call) -> str:
    return call.op.removeprefix("unknown:aten.").partition(".")[0]


_RULES: tuple[tuple[str, Rule], ...] = (
    ("conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d", channel_layers.convolution),
    ("linear", channel_layers.linear),
    ("embedding", channel_layers.embedding),
    ("batch_norm instance_norm", channel_layers.channel_norm),
    ("layer_norm rms_norm", channel_layers.layer_norm),
    ("group_norm", channel_layers.group_norm),
    ("prelu", channel_layers.prelu),
    (
        "flatten unflatten permute transpose t squeeze unsqueeze expand repeat cat stack split chunk flip "
        "pixel_unshuffle movedim unknown:aten.tensor_split.indices unknown:aten.tensor_split.sections",
        _layout,
    ),
    ("view reshape", _reshape),
    ("view_as", _view_as),
    ("type_as", _same),
    ("repeat_interleave", _repeat_interleave),
    ("unfold", _unfold),
    ("im2col", _im2col),
    ("col2im", _col2im),
    ("glu", _glu),
    ("channel_shuffle pixel_shuffle", _shuffle),
    ("select", _select),
    ("getitem", _getitem),
    ("unknown:aten.index.Tensor", _index),
    ("unknown:aten.index_select.default", _index_select),
    ("unbind", _unbind),
    ("slice narrow", _slice),
    ("roll", _roll),
    ("pad constant_pad", _pad),
    (
        "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
        "adaptive_avg_pool3d adaptive_max_pool2d",
        _pool,
    ),
    ("interpolate", _pool),
    (
        "mean sum amax amin var std norm logsumexp",
        _reduce,
    ),
    ("softmax log_softmax normalize unknown:aten.cumsum.default unknown:torch.cumsum unknown:cumsum", _along),
    ("dropout1d dropout2d dropout3d alpha_dropout drop_path", _elementwise),
    ("matmul mm bmm", _matmul),
    ("einsum", _einsum),
    ("scaled_dot_product_attention", _attention),
    (
        "unknown:aten.new_zeros.default unknown:aten.new_ones.default unknown:aten.new_full.default "
        "unknown:aten.new_empty.default unknown:new_zeros unknown:new_ones unknown:new_full",
        _made,
    ),
    ("output", _output),
)
