"""A linear layer of integers: the weight's are fixed, those of what it reads are found as it runs.

    y = s s_w Σ (q - z) w + b,      s and z from the smallest and the largest number of each call

See `fxopt/integer_operators.py`, which says which integers.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from fxopt.integer_operators import DYNAMIC_LINEAR

__all__ = ["DynamicLinear"]


class DynamicLinear(nn.Module):
    """Computes with integers.

    Attributes:
        codes: of the weight, int8[inputs, outputs], as engines multiply.
        scale: float32[outputs].
        bias: float32[outputs], or None.
    """

    codes: Tensor
    scale: Tensor
    bias: nn.Parameter | None

    def __init__(self, codes: Tensor, scale: Tensor, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_parameter("bias", bias)

    @property
    def held(self) -> Mapping[str, int]:
        """How many numbers of the model a buffer stands for."""
        return {"codes": self.codes.numel()}

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the name that torch gives it)
        """What the layer gives, float32[..., outputs]."""
        found: Tensor = DYNAMIC_LINEAR(input, self.codes, self.scale, self.bias)
        return found

    def macs(self, rows: int) -> int:
        """How many products it adds up for some rows."""
        return rows * self.codes.numel()

    def extra_repr(self) -> str:
        """What the text of a program shows."""
        inputs, outputs = self.codes.shape
        return f"{inputs}, {outputs}, int8" + ("" if self.bias is not None else ", bias=False")
