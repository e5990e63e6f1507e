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


_FEWEST_TERMS = 32
"""Of the sums of a convolution, in ONNX Runtime on AVX2 (1.32, networks of one image): with the 27 of the first layer
as integers MobileNetV3-Small takes 1.12 times as long and ShuffleNetV2 1.08 times, EfficientNet-Lite0 1.01 times; with
the 147 of a ResNet-18 0.97 times."""

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
        products: whether two activations are multiplied sooner as integers, with what it takes to quantize both.
        fewest_terms: a convolution that adds up fewer products for a number is no sooner done with integers: as a rule
            the first one, which reads the three colours of 3 x 3 pixels. Depthwise ones have kernels of their own.
    """

    activations: IntegerType
    weights: IntegerType
    pairs: Pairs | None
    integer_biases: bool = True
    products: bool = True
    fewest_terms: int = 0

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

        On a CPU an unsigned activation times a signed weight; without VNNI (AVX2) two products are added up in 16 bits,
        and small convolutions and products of activations gain nothing. On a GPU both are signed.
        """
        if target.device != "cpu":
            return cls(INT8, INT8, None)
        if target.adds_products_in_32_bits:
            return cls(UINT8, INT8, None)
        return cls(UINT8, INT8, "across_places", products=False, fewest_terms=_FEWEST_TERMS)
