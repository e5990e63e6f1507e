"""Which layers can hold their weight as integers, and which are left alone, with the reason."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatch
from math import prod
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import fx, nn

from fxopt.analysis.shapes import TensorSpec, shapes
from fxopt.errors import InputError
from fxopt.held_weight import FUNCTIONS, readers_of, reason_to_leave, weight_of
from fxopt.passes_base import Skip

if TYPE_CHECKING:
    from fxopt.program import Program

__all__ = ["Layers", "find_layers"]

_RECURRENT = frozenset({"lstm", "gru", "rnn"})
_NO_KERNEL = "has no integer kernel"
_SEQUENCES = 3  # axes: batch, places and numbers


class Layers(NamedTuple):
    """The layers of a program, as far as they are quantized.

    Attributes:
        weights: for each weight that becomes integers, all that read it, in the order of the program.
        left: what stays as it is.
    """

    weights: list[list[fx.Node]]
    left: list[Skip]

    @property
    def names(self) -> list[list[str]]:
        """Of the nodes in `weights`."""
        return [[node.name for node in layers] for layers in self.weights]


def find_layers(
    program: Program,
    kernels: Collection[str],
    ignore: Sequence[str],
    *,
    others: str = _NO_KERNEL,
    pads_zeros_only: bool = True,
    fewest_terms: int = 0,
    fewest_states: Mapping[str, int] = MappingProxyType({}),
) -> Layers:
    """The layers to quantize, by the weight that they read, and those that are left alone.

    Args:
        program: the program.
        kernels: operators for which there are integer kernels.
        ignore: patterns of layer paths.
        others: what is said of layers of other kinds, behind the operator's name.
        pads_zeros_only: whether a kernel that pads with anything but zeros is missing.
        fewest_terms: see `Scheme`.
        fewest_states: that a recurrent layer must have, by operator.

    Raises:
        InputError: if there is none to quantize.
    """
    weights: list[list[fx.Node]] = []
    left: list[Skip] = []
    seen: set[int] = set()
    for node in program.nodes:
        call = program.call(node)
        if call.op in _RECURRENT:
            layers = program.callers(node) or [node]
            fewest = fewest_states.get(call.op, 0)
            reason = (
                _reason_to_leave_recurrent(program, layers, ignore, fewest)
                if call.op in kernels
                else f"{call.op} {others}"
            )
            if reason is not None:
                left.append(Skip(node.name, reason))
            elif layers[0] is node:
                weights.append(layers)
        if call.op not in FUNCTIONS or (call.op == "embedding" and call.op not in kernels):
            continue
        if call.module is None:
            left.append(Skip(node.name, f"its weight comes from {call.arguments.get('weight')}"))
        elif id(weight_of(program, node)) not in seen:
            weight = weight_of(program, node)
            seen.add(id(weight))
            layers = readers_of(program, weight)
            reason = _reason_to_leave(program, layers, kernels, ignore, others)
            if reason is None and pads_zeros_only:
                reason = _reason_of_padding(program, layers)
            if reason is None:
                reason = _reason_of_size(program, layers, fewest_terms)
            if reason is None:
                weights.append(layers)
            else:
                left.append(Skip(node.name, reason))
    if not weights:
        reasons = "; ".join(map(str, left[:3])) or "it has no convolution or linear layer"
        raise InputError(f"quantize finds no layer that could compute with integers: {reasons}")
    return Layers(weights, left)


def _reason_to_leave(
    program: Program, layers: Sequence[fx.Node], kernels: Collection[str], ignore: Sequence[str], others: str
) -> str | None:
    """Why layers that share a weight do not hold it as integers; None if they do."""
    reason = reason_to_leave(program, layers, ignore)
    if reason is not None:
        return reason
    for layer in layers:
        if program.op(layer) not in kernels:
            return f"{program.op(layer)} {others}"
        if _input_of(program, layer).dtype is not torch.float32:
            return "it does not compute in float32"
    return None


def _reason_of_padding(program: Program, layers: Sequence[fx.Node]) -> str | None:
    """Why there is no integer kernel for the padding of a layer; None if there is."""
    modes = [getattr(program.module_of(layer), "padding_mode", "zeros") for layer in layers]
    odd = next((mode for mode in modes if mode != "zeros"), None)
    return None if odd is None else f"there is no integer kernel that pads with padding_mode={odd!r}"


def _reason_of_size(program: Program, layers: Sequence[fx.Node], fewest: int) -> str | None:
    """Why a convolution is too small for integers; None if it is not."""
    layer = program.module_of(layers[0])
    if not isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) or prod(layer.kernel_size) == 1:
        return None
    terms, depthwise = layer.weight[0].numel(), 1 < layer.groups == layer.in_channels == layer.out_channels
    small = terms < fewest and not depthwise
    return f"it adds up {terms} products, no faster with integers on this target" if small else None


def _reason_to_leave_recurrent(
    program: Program, layers: Sequence[fx.Node], ignore: Sequence[str], fewest: int
) -> str | None:
    """Why the calls of a recurrent layer do not compute with integers; None if they do."""
    path, layer = str(layers[0].target), program.module_of(layers[0])
    if not isinstance(layer, nn.RNNBase):
        return f"its weights come from arguments of {layers[0].name}"
    if any(fnmatch(path, pattern) for pattern in ignore):
        return "ignored"
    if layer.proj_size:
        return f"{program.op(layers[0])} with a projection has no integer kernel"
    if layer.hidden_size < fewest:
        return f"it has {layer.hidden_size} states, and with fewer than {fewest} integers are no faster"
    if layer.training and layer.dropout:
        return "it draws random zeros between its layers"
    if any(_input_of(program, call).dtype is not torch.float32 for call in layers):
        return "it does not compute in float32"
    if any(len(_input_of(program, call).shape) != _SEQUENCES for call in layers):
        return "its input has no batch axis"
    for tensor in layer.parameters():
        outside = next((reader for reader in readers_of(program, tensor) if reader not in layers), None)
        if outside is not None:
            return f"a weight of it is read by {outside.name} too"
        if not bool(tensor.isfinite().all()):
            return "its weight is not finite"
    return None


def _input_of(program: Program, layer: fx.Node) -> TensorSpec:
    """What a layer reads."""
    source = cast("fx.Node", program.call(layer).arguments["input"])
    return cast("TensorSpec", program.analysis(shapes)[source.name])
