"""Folds BatchNorm with fixed statistics into the convolution or linear layer before it, or behind it.

In evaluation mode BatchNorm is an affine map per channel, y = s x + t with s = gamma / sqrt(var + eps) and t = beta -
mean s.

    layer, then BatchNorm:   W' = s W (along output channels),  b' = s b + t
    BatchNorm, then layer:   W' = W s (along input channels),   b' = b + sum W t

The second form needs every output to see every input of its window: a layer that pads with zeros sees zeros where
BatchNorm would have given t. It is legal with padding modes that copy values, without padding, and where t = 0.

Refused, with the reason: training mode, no running statistics, a layer whose output has other users, a layer called at
several places (its weights would have to be copied: `clone_shared=True` does that), channels on another axis, results
that are not finite. Identities and dropout in evaluation mode may stand between. Folding is computed in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, cast

import torch
from torch import Tensor, fx, nn

from fxopt import edit
from fxopt.analysis.affine import Affine, formula_of
from fxopt.analysis.identities import is_identity, source_behind_identities
from fxopt.analysis.shapes import TensorSpec, shapes
from fxopt.passes_base import Pass, Rewrite, Skip
from fxopt.program import Program

__all__ = ["FoldBatchNorm"]

_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
_TRANSPOSED = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
_LAYERS = (*_CONVOLUTIONS, *_TRANSPOSED, "linear")


@dataclass(frozen=True, kw_only=True)
class FoldBatchNorm(Pass):
    """Folds BatchNorm into convolutions and linear layers.

    Attributes:
        clone_shared: fold into a layer that is called at several places too, by giving this call a copy of the weights.
    """

    name: ClassVar[str] = "fold_batch_norm"
    exact: ClassVar[bool] = True
    provides: ClassVar[frozenset[str]] = frozenset({"batch_norm_folded"})

    clone_shared: bool = False

    def plan(self, program: Program) -> Iterator[Rewrite | Skip]:
        """One decision per BatchNorm call."""
        for node in program.nodes:
            if program.op(node) != "batch_norm":
                continue
            affine = _affine(program, node)
            if isinstance(affine, str):
                yield Skip(node.name, affine)
                continue
            before = self._layer_before(program, node, affine)
            if isinstance(before, fx.Node):
                yield Rewrite(node.name, f"fold into {before.target} before it", {"before": before.name, "behind": []})
                continue
            behind = self._layers_behind(program, node, affine)
            if isinstance(behind, list):
                paths = ", ".join(str(layer.target) for layer in behind)
                names = [layer.name for layer in behind]
                yield Rewrite(node.name, f"fold into {paths} behind it", {"before": None, "behind": names})
                continue
            yield Skip(node.name, f"{before}; {behind}")

    def apply(self, program: Program, rewrite: Rewrite) -> None:
        """Moves one BatchNorm into its layers and takes it out."""
        norm = program.node(rewrite.node)
        affine = _affine(program, norm)
        assert isinstance(affine, _Affine)
        if rewrite.params["before"] is not None:
            layer = program.node(rewrite.params["before"])
            _assign(program, layer, _folded_before(_layer(program, layer), affine))
        for name in rewrite.params["behind"]:
            layer = program.node(name)
            _assign(program, layer, _folded_behind(_layer(program, layer), affine))
        edit.bypass(program, norm, cast(fx.Node, norm.args[0]))

    def _layer_before(self, program: Program, norm: fx.Node, affine: _Affine) -> fx.Node | str:
        """The layer whose output `norm` may be folded into, or why there is none."""
        layer, chain = source_behind_identities(program, cast(fx.Node, norm.args[0]))
        kind = program.op(layer)
        if kind not in _LAYERS or program.module_of(layer) is None:
            return f"behind {_noun(program, layer)}"
        for item in (*chain, layer):
            readers = [user for user in item.users if not _asks_for_shape(program, user)]
            if len(readers) > 1:
                return f"output of {item.target} has {len(readers)} users"
        reason = self._shared(program, layer) or _wrong_axis(program, layer, kind)
        if reason is not None:
            return reason
        folded = _folded_before(_layer(program, layer), affine)
        return layer if folded.finite() else f"the weights of {layer.target} would not be finite"

    def _layers_behind(self, program: Program, norm: fx.Node, affine: _Affine) -> list[fx.Node] | str:
        """The layers that `norm` may be folded into, all of its users; or why not."""
        layers: list[fx.Node] = []
        pending = list(norm.users)
        while pending:
            user = pending.pop(0)
            if _asks_for_shape(program, user):
                continue
            if is_identity(program, user):
                pending += list(user.users)
                continue
            kind, module = program.op(user), program.module_of(user)
            if kind not in _LAYERS or module is None:
                return f"before {_noun(program, user)}"
            reason = self._shared(program, user) or _wrong_axis(program, user, kind)
            if reason is not None:
                return reason
            if _mixes_zeros(_layer(program, user), kind) and bool((affine.shift != 0).any()):
                return f"{user.target} pads with zeros, which BatchNorm would shift"
            if not _folded_behind(_layer(program, user), affine).finite():
                return f"the weights of {user.target} would not be finite"
            layers.append(user)
        return layers or "nothing uses it"

    def _shared(self, program: Program, layer: fx.Node) -> str | None:
        places = len(program.callers(layer))
        if places > 1 and not self.clone_shared:
            return f"{layer.target} is called at {places} places"
        return None


class _Affine(NamedTuple):
    """y = scale x + shift, one value per channel, in float64."""

    scale: Tensor
    shift: Tensor


class _Folded(NamedTuple):
    """New weight and bias, in float64."""

    weight: Tensor
    bias: Tensor

    def finite(self) -> bool:
        return bool(torch.isfinite(self.weight).all() and torch.isfinite(self.bias).all())


_Layer = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d | nn.Linear


def _layer(program: Program, node: fx.Node) -> _Layer:
    return cast(_Layer, program.module_of(node))


def _affine(program: Program, norm: fx.Node) -> _Affine | str:
    """The map that a BatchNorm call computes, or why it is not fixed."""
    formula = formula_of(program, norm)
    if not isinstance(formula, Affine):
        return formula or "it writes in place"
    return _Affine(cast("Tensor", formula.operands[0][1]), cast("Tensor", formula.shift))


def _folded_before(layer: _Layer, affine: _Affine) -> _Folded:
    """The layer followed by the affine map."""
    weight = layer.weight.detach().double()
    bias = layer.bias.detach().double() if layer.bias is not None else torch.zeros_like(affine.shift)
    return _Folded(_scale(layer, weight, affine.scale, outputs=True), affine.scale * bias + affine.shift)


def _folded_behind(layer: _Layer, affine: _Affine) -> _Folded:
    """The affine map followed by the layer."""
    weight = layer.weight.detach().double()
    shifted = _scale(layer, weight, affine.shift, outputs=False)
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        # only reached with a shift of zero
        added = torch.zeros(layer.out_channels, dtype=torch.float64, device=weight.device)
    else:
        added = shifted.flatten(1).sum(1)
    bias = added if layer.bias is None else layer.bias.detach().double() + added
    return _Folded(_scale(layer, weight, affine.scale, outputs=False), bias)


def _scale(layer: _Layer, weight: Tensor, factors: Tensor, *, outputs: bool) -> Tensor:
    """The weight times one factor per output (or input) channel of the layer.

    Weights are [out, in / groups, ...], those of transposed convolutions [in, out / groups, ...].
    """
    transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
    groups = 1 if isinstance(layer, nn.Linear) else layer.groups
    grouped = weight.reshape(groups, -1, *weight.shape[1:])
    if outputs != transposed:
        shape = (groups, -1, 1) + (1,) * (weight.ndim - 2)
    else:
        shape = (groups, 1, -1) + (1,) * (weight.ndim - 2)
    return (grouped * factors.reshape(shape)).flatten(0, 1)


def _assign(program: Program, node: fx.Node, folded: _Folded) -> None:
    dtype = _layer(program, node).weight.dtype
    edit.set_tensor(program, node, "weight", folded.weight.to(dtype))
    edit.set_tensor(program, node, "bias", folded.bias.to(dtype))


def _wrong_axis(program: Program, layer: fx.Node, kind: str) -> str | None:
    """BatchNorm works on axis 1; the layer's channels must be there."""
    spec = program.analysis(shapes)[layer.name]
    rank = 2 if kind == "linear" else int(kind[-2]) + 2
    if isinstance(spec, TensorSpec) and len(spec.shape) == rank:
        return None
    return f"the channels of {layer.target} are not on axis 1"


def _asks_for_shape(program: Program, node: fx.Node) -> bool:
    """Whether `node` reads the shape or type of its input only, which folding does not change."""
    call = program.call(node)
    return call.op == "size" or (call.op == "getattr" and call.arguments.get("name") in ("shape", "ndim", "dtype"))


def _mixes_zeros(layer: _Layer, kind: str) -> bool:
    """Whether some outputs of the layer see zeros instead of inputs."""
    if isinstance(layer, nn.Linear):
        return False
    if kind in _TRANSPOSED:
        return True
    if layer.padding_mode != "zeros" or layer.padding == "valid":
        return False
    if layer.padding == "same":
        return any(size > 1 for size in layer.kernel_size)
    return any(size != 0 for size in cast("tuple[int, ...]", layer.padding))


def _noun(program: Program, node: fx.Node) -> str:
    return {"placeholder": "an input", "output": "an output"}.get(
        program.op(node), program.op(node).removeprefix("unknown:")
    )
