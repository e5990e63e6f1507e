"""Fake quantization: numbers rounded to those that integers stand for, with gradients that pass the rounding.

    y = s clamp(round(x / s), low, high)        s > 0, learned

The gradient of x passes where x is in range (the straight-through estimator). That of the step s is

    dy/ds = round(x / s) - x / s   in range,     low or high   beyond,

scaled by 1 / sqrt(N high) for the N numbers that share it, so that steps and weights learn at like rates (LSQ,
arXiv:1902.08153). Forward, all of it is what a quantize and a dequantize node compute, to the last bit.

`quantize(mode="qat")` puts these modules into a program, which then trains; `freeze_quantization` makes integers of
them. They stay what they are when a trained program is captured again.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fxopt.quantization import Affine, QuantizedTensor

__all__ = ["FakeQuantize", "FakeQuantizedWeight"]

_SMALLEST = 1e-30  # step: what training cannot go below


class FakeQuantize(nn.Module):
    """Rounds a value to what integers stand for. The step learns; which integer stands for zero stays.

    Attributes:
        scale: the step, of one number.
        zero_point: the integer that stands for zero.
        integers: their type.
    """

    def __init__(self, affine: Affine, device: torch.device | None = None) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(affine.scale, dtype=torch.float32, device=device))
        self.zero_point = affine.zero_point
        self.integers = affine.type

    @property
    def affine(self) -> Affine:
        """How integers stand for the value by now."""
        return Affine(self.integers, float(_positive(self.scale.detach())), self.zero_point)

    def forward(self, values: Tensor) -> Tensor:
        """The numbers that values are taken for."""
        low, high = self.integers.low - self.zero_point, self.integers.high - self.zero_point
        features = math.prod(values.shape[1:])
        found: Tensor = _Round.apply(values, _positive(self.scale), low, high, _share(features, max(-low, high)))
        return found

    def extra_repr(self) -> str:
        """What the text of a program shows."""
        return f"{self.integers.name}, zero_point={self.zero_point}"


class FakeQuantizedWeight(nn.Module):
    """Gives a weight rounded to what integers stand for. The weight and its steps learn.

    Attributes:
        weight: in floating point.
        scale: the steps: one for each index of axis 0, or one for all.
        mask: bool, of the weight's shape: False where it is zero and stays zero. None where no weight is pruned.
        bits: of an integer.
    """

    mask: Tensor | None

    def __init__(self, weight: nn.Parameter, scale: Tensor, bits: int, mask: Tensor | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.scale = nn.Parameter(scale, requires_grad=weight.requires_grad)
        self.register_buffer("mask", mask)
        self.bits = bits

    @property
    def limit(self) -> int:
        """The largest integer, and minus the smallest."""
        return int(2 ** (self.bits - 1) - 1)

    def forward(self) -> Tensor:
        """The weight that layers compute with."""
        weight = self.weight if self.mask is None else self.weight * self.mask
        share = _share(weight.numel() // self.scale.numel(), self.limit)
        found: Tensor = _Round.apply(weight, self._steps(), -self.limit, self.limit, share)
        return found

    def frozen(self) -> QuantizedTensor:
        """The same weight, held as integers."""
        with torch.no_grad():
            steps = self._steps()
            codes = (self() / steps).round().to(torch.int8)
            return QuantizedTensor(codes, steps.reshape(-1).expand(len(codes)).float().contiguous())

    def extra_repr(self) -> str:
        """What the text of a program shows."""
        return f"{list(self.weight.shape)}, bits={self.bits}" + ("" if self.mask is None else ", masked")

    def _steps(self) -> Tensor:
        """The steps, for a product with the weight."""
        return _positive(self.scale).reshape(-1, *[1] * (self.weight.ndim - 1))


class _Round(torch.autograd.Function):
    """y = s clamp(round(x / s), low, high)."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, step: Tensor, low: int, high: int, share: float) -> Tensor:
        # by a product, as the quantize operator does
        scaled = values * step.reciprocal()
        codes = scaled.round().clamp_(low, high)
        ctx.save_for_backward(scaled, codes, step)
        ctx.low, ctx.high, ctx.share = low, high, share
        return codes * step

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        (grad,) = grads
        scaled, codes, step = ctx.saved_tensors
        passed = torch.ops.aten.hardtanh_backward(grad, scaled, ctx.low, ctx.high)
        found = None
        if ctx.needs_input_grad[1]:
            found = (grad * codes).addcmul_(passed, scaled, value=-1).sum_to_size(step.shape) * ctx.share
        return passed, found, None, None, None


def _positive(scale: Tensor) -> Tensor:
    return scale.abs().clamp(min=_SMALLEST)


def _share(numbers: int, high: int) -> float:
    """What the gradient of a step counts."""
    return 1 / math.sqrt(max(1, numbers * high))
