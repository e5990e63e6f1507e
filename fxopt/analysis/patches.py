"""What a layer multiplies by its weight: the patches of its input, as rows of a matrix.

A convolution is a linear map of patches, each the input under its kernel at one position: C / groups channels times the
places of the kernel. A linear layer is the same with one place. With the patches as rows u of length D,

    y = u W + b,     u [groups, rows, D],     W [groups, D, outputs / groups].

This turns questions about weights into linear algebra, whatever the stride, the dilation or the padding.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["PatchLayer", "padding_along"]


class PatchLayer:
    """A linear layer or a convolution, 1-D to 3-D, as a linear map of patches.

    Args:
        layer: of which the weight and the sizes are read.

    Attributes:
        groups: of the convolution; 1 for a linear layer.
        length: of a patch, D.
        window: places of the kernel, 1 for a linear layer; a patch holds as many values of each channel.
    """

    def __init__(self, layer: nn.Module) -> None:
        self._is_linear = isinstance(layer, nn.Linear)
        self._layer = cast("Any", layer)
        self.groups = 1 if self._is_linear else int(self._layer.groups)
        self.length = int(self._layer.weight[0].numel())
        self.window = 1 if self._is_linear else math.prod(self._layer.kernel_size)

    @property
    def is_depthwise(self) -> bool:
        """Whether each channel is convolved by itself, and gives one."""
        return not self._is_linear and self.groups == self._layer.in_channels == self._layer.out_channels

    @property
    def weight(self) -> Tensor:
        """The weight in float64, [groups, D, outputs / groups]."""
        return self.as_matrix(self._layer.weight.detach())

    def as_matrix(self, weight: Tensor) -> Tensor:
        """What has the weight's shape in the layout of `weight`, float64."""
        return weight.double().reshape(self.groups, -1, self.length).transpose(1, 2)

    @property
    def bias(self) -> Tensor | float:
        """The bias in float64, [outputs]; 0 without one."""
        return 0.0 if self._layer.bias is None else self._layer.bias.detach().double()

    def as_weight(self, matrix: Tensor) -> Tensor:
        """The layer's weight for such a matrix, in its own shape and data type."""
        old: Tensor = self._layer.weight
        return matrix.transpose(1, 2).reshape(old.shape).to(old.dtype).contiguous()

    def with_samples(self, value: Tensor) -> Tensor:
        """What it reads or gives, with an axis of samples in front if it has none."""
        axes = 2 if self._is_linear else len(self._layer.kernel_size) + 2
        return value if value.dim() >= axes else value.unsqueeze(0)

    def positions(self, output: Tensor) -> int:
        """How many patches a sample has, from the shape of what the layer gives for some samples."""
        sizes = output.shape[1:-1] if self._is_linear else output.shape[2:]
        return math.prod(sizes)

    def rows(self, output: Tensor, picks: Tensor) -> Tensor:
        """What it gives at some positions, [groups, samples * picks, outputs / groups].

        Args:
            output: what it gives, samples on axis 0.
            picks: numbers of positions, in the order of their axes.
        """
        axis = -1 if self._is_linear else 1
        channels = output.movedim(axis, -1)
        found = channels.reshape(len(output), -1, channels.shape[-1])[:, picks]
        return self._grouped(found.reshape(-1, found.shape[-1]))

    def patches(self, value: Tensor, output: Tensor, picks: Tensor) -> Tensor:
        """The patches at some positions, [groups, samples * picks, D].

        Args:
            value: what the layer reads, samples on axis 0.
            output: what it gives, for its shape.
            picks: numbers of positions, in the order of their axes.
        """
        if self._is_linear:
            return self.rows(value, picks)
        layer = self._layer
        dims = len(layer.kernel_size)
        padded = self._padded(value)
        if self.window == 1:
            # several times as fast as what follows
            strided: tuple[Any, ...] = (..., *(slice(None, None, stride) for stride in layer.stride))
            rows = padded[strided].flatten(2).transpose(1, 2)[:, picks]
            return self._grouped(rows.reshape(-1, rows.shape[-1]))
        found: list[Tensor] = []
        for axis, corner in enumerate(torch.unravel_index(picks, output.shape[2:])):
            steps = torch.arange(layer.kernel_size[axis], device=picks.device) * layer.dilation[axis]
            places = corner.unsqueeze(1) * layer.stride[axis] + steps  # [picks, places along this axis]
            shape = [1] * (dims + 1)
            shape[0], shape[axis + 1] = places.shape
            found.append(places.reshape(shape))
        index: tuple[Any, ...] = (slice(None), slice(None), *found)
        gathered = padded[index]  # [samples, C, picks, *kernel]
        return self._grouped(gathered.movedim(1, 2).reshape(len(value) * len(picks), -1))

    def _grouped(self, rows: Tensor) -> Tensor:
        """[rows, groups * n] to [groups, rows, n]."""
        return rows.reshape(len(rows), self.groups, -1).transpose(0, 1)

    def _padded(self, value: Tensor) -> Tensor:
        layer = self._layer
        # of the last axis first
        pads = [pad for axis in reversed(range(len(layer.kernel_size))) for pad in padding_along(layer, axis)]
        if layer.padding_mode == "zeros":
            return F.pad(value, pads)
        return F.pad(value, pads, mode=layer.padding_mode)


def padding_along(layer: Any, axis: int) -> tuple[int, int]:
    """How many positions a convolution pads along a spatial axis, in front and behind."""
    if layer.padding == "same":
        whole = layer.dilation[axis] * (layer.kernel_size[axis] - 1)
        return whole // 2, whole - whole // 2
    pad = 0 if isinstance(layer.padding, str) else int(layer.padding[axis])
    return pad, pad
