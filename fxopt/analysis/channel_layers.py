"""Channel rules of layers: convolutions, linear layers, embeddings, norms, PReLU.

A layer gives labels of its own to the channels that it computes, and ties those that it reads to the axes of its
tensors.

Where a layer is a function, its tensors are operands with labels as any value has. Only one axis of such an operand can
shrink, as an element has one label: of a weight, that of what is computed. What the layer reads is locked.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import fx, nn

from fxopt.analysis.channel_scope import Scope
from fxopt.analysis.labels import Labels

__all__ = ["channel_norm", "convolution", "embedding", "group_norm", "layer_norm", "linear", "prelu"]


def convolution(scope: Scope, node: fx.Node) -> Any:
    """Any number of axes, transposed or not, grouped or not."""
    call = scope.call(node)
    if call.module is None:
        return _with_given_weight(scope, node)
    layer = cast("nn.Conv2d", call.module)
    value, shape = scope.input(node), scope.shape(node)
    axis = len(shape) - int(call.op[-2]) - 1
    transposed = call.op.startswith("conv_transpose")
    inputs = scope.vector(value, axis, f"read at {node.name}")
    outputs = scope.space.fresh(layer.out_channels)
    grid_in, grid_out = inputs.reshape(layer.groups, -1), outputs.reshape(layer.groups, -1)
    why = f"grouped with fixed channels at {node.name}"
    first_in, first_out = inputs, outputs
    if layer.groups > 1 and layer.groups >= grid_in.shape[1]:
        # narrow groups go as a whole
        scope.space.join(grid_out[:, :1], grid_out, why)
        scope.space.join(grid_out[:, :1], grid_in, why)
        scope.member(node, "groups", None, grid_out[:, 0])
    elif layer.groups > 1:
        # wide groups all shrink alike
        scope.space.join(grid_in[:1], grid_in, why)
        scope.space.join(grid_out[:1], grid_out, why)
        first_in, first_out = grid_in[0], grid_out[0]
    whole = layer.groups > 1 and layer.groups >= grid_in.shape[1]
    if transposed:
        scope.member(node, "weight", 0, inputs)
        if not whole:
            scope.member(node, "weight", 1, first_out)
    else:
        scope.member(node, "weight", 0, outputs)
        if not whole:
            scope.member(node, "weight", 1, first_in)
    scope.member(node, "bias", 0, outputs)
    scope.member(node, "in_channels", None, inputs)
    scope.member(node, "out_channels", None, outputs)
    return Labels.along(outputs, axis, shape)


def linear(scope: Scope, node: fx.Node) -> Any:
    """Applied along another axis than that of the channels, to each of them alike, it passes them on."""
    call = scope.call(node)
    if call.module is None:
        return _with_given_weight(scope, node)
    layer = cast("nn.Linear", call.module)
    value, shape = scope.input(node), scope.shape(node)
    outputs = scope.space.fresh(layer.out_features)
    scope.member(node, "weight", 0, outputs)
    scope.member(node, "bias", 0, outputs)
    scope.member(node, "out_features", None, outputs)
    if scope.lies_across(value, -1):
        scope.space.lock(outputs, f"computed along another axis than that of the channels at {node.name}")
        return Labels(value.compact, shape)
    inputs = scope.vector(value, -1, f"read at {node.name}")
    scope.member(node, "weight", 1, inputs)
    scope.member(node, "in_features", None, inputs)
    return Labels.along(outputs, len(shape) - 1, shape)


def _with_given_weight(scope: Scope, node: fx.Node) -> Any:
    """A linear layer or convolution of which the weight is an operand."""
    call = scope.call(node)
    if call.arguments.get("groups", 1) != 1:
        return scope.barrier(node, f"{call.op} at {node.name} is grouped, with a weight from elsewhere")
    shape = scope.shape(node)
    axis = len(shape) - 1 if call.op == "linear" else len(shape) - int(call.op[-2]) - 1
    why = f"{call.op} at {node.name} reads it with a weight from elsewhere (simplify makes constant ones parameters)"
    scope.space.lock(scope.input(node).compact, why)
    weight = scope.tensor(call.arguments["weight"])
    outputs = scope.vector(weight, 1 if "transpose" in call.op else 0, f"a weight at {node.name}")
    _tie(scope, node, "bias", 0, outputs)
    return Labels.along(outputs, axis, shape)


def _tie(scope: Scope, node: fx.Node, name: str, axis: int, labels: torch.Tensor) -> None:
    """Ties an axis of a layer's tensor to channels: a tensor of the module, or an operand."""
    call = scope.call(node)
    operand = call.arguments.get(name)
    if isinstance(operand, fx.Node):
        why = f"meets a value of fixed size at {node.name}"
        scope.space.join(scope.vector(scope.tensor(operand), axis, f"read at {node.name}"), labels, why)
    elif call.module is not None:
        scope.member(node, name, axis, labels)


def embedding(scope: Scope, node: fx.Node) -> Labels:
    """Its rows are values, its columns channels."""
    call, shape = scope.call(node), scope.shape(node)
    if call.module is None:
        outputs = scope.vector(scope.tensor(call.arguments["weight"]), 1, f"indexed at {node.name}")
        return Labels.along(outputs, len(shape) - 1, shape)
    table = cast("nn.Embedding", call.module)
    outputs = scope.space.fresh(table.embedding_dim)
    scope.member(node, "weight", 0, torch.zeros(table.num_embeddings, dtype=torch.int64))
    scope.member(node, "weight", 1, outputs)
    scope.member(node, "embedding_dim", None, outputs)
    return Labels.along(outputs, len(shape) - 1, shape)


def channel_norm(scope: Scope, node: fx.Node) -> Labels:
    """Batch and instance norm: every channel by itself."""
    value, shape = scope.input(node), scope.shape(node)
    vector = scope.vector(value, 1, f"read at {node.name}")
    for name in ("weight", "bias", "running_mean", "running_var"):
        _tie(scope, node, name, 0, vector)
    scope.member(node, "num_features", None, vector)
    return Labels.along(vector, 1, shape)


def layer_norm(scope: Scope, node: fx.Node) -> Any:
    """Layer and RMS norm: statistics over the channels that are there."""
    call = scope.call(node)
    value, shape = scope.input(node), scope.shape(node)
    sizes = scope.value(call.arguments["normalized_shape"]) if call.module is None else call.module.normalized_shape
    if len(cast("Any", sizes)) > 1:
        return scope.barrier(node, f"normalised over several axes at {node.name}")
    if scope.lies_across(value, -1):
        return value
    vector = scope.vector(value, -1, f"read at {node.name}")
    for name in ("weight", "bias"):
        _tie(scope, node, name, 0, vector)
    scope.member(node, "normalized_shape", None, vector)
    return Labels.along(vector, len(shape) - 1, shape)


def group_norm(scope: Scope, node: fx.Node) -> Labels:
    """All groups shrink alike; those of one channel go with it."""
    call = scope.call(node)
    groups: Any = scope.value(call.arguments["num_groups"]) if call.module is None else call.module.num_groups
    vector = scope.vector(scope.input(node), 1, f"read at {node.name}")
    grid = vector.reshape(groups, -1)
    if grid.shape[1] == 1:
        scope.member(node, "num_groups", None, vector)
    else:
        scope.space.join(grid[:1], grid, f"normalised with fixed channels at {node.name}")
    for name in ("weight", "bias"):
        _tie(scope, node, name, 0, vector)
    scope.member(node, "num_channels", None, vector)
    return Labels.along(vector, 1, scope.shape(node))


def prelu(scope: Scope, node: fx.Node) -> Labels:
    """One slope for all channels, or one for each."""
    call = scope.call(node)
    value = scope.input(node)
    slopes: Any = scope.shape(call.arguments["weight"])[0] if call.module is None else call.module.num_parameters
    if slopes == 1:
        return value
    vector = scope.vector(value, 1, f"read at {node.name}")
    _tie(scope, node, "weight", 0, vector)
    scope.member(node, "num_parameters", None, vector)
    return Labels.along(vector, 1, value.shape)
