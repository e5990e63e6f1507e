"""Building blocks of efficient convolutional networks, for people who design models.

`DepthwiseSeparableConv2d` writes a k x k convolution as a depthwise and a pointwise one (MobileNets, arXiv:1704.04861).
`InvertedResidual` is the block of MobileNetV2 (arXiv:1801.04381): from few channels to many by 1 x 1, a depthwise
convolution there, back to few by 1 x 1, and the input added where it has the output's shape.

Both are ordinary modules that train, and that passes see through: their layers are plain layers of torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

from torch import Tensor
from torch.nn import BatchNorm2d, Conv2d, Module, ReLU6

__all__ = ["DepthwiseSeparableConv2d", "InvertedResidual"]

Order = Literal["depthwise_first", "pointwise_first"]
Pair = int | tuple[int, int]


class DepthwiseSeparableConv2d(Module):
    """A depthwise and a pointwise convolution in the place of a dense one: k² + out instead of k² out MACs per input.

    Between the two are `multiplier` channels for each input channel (`"depthwise_first"`), or for each output channel
    (`"pointwise_first"`, where each output is the sum over its own). With a multiplier of k² any dense convolution can
    be written so (Network Decoupling, arXiv:1808.05517).

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: of the depthwise convolution, as its stride, padding, dilation and padding mode.
        stride: as for `nn.Conv2d`.
        padding: as for `nn.Conv2d`: a number, one per axis, "same" or "valid".
        dilation: as for `nn.Conv2d`.
        multiplier: channels in between, per input or output channel.
        order: which of the two is first.
        norm: makes a norm between the two from its number of channels: `nn.BatchNorm2d`.
        activation: makes an activation between the two: `nn.ReLU`.
        bias: whether the second convolution has a bias. The first has one only if an activation and no norm follows.
        padding_mode: as for `nn.Conv2d`.

    Shape:
        [N, in_channels, H, W] to [N, out_channels, H', W'], with H' and W' as for the dense convolution.

    Raises:
        ValueError: if a number or a name is none that makes sense.

    >>> import torch
    >>> from torch import nn
    >>> layer = fxopt.nn.DepthwiseSeparableConv2d(16, 32, 3, padding=1, norm=nn.BatchNorm2d, activation=nn.ReLU)
    >>> layer(torch.randn(2, 16, 8, 8)).shape
    torch.Size([2, 32, 8, 8])
    >>> sum(item.numel() for item in layer.parameters()), nn.Conv2d(16, 32, 3).weight.numel()
    (720, 4608)
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Pair | str = 0,
        dilation: Pair = 1,
        *,
        multiplier: int = 1,
        order: Order = "depthwise_first",
        norm: Callable[[int], Module] | None = None,
        activation: Callable[[], Module] | None = None,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
    ) -> None:
        super().__init__()
        _check_counts(in_channels=in_channels, out_channels=out_channels, multiplier=multiplier)
        _check_sizes(kernel_size=kernel_size, stride=stride, dilation=dilation)
        if order not in get_args(Order):
            raise ValueError(f"order must be 'depthwise_first' or 'pointwise_first', not {order!r}")
        self.order: Order = order
        self.multiplier = multiplier
        first = order == "depthwise_first"
        middle = multiplier * (in_channels if first else out_channels)
        between = norm is None and activation is not None
        self.depthwise = Conv2d(
            in_channels if first else middle,
            middle if first else out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups=in_channels if first else out_channels,
            bias=between if first else bias,
            padding_mode=padding_mode,
        )
        self.pointwise = Conv2d(
            middle if first else in_channels, out_channels if first else middle, 1, bias=bias if first else between
        )
        self.norm = None if norm is None else norm(middle)
        self.activation = None if activation is None else activation()

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_channels, H, W] to [N, out_channels, H', W']."""
        first, last = self.depthwise, self.pointwise
        if self.order == "pointwise_first":
            first, last = last, first
        x = first(x)
        if self.norm is not None:
            x = self.norm(x)
        if self.activation is not None:
            x = self.activation(x)
        result: Tensor = last(x)
        return result

    def extra_repr(self) -> str:
        return f"order={self.order!r}, multiplier={self.multiplier}"


class InvertedResidual(Module):
    """The block of MobileNetV2: expand by 1 x 1, filter depthwise, project by 1 x 1, add the input.

        h = activation(norm(expand x)),   d = activation(norm(depthwise h)),   y = norm(project d)  (+ x)

    The input is added where it has the output's shape: stride 1, as many channels. The last layer has no activation,
    as its few channels would lose too much by it.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: of the depthwise convolution; odd.
        stride: of the depthwise convolution.
        expansion: hidden channels per input channel, rounded; with 1 there is no expanding layer.
        dilation: of the depthwise convolution.
        activation: makes an activation.
        norm: makes a norm from its number of channels.

    Attributes:
        hidden_channels: of the depthwise convolution.
        skip: whether the input is added.

    Shape:
        [N, in_channels, H, W] to [N, out_channels, ceil(H / stride), ceil(W / stride)].

    Raises:
        ValueError: if a number is none that makes sense.

    >>> import torch
    >>> block = fxopt.nn.InvertedResidual(16, 16, expansion=6)
    >>> block(torch.randn(2, 16, 8, 8)).shape
    torch.Size([2, 16, 8, 8])
    >>> block
    InvertedResidual(
      skip=True
      (expand): Conv2d(16, 96, kernel_size=(1, 1), stride=(1, 1), bias=False)
      ...
    >>> fxopt.nn.InvertedResidual(16, 24, 5, stride=2, expansion=1).expand is None
    True
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair = 3,
        stride: Pair = 1,
        expansion: float = 6,
        *,
        dilation: Pair = 1,
        activation: Callable[[], Module] = ReLU6,
        norm: Callable[[int], Module] = BatchNorm2d,
    ) -> None:
        super().__init__()
        _check_counts(in_channels=in_channels, out_channels=out_channels)
        _check_sizes(kernel_size=kernel_size, stride=stride, dilation=dilation)
        kernel, steps, spread = (_pair(value) for value in (kernel_size, stride, dilation))
        if any(size % 2 == 0 for size in kernel):
            raise ValueError(
                f"kernel_size must be odd, so that the input has a centre to be added at: not {kernel_size!r}"
            )
        number: object = expansion
        if isinstance(number, bool) or not isinstance(number, int | float) or not number > 0:
            raise ValueError(f"expansion must be a number above 0, not {expansion!r}")
        hidden = round(in_channels * expansion)
        if hidden < 1:
            raise ValueError(f"expansion={expansion!r} of {in_channels} channels leaves no hidden channel: give more")
        self.hidden_channels = hidden
        self.skip = steps == (1, 1) and in_channels == out_channels
        expands = expansion != 1
        self.expand = Conv2d(in_channels, hidden, 1, bias=False) if expands else None
        self.expand_norm = norm(hidden) if expands else None
        self.expand_activation = activation() if expands else None
        padding = (spread[0] * (kernel[0] // 2), spread[1] * (kernel[1] // 2))
        self.depthwise = Conv2d(hidden, hidden, kernel, steps, padding, spread, groups=hidden, bias=False)
        self.depthwise_norm = norm(hidden)
        self.depthwise_activation = activation()
        self.project = Conv2d(hidden, out_channels, 1, bias=False)
        self.project_norm = norm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_channels, H, W] to [N, out_channels, H', W']."""
        y = x
        if self.expand is not None and self.expand_norm is not None and self.expand_activation is not None:
            y = self.expand_activation(self.expand_norm(self.expand(y)))
        y = self.depthwise_activation(self.depthwise_norm(self.depthwise(y)))
        y = self.project_norm(self.project(y))
        result: Tensor = x + y if self.skip else y
        return result

    def extra_repr(self) -> str:
        return f"skip={self.skip}"


def _check_counts(**numbers: object) -> None:
    for name, number in numbers.items():
        if type(number) is not int or number < 1:
            raise ValueError(f"{name} must be an integer of at least 1, not {number!r}")


def _check_sizes(**sizes: object) -> None:
    for name, value in sizes.items():
        numbers = value if isinstance(value, tuple) and len(value) == 2 else (value,)
        if not all(type(number) is int and number >= 1 for number in numbers):
            raise ValueError(f"{name} must be an integer of at least 1, or a tuple of two, not {value!r}")


def _pair(value: Pair) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value
