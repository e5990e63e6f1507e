"""Affine quantization: a real number x stands as an integer q, with x about scale (q - zero_point) (arXiv:1712.05877).

Zero is always met exactly: it is what convolutions pad with. Which integers a machine multiplies is said by
`fxopt/integer_scheme.py`.

The operators are those of `torch.ops.quantized_decomposed`, which torch's exporters and compilers know.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.ao.quantization.fx._decomposed  # registers the operators
from torch import Tensor, nn

from fxopt.integer_scheme import INT8, INT32, UINT8, IntegerType

__all__ = ["Affine", "QuantizedTensor", "dequantize", "quantize"]

quantize: Any = torch.ops.quantized_decomposed.quantize_per_tensor.default
dequantize: Any = torch.ops.quantized_decomposed.dequantize_per_tensor.default


class Affine(NamedTuple):
    """How integers stand for real numbers: x = scale (q - zero_point).

    Attributes:
        type: of the integers.
        scale: positive.
        zero_point: the integer that stands for zero.
    """

    type: IntegerType
    scale: float
    zero_point: int

    @classmethod
    def over(cls, type: IntegerType, low: float, high: float) -> Affine:  # noqa: A002 (the field's name)
        """The map of a range, extended to hold zero, onto all integers of a type; a signed type is symmetric."""
        low, high = min(low, 0.0), max(high, 0.0)
        if type.low < 0:
            return cls(type, _scale(max(-low, high) / type.high), 0)
        scale = _scale((high - low) / (type.high - type.low))
        return cls(type, scale, min(max(round(type.low - low / scale), type.low), type.high))

    @property
    def range(self) -> tuple[float, float]:
        """The real numbers that the smallest and the largest integer stand for."""
        return self.scale * (self.type.low - self.zero_point), self.scale * (self.type.high - self.zero_point)

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Of `quantize` and `dequantize`, behind the tensor."""
        return (self.scale, self.zero_point, self.type.low, self.type.high, self.type.dtype)

    def rounded(self, values: Tensor) -> Tensor:
        """The numbers that values are taken for."""
        codes = (values / self.scale).round() + self.zero_point
        return (codes.clamp(self.type.low, self.type.high) - self.zero_point) * self.scale

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, read by `from_json`."""
        return {"type": self.type.name, "scale": self.scale, "zero_point": self.zero_point}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Affine:
        """Reads what `to_json` wrote."""
        (found,) = (item for item in (UINT8, INT8, INT32) if item.name == data["type"])
        return cls(found, data["scale"], data["zero_point"])


class QuantizedTensor(nn.Module):
    """Gives a tensor that it holds as integers, with a scale for each index of axis 0.

    Attributes:
        codes: the integers.
        scale: float32, one for each index of axis 0.
        zero_point: zeros, as torch's operator takes them.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", torch.zeros_like(scale, dtype=torch.int64), persistent=False)

    @property
    def held(self) -> Mapping[str, int]:
        """How many numbers of the model a buffer stands for."""
        return {"codes": self.codes.numel()}

    def forward(self) -> Tensor:
        """The tensor, float32."""
        limits = torch.iinfo(self.codes.dtype)
        found: Tensor = torch.ops.quantized_decomposed.dequantize_per_channel(
            self.codes, self.scale, self.zero_point, 0, limits.min, limits.max, self.codes.dtype
        )
        return found

    def extra_repr(self) -> str:
        """What the text of a program shows."""
        return f"{str(self.codes.dtype).removeprefix('torch.')}{list(self.codes.shape)}"


def _scale(value: float) -> float:
    """As float32 holds it, which is what engines compute with; that of numbers up to 1 where there are only zeros."""
    rounded = float(torch.tensor(value, dtype=torch.float32))
    # engines count a bias in steps of it times the weight's: it must not be large
    return rounded if rounded > torch.finfo(torch.float32).tiny else 2.0**-8
