"""Scales channels so that quantization loses less: the large ones of a value no longer push the small ones out.

    W1 -> diag(s) W1,   b1 -> s b1,   W2 -> W2 diag(1 / s)        see `fxopt/analysis/scalable_channels.py`

With r the largest magnitude of each channel of the value and m that of the weights that read it, the factors tried are

    s = m^(1 - a) / r^a,   a = 1/4, 1/2, 3/4, 1

of which a = 1/2 is cross-layer equalisation (Nagel et al., arXiv:1906.04721, where r is that of the weights in front),
and the others are those of SmoothQuant (arXiv:2211.10438). What a choice comes to is told by the noise of rounding,
D² / 12 for steps of D, as it arrives behind the layers that read the value:

    activations   R² / 12 sum_c |w_c|² / s_c²,                     R = max(s r) / 255
    weights       sum_o (max_c |w_oc| / s_c / 127)² / 12 sum_c s_c² E[x_c²]

and the best one is taken if it takes away half of the noise or more. Exact in itself: outputs change by rounding
only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from fxopt import edit
from fxopt.analysis.channel_magnitudes import Magnitudes, channel_magnitudes
from fxopt.analysis.scalable_channels import ScalableChannels, scalable_channels

if TYPE_CHECKING:
    from fxopt.program import Program

__all__ = ["Equalization", "equalizations", "scale_channels"]

_STRENGTHS = (0.25, 0.5, 0.75, 1.0)
_WORTH = 0.5  # of the noise without it: what is expected must be clear
_STEPS, _WEIGHT_STEPS = 255, 127
_MOST = 1e3  # by which a channel is scaled, up or down


class Equalization(NamedTuple):
    """Factors for the channels between layers.

    Attributes:
        channels: which.
        factors: float64, one for each.
        noise: that is expected, over that without them.
    """

    channels: ScalableChannels
    factors: Tensor
    noise: float


def equalizations(program: Program, layers: Sequence[str], *, per_channel: bool) -> Iterator[Equalization]:
    """What is worth scaling.

    Args:
        program: with calibration data, in floating point.
        layers: names of the nodes that call what is to be quantized.
        per_channel: whether each output of a weight has a scale of its own.
    """
    wanted = set(layers)
    found = [item for item in scalable_channels(program) if wanted.issuperset(item.readers)]
    axes = {
        value: 1 if program.op(program.node(item.giver)).startswith("conv") else -1
        for item in found
        for value in item.values
    }
    seen = channel_magnitudes(program, axes)
    for item in found:
        factors, noise = _best(program, item, seen, per_channel=per_channel)
        if noise < _WORTH:
            yield Equalization(item, factors, noise)


def scale_channels(program: Program, giving: str, reading: Sequence[str], factors: Tensor) -> None:
    """Multiplies what a layer gives by factors, and divides the weights that read it.

    Args:
        program: is edited.
        giving: name of the node that calls the layer.
        reading: names of the nodes that call those behind.
        factors: float64, one for each channel.
    """
    giver = program.node(giving)
    layer: Any = program.module_of(giver)
    for name in ("weight", "bias"):
        tensor: Tensor | None = getattr(layer, name)
        if tensor is not None:
            edit.set_tensor(program, giver, name, _scaled(tensor, factors, 0))
    for name in reading:
        reader = program.node(name)
        module: Any = program.module_of(reader)
        groups = getattr(module, "groups", 1)
        weight: Tensor = module.weight.detach()
        # [groups, outputs, channels of a group, places]
        parts = weight.double().reshape(groups, len(weight) // groups, weight.shape[1], -1)
        parts = parts / factors.to(weight.device).reshape(groups, 1, -1, 1)
        edit.set_tensor(program, reader, "weight", parts.reshape(weight.shape).to(weight.dtype))


def _scaled(tensor: Tensor, factors: Tensor, axis: int) -> Tensor:
    sizes = [1] * tensor.ndim
    sizes[axis] = -1
    return (tensor.detach().double() * factors.to(tensor.device).reshape(sizes)).to(tensor.dtype)


def _best(
    program: Program, item: ScalableChannels, seen: Mapping[str, Magnitudes], *, per_channel: bool
) -> tuple[Tensor, float]:
    """The best factors, and the noise with them over that without."""
    largest = torch.stack([seen[value].largest for value in item.values]).amax(0)
    square = torch.stack([seen[value].square for value in item.values]).mean(0)
    weights = [_by_group(program, name) for name in item.readers]
    # of each channel, the largest weight that reads it
    across = torch.stack([weight.abs().amax((1, 2)).reshape(-1) for weight in weights]).amax(0)
    front = cast("Any", program.module_of(program.node(item.giver))).weight.detach().double().cpu()
    front = front.reshape(len(front), -1)
    used = (largest > 0) & (across > 0)
    ones = torch.ones_like(largest)
    if not bool(used.any()):
        return ones, 1.0

    def noise(factors: Tensor) -> float:
        step = float((factors * largest).max()) / _STEPS
        power = square * factors.square()
        total = 0.0
        for weight in weights:
            groups = len(weight)
            scaled = weight / factors.reshape(groups, 1, 1, -1)
            total += step**2 * float(scaled.square().sum())
            # a weight of zero is met exactly
            read = ((weight != 0) * power.reshape(groups, 1, 1, -1)).sum((2, 3))
            steps = scaled.abs().amax((2, 3)) if per_channel else scaled.abs().max()
            total += float(((steps / _WEIGHT_STEPS).square() * read).sum())
            if not per_channel and front.shape[1] > 1:
                # the weights in front share a scale too, and what that costs reaches the value
                rows = front * factors.unsqueeze(1)
                share = (rows.abs().max() / _WEIGHT_STEPS).square() / rows.square().mean(1).clamp(min=1e-30)
                total += float((scaled.square().sum((1, 2)).reshape(-1) * power * share).sum())
        return total

    whole = noise(ones)
    tries = []
    for strength in _STRENGTHS:
        factors = torch.where(used, across ** (1 - strength) / largest**strength, 1.0)
        factors = factors / factors[used].log().mean().exp()
        factors = torch.where(used, factors.clamp(1 / _MOST, _MOST), 1.0)
        tries.append((noise(factors) / whole, factors))
    least, best = min(tries, key=lambda tried: tried[0])
    return best, least


def _by_group(program: Program, name: str) -> Tensor:
    """The weight of a layer, [groups, outputs / groups, places, channels / groups], float64."""
    layer: Any = program.module_of(program.node(name))
    weight: Tensor = layer.weight.detach().double().cpu()
    groups = getattr(layer, "groups", 1)
    return weight.reshape(groups, len(weight) // groups, weight.shape[1], -1).transpose(2, 3)
