"""Which integers the kernels of an engine multiply fast, and right."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from fxopt.target import Target

__all__ = ["INT8", "INT32", "UINT8", "IntegerType", "Pairs", "Scheme"]

Pairs = Literal["across_places", "within_places", "either"]
"""Whether the last of an odd number of channels is added up with the first one at the next place; "either"
where engines differ, and weights have to fit them all."""


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
        pairs: which two products are added up in 16 bits, which not all weights fit: see `fxopt/integer_limits.py`.
            None: sums have 32 bits.
        integer_biases: whether a kernel takes a bias as 32-bit integers; else biases stay floating numbers.
    """

    activations: IntegerType
    weights: IntegerType
    pairs: Pairs | None
    integer_biases: bool = True

    @property
    def weight_bits(self) -> int:
        """Of weights that fit, whatever they are."""
        return 8 if self.pairs is None else 7

    def adding(self, pairs: Pairs) -> Scheme:
        """The same with other pairs, if there are any."""
        return self if self.pairs is None else self._replace(pairs=pairs)

    @classmethod
    def of(cls, target: Target) -> Scheme:
        """What suits the kernels that most engines have for a target.

        On a CPU an unsigned activation times a signed weight; without VNNI (AVX2) two products are added up in 16 bits.
        On a GPU both are signed.
        """
        if target.device != "cpu":
            return cls(INT8, INT8, None)
        return cls(UINT8, INT8, None if target.adds_products_in_32_bits else "across_places")
