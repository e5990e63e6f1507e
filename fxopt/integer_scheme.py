"""Which integers the kernels of an engine multiply fast, and right."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fxopt.target import Target

__all__ = ["INT8", "INT32", "UINT8", "IntegerType", "Scheme"]


class IntegerType(NamedTuple):
    """Integers from `low` to `high`, held in a data type.

    Attributes:
        dtype: that holds them.
        low, high: the smallest and the largest.
    """

    dtype: torch.dtype
    low: int
    high: int

    @property
    def name(self) -> str:
        """Of the data type: "uint8"."""
        return str(self.dtype).removeprefix("torch.")


UINT8 = IntegerType(torch.uint8, 0, 255)
INT8 = IntegerType(torch.int8, -128, 127)
INT32 = IntegerType(torch.int32, -(2**31), 2**31 - 1)


class Scheme(NamedTuple):
    """Which integers the kernels of an engine multiply.

    Attributes:
        activations: what layers read and give; affine if unsigned, symmetric if signed.
        weights: symmetric.
        adds_pairs: whether sums of two products are kept in 16 bits, which not all weights fit: see
            `fxopt/integer_limits.py`.
        integer_biases: whether a kernel takes a bias as 32-bit integers; else biases stay floating numbers.
    """

    activations: IntegerType
    weights: IntegerType
    adds_pairs: bool
    integer_biases: bool = True

    @property
    def weight_bits(self) -> int:
        """Of weights that fit, whatever they are."""
        return 7 if self.adds_pairs else 8

    @classmethod
    def of(cls, target: Target) -> Scheme:
        """What suits the kernels that most engines have for a target.

        On a CPU an unsigned activation times a signed weight; without VNNI (AVX2) two products are added up in 16 bits.
        On a GPU both are signed.
        """
        if target.device != "cpu":
            return cls(INT8, INT8, adds_pairs=False)
        return cls(UINT8, INT8, adds_pairs=not target.adds_products_in_32_bits)
