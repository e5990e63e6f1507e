"""Layers whose weight is given by a module that holds it in another form: as a codebook, or as integers.

The module sits at the layer's path, and the layer becomes a function of what it gives. Layers that share a weight go
together and go on sharing it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxopt import edit
from fxopt.analysis.constants import held_tensors
from fxopt.masking import mask_of
from fxopt.ops import Call
from fxopt.program import Program

__all__ = ["FUNCTIONS", "call_with", "readers_of", "reason_to_leave", "weight_of"]

FUNCTIONS: Mapping[str, Any] = {
    "conv1d": F.conv1d,
    "conv2d": F.conv2d,
    "conv3d": F.conv3d,
    "conv_transpose1d": F.conv_transpose1d,
    "conv_transpose2d": F.conv_transpose2d,
    "conv_transpose3d": F.conv_transpose3d,
    "linear": F.linear,
    "embedding": F.embedding,
}
"""The functional form of each layer that can be given its weight, by operator."""


def weight_of(program: Program, node: fx.Node) -> Tensor:
    """The weight of the layer that a node calls."""
    return cast("Tensor", cast("nn.Module", program.module_of(node)).weight)


def readers_of(program: Program, weight: Tensor) -> list[fx.Node]:
    """The nodes whose module holds this very tensor, and those that read it."""
    return [item for item in program.nodes if any(held is weight for held in held_tensors(program, item))]


def reason_to_leave(program: Program, layers: Sequence[fx.Node], ignore: Sequence[str]) -> str | None:
    """Why a weight cannot be held in another form, whatever the form; None if it can.

    Args:
        program: the program.
        layers: all that read the weight, the first one a layer.
        ignore: patterns of layer paths that are left alone.
    """
    paths = {str(item.target) for item in layers}
    if any(fnmatch(path, pattern) for path in paths for pattern in ignore):
        return "ignored"
    for item in layers:
        if program.op(item) not in FUNCTIONS:
            return f"its weight is read by {item.name} too"
        if mask_of(program.module_of(item)) is not mask_of(program.module_of(layers[0])):
            return "layers that share its weight have other masks"
        reason = _no_functional_form(program, item)
        if reason is not None:
            return reason
    for reader in program.nodes:
        if reader.op == "get_attr" and str(reader.target).rpartition(".")[0] in paths:
            return f"{reader.name} reads a tensor of the layer"
    return None if bool(weight_of(program, layers[0]).isfinite().all()) else "its weight is not finite"


def _no_functional_form(program: Program, node: fx.Node) -> str | None:
    """Why a layer cannot be called with a weight from elsewhere."""
    if len(node.args) + len(node.kwargs) > 1:
        return f"{node.name} is called with an output size"
    if program.op(node) == "embedding" and cast("nn.Embedding", program.module_of(node)).max_norm is not None:
        return f"{node.target} normalises its weight as it is read"
    return None


def call_with(program: Program, layers: Sequence[fx.Node], held: nn.Module, bias: nn.Module | None = None) -> None:
    """Puts `held` in the place of the first layer's module, and calls all of the layers with what it gives.

    Args:
        program: is edited.
        layers: all that read the weight, in the order of the program.
        held: gives the weight.
        bias: gives the bias of all of them; by default they keep theirs.
    """
    calls = [program.call(layer) for layer in layers]
    paths = [str(layer.target) for layer in layers]
    source = layers[0]
    edit.set_module(program, source, held)
    biases: dict[int, fx.Node] = {}
    given = None if bias is None else edit.insert_before(program, source, bias, (), name=f"{paths[0]}.bias")
    for call, path in zip(calls, paths, strict=True):
        own = getattr(call.module, "bias", None)
        if given is None and own is not None and id(own) not in biases:
            biases[id(own)] = edit.insert_tensor(program, source, own, name=f"{path}.bias")
    for layer, call in zip(layers, calls, strict=True):
        # the first goes first: what is behind it may be the input of another
        value = next(iter((*layer.args, *layer.kwargs.values())))
        padding = getattr(call.module, "padding_mode", "zeros")
        if padding != "zeros":
            pads = tuple(cast("Any", call.module)._reversed_padding_repeated_twice)
            value = edit.insert_before(program, layer, F.pad, (value, pads, padding))
        arguments = (value, source, *_options(call, given or biases.get(id(getattr(call.module, "bias", None)))))
        if layer is source:
            edit.set_arguments(program, source, ())
            edit.insert_after(program, source, FUNCTIONS[call.op], arguments)
        else:
            edit.replace(program, layer, FUNCTIONS[call.op], arguments, {})


def _options(call: Call, bias: fx.Node | None) -> tuple[Any, ...]:
    """The arguments of the functional form behind input and weight."""
    layer: Any = call.module
    if call.op == "embedding":
        # gradients of a weight that is computed cannot be sparse
        return (layer.padding_idx, None, 2.0, layer.scale_grad_by_freq, False)
    if call.op == "linear":
        return (bias,)
    padding = layer.padding if layer.padding_mode == "zeros" else 0
    if call.op.startswith("conv_transpose"):
        return (bias, layer.stride, padding, layer.output_padding, layer.groups, layer.dilation)
    return (bias, layer.stride, padding, layer.dilation, layer.groups)
