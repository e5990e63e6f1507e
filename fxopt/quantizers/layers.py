"""Which layers can hold their weight as integers, and which are left alone, with the reason."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import fx

from fxopt.analysis.shapes import TensorSpec, shapes
from fxopt.errors import InputError
from fxopt.held_weight import FUNCTIONS, readers_of, reason_to_leave, weight_of
from fxopt.passes_base import Skip

if TYPE_CHECKING:
    from fxopt.program import Program

__all__ = ["Layers", "find_layers"]

_RECURRENT = frozenset({"lstm", "gru", "rnn"})


class Layers(NamedTuple):
    """The layers of a program, as far as they are quantized.

    Attributes:
        weights: for each weight that becomes integers, all that read it, in the order of the program.
        left: what stays as it is.
    """

    weights: list[list[fx.Node]]
    left: list[Skip]


def find_layers(program: Program, kernels: Collection[str], ignore: Sequence[str]) -> Layers:
    """The layers to quantize, by the weight that they read, and those that are left alone.

    Args:
        program: the program.
        kernels: operators for which there are integer kernels.
        ignore: patterns of layer paths.

    Raises:
        InputError: if there is none to quantize.
    """
    weights: list[list[fx.Node]] = []
    left: list[Skip] = []
    seen: set[int] = set()
    for node in program.nodes:
        call = program.call(node)
        if call.op in _RECURRENT and call.op not in kernels:
            left.append(Skip(node.name, f"{call.op} has no integer kernel"))
        if call.op not in FUNCTIONS or (call.op == "embedding" and call.op not in kernels):
            continue
        if call.module is None:
            left.append(Skip(node.name, f"its weight comes from {call.arguments.get('weight')}"))
        elif id(weight_of(program, node)) not in seen:
            weight = weight_of(program, node)
            seen.add(id(weight))
            layers = readers_of(program, weight)
            reason = _reason_to_leave(program, layers, kernels, ignore)
            if reason is None:
                weights.append(layers)
            else:
                left.append(Skip(node.name, reason))
    if not weights:
        reasons = "; ".join(map(str, left[:3])) or "it has no convolution or linear layer"
        raise InputError(f"quantize finds no layer that could compute with integers: {reasons}")
    return Layers(weights, left)


def _reason_to_leave(
    program: Program, layers: Sequence[fx.Node], kernels: Collection[str], ignore: Sequence[str]
) -> str | None:
    """Why layers that share a weight do not compute with integers; None if they do."""
    reason = reason_to_leave(program, layers, ignore)
    if reason is not None:
        return reason
    known = program.analysis(shapes)
    for layer in layers:
        op, module = program.op(layer), cast("Any", program.module_of(layer))
        source = program.call(layer).arguments.get("input")
        if op not in kernels:
            return f"{op} has no integer kernel"
        if getattr(module, "padding_mode", "zeros") != "zeros":
            return f"there is no integer kernel that pads with padding_mode={module.padding_mode!r}"
        spec = known.get(source.name) if isinstance(source, fx.Node) else None
        if not isinstance(spec, TensorSpec) or spec.dtype is not torch.float32:
            return "it does not compute in float32"
    return None
