"""The algebra of convolution kernels: when several convolutions of one input are one convolution, and its weight.

A kernel of size k with dilation d behind p zeros reads the positions s o - p + d j of its input, j = 0 .. k-1, for the
output o. Convolutions of one stride s are summed by one whose positions include those of all: as many zeros in front as
any of them needs, as many behind, and as dilation the greatest common divisor of all distances. Each weight is embedded
in a kernel of zeros. Output sizes agree for every input size if front + back - d (k - 1) does.

A linear layer is a convolution without spatial axes; the identity and a scale per channel are depthwise ones of size 1.

What a weight connects is the same for all of these layers, however they lay it out: `[groups, outputs / groups, inputs
/ groups, places of the kernel]` (`connections`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd, prod
from typing import Any, cast

import torch
from torch import Tensor, nn

from fxopt.analysis.patches import padding_along

__all__ = [
    "Convolution",
    "Geometry",
    "connections",
    "embed",
    "geometry_of",
    "identity_geometry",
    "identity_weight",
    "join",
    "laid_out",
    "make_module",
]

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear


@dataclass(frozen=True)
class Geometry:
    """What a convolution connects, weights aside. The tuples have one entry per spatial axis.

    Attributes:
        inputs: input channels.
        outputs: output channels.
        groups: groups of channels that do not mix.
        size: of the kernel.
        stride: between outputs, in input positions.
        dilation: between weights, in input positions; 1 where the size is 1.
        front: zeros in front of the input.
        back: zeros behind it.
        macs: multiply-accumulates per output position; 0 for the identity, which nobody computes.
    """

    inputs: int
    outputs: int
    groups: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    front: tuple[int, ...]
    back: tuple[int, ...]
    macs: int

    @property
    def surplus(self) -> tuple[int, ...]:
        """How much larger outputs are than inputs, at stride 1."""
        axes = zip(self.front, self.back, self.dilation, self.size, strict=True)
        return tuple(front + back - dilation * (size - 1) for front, back, dilation, size in axes)

    @property
    def padding(self) -> tuple[int, ...] | str:
        """The `padding` argument that gives these zeros: only "same" gives one more behind than in front."""
        return self.front if self.front == self.back else "same"

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.size))} convolution" if self.size else "linear layer"


def geometry_of(module: Convolution) -> Geometry | str:
    """The geometry of a module, or why it has none: it pads with something other than zeros."""
    if isinstance(module, nn.Linear):
        shape = module.in_features, module.out_features
        return Geometry(*shape, 1, (), (), (), (), (), macs=shape[0] * shape[1])
    size = tuple(module.kernel_size)
    dilation = tuple(step if width > 1 else 1 for step, width in zip(module.dilation, size, strict=True))
    front, back = zip(*(padding_along(module, axis) for axis in range(len(size))), strict=True)
    if module.padding_mode != "zeros" and any((*front, *back)):
        return f"pads with {module.padding_mode!r}, not with zeros"
    return Geometry(
        module.in_channels,
        module.out_channels,
        module.groups,
        size,
        tuple(module.stride),
        dilation,
        front,
        back,
        macs=module.out_channels * module.in_channels // module.groups * prod(size),
    )


def identity_geometry(channels: int, axes: int) -> Geometry:
    """That of the identity over so many spatial axes."""
    ones, zeros = (1,) * axes, (0,) * axes
    return Geometry(channels, channels, channels, ones, ones, ones, zeros, zeros, macs=0)


def identity_weight(channels: int, axes: int) -> Tensor:
    """The depthwise weight of the identity, in float64."""
    return torch.ones((channels, 1, *(1,) * axes), dtype=torch.float64)


def join(parts: Sequence[Geometry]) -> Geometry | str:
    """The smallest geometry that holds all `parts`, or why none does.

    Args:
        parts: geometries with the same number of output channels.
    """
    first = parts[0]
    if any(len(part.size) != len(first.size) for part in parts):
        return "a convolution and a linear layer work on different axes"
    if any(part.inputs != first.inputs or part.outputs != first.outputs for part in parts):
        return "their numbers of channels differ"
    if any(part.stride != first.stride for part in parts):
        return f"strides differ: {_distinct([part.stride for part in parts])}"
    if any(part.surplus != first.surplus for part in parts):
        surplus = _distinct([part.surplus for part in parts])
        return f"paddings do not line up: at stride 1 the outputs would be larger than the input by {surplus}"
    front, back = _largest([part.front for part in parts]), _largest([part.back for part in parts])
    groups = gcd(*(part.groups for part in parts))
    dilation = tuple(_step(parts, axis, front[axis]) for axis in range(len(front)))
    spans = zip(front, back, first.surplus, dilation, strict=True)
    size = tuple((before + behind - surplus) // step + 1 for before, behind, surplus, step in spans)
    macs = first.outputs * first.inputs // groups * prod(size)
    return Geometry(first.inputs, first.outputs, groups, size, first.stride, dilation, front, back, macs)


def embed(weight: Tensor, part: Geometry, whole: Geometry) -> Tensor:
    """The weight of `part` as one of `whole`, which `join` gave: zeros where `part` does not look.

    Args:
        weight: `[outputs, inputs / part.groups, *part.size]`.
        part: its geometry.
        whole: a geometry that holds it.

    Returns:
        `[outputs, inputs / whole.groups, *whole.size]`.
    """
    ratio = part.groups // whole.groups
    if ratio > 1:
        rows = weight.reshape(whole.groups, ratio, whole.outputs // part.groups, 1, *weight.shape[1:])
        same = torch.eye(ratio, dtype=weight.dtype, device=weight.device)
        weight = (rows * same.reshape(1, ratio, 1, ratio, 1, *(1,) * len(part.size))).flatten(3, 4).flatten(0, 2)
    padded = weight.new_zeros((whole.outputs, whole.inputs // whole.groups, *whole.size))
    window = [slice(None), slice(None)]
    for axis, size in enumerate(part.size):
        step = part.dilation[axis] // whole.dilation[axis] if size > 1 else 1
        start = (whole.front[axis] - part.front[axis]) // whole.dilation[axis]
        window.append(slice(start, start + (size - 1) * step + 1, step))
    padded[tuple(window)] = weight
    return padded


def make_module(geometry: Geometry, weight: nn.Parameter, bias: nn.Parameter | None) -> Convolution:
    """The module of this geometry."""
    module: Convolution
    if not geometry.size:
        module = nn.Linear(geometry.inputs, geometry.outputs, bias=bias is not None, device="meta")
    else:
        # one call for three classes that want tuples of their own lengths
        convolution: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(geometry.size) - 1]
        module = convolution(
            geometry.inputs,
            geometry.outputs,
            geometry.size,
            stride=geometry.stride,
            padding=geometry.padding,
            dilation=geometry.dilation,
            groups=geometry.groups,
            bias=bias is not None,
            device="meta",
        )
    module.weight = weight
    module.bias = bias
    return module


def connections(module: nn.Module, weight: Tensor) -> Tensor:
    """A layer's weight as `[groups, outputs / groups, inputs / groups, places of the kernel]`.

    Args:
        module: a convolution, transposed convolution or linear layer.
        weight: its weight, or another tensor of that shape.
    """
    groups: Any = getattr(module, "groups", 1)
    grouped = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    return grouped.transpose(1, 2) if isinstance(module, nn.modules.conv._ConvTransposeNd) else grouped


def laid_out(module: nn.Module, connected: Tensor) -> Tensor:
    """The reverse of `connections`: a tensor of the shape of the module's weight."""
    weight = cast("Tensor", module.weight)
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        connected = connected.transpose(1, 2)
    return connected.reshape(weight.shape)


def _step(parts: Sequence[Geometry], axis: int, front: int) -> int:
    """The largest dilation that meets every position that a part reads, from `front` before the first output on."""
    shifts = [front - part.front[axis] for part in parts]
    dilations = [part.dilation[axis] for part in parts if part.size[axis] > 1]
    return gcd(*shifts, *dilations) or 1


def _largest(tuples: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(max(values) for values in zip(*tuples, strict=True))


def _distinct(values: Sequence[tuple[int, ...]]) -> str:
    return " and ".join(str(value) for value in dict.fromkeys(values))
