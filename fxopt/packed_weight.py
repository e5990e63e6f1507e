"""A weight held as integers of 8 or 4 bits, of which blocks share a scale: fewer bytes, computed with as float32.

    W[o, d] = scale[d // block, o] q[d, o],      d over all axes of the weight but the first

Integers are laid out with the outputs last, as engines multiply. Two integers of 4 bits make a byte, the first in the
low half, as ONNX packs them (arXiv:2210.17323 holds weights in blocks so).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

__all__ = ["PackedWeight"]


class PackedWeight(nn.Module):
    """Gives a weight that it holds as integers.

    Attributes:
        codes: the integers: int8[places, outputs], or of 4 bits uint8[places * outputs / 2], rounded up.
        scale: float32[blocks, outputs].
        shape: of the weight.
        bits: of an integer, 8 or 4.
        block: how many places of an output share a scale; the last block may be shorter.
    """

    codes: Tensor
    scale: Tensor

    def __init__(self, codes: Tensor, scale: Tensor, bits: int, block: int | None = None) -> None:
        """Packs integers.

        Args:
            codes: int8, in the shape of the weight, outputs on axis 0.
            scale: float32[outputs], or [outputs, blocks].
            bits: of an integer, 8 or 4.
            block: how many places share a scale; None: all of an output.
        """
        super().__init__()
        self.shape, self.bits = tuple(codes.shape), bits
        self.block = min(block or self.places, self.places)
        laid_out = codes.reshape(len(codes), -1).t().contiguous()
        self.register_buffer("codes", laid_out if bits == 8 else _packed(laid_out))
        self.register_buffer("scale", scale.reshape(len(codes), -1).t().contiguous())

    @property
    def places(self) -> int:
        """How many weights an output has."""
        return math.prod(self.shape[1:])

    @property
    def held(self) -> Mapping[str, int]:
        """How many numbers of the model a buffer stands for."""
        return {"codes": math.prod(self.shape)}

    def forward(self) -> Tensor:
        """The weight, float32."""
        count = self.places * self.shape[0]
        codes = self.codes if self.bits == 8 else _unpacked(self.codes, count).reshape(self.places, self.shape[0])
        scale = self.scale.repeat_interleave(self.block, 0)[: self.places]
        return (codes * scale).t().reshape(self.shape)

    def extra_repr(self) -> str:
        """What the text of a program shows."""
        blocks = f", block={self.block}" if self.block < self.places else ""
        return f"{list(self.shape)}, bits={self.bits}{blocks}"


def _packed(codes: Tensor) -> Tensor:
    flat = nn.functional.pad(codes.reshape(-1), (0, codes.numel() % 2)).to(torch.uint8) & 15
    return flat[0::2] | flat[1::2] << 4


def _unpacked(packed: Tensor, count: int) -> Tensor:
    """The integers, int8[count]."""
    halves = torch.stack([packed & 15, packed >> 4], 1).reshape(-1)[:count]
    return (halves.to(torch.int8) + 8) % 16 - 8
