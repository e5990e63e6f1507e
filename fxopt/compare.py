"""How far two sets of outputs are apart, and how far rounding alone may drive them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from fxopt.analysis.shapes import TensorSpec

__all__ = ["Difference", "compare", "compare_each", "incomparable", "rounding_tolerance", "worst"]

_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}


class Difference(NamedTuple):
    """The distance of outputs from their reference; the worst over all outputs.

    Attributes:
        max_abs: largest absolute difference.
        relative: largest absolute difference of an output over the largest magnitude of its reference; for whole
            numbers and flags the share of those that differ.
        sqnr_db: signal to quantization noise ratio, 10 log10(sum r^2 / sum (r - o)^2), in decibel.
        cosine: cosine similarity.
        mismatch: what cannot be compared at all (shape, dtype, NaN where there was none); "" if nothing.
    """

    max_abs: float
    relative: float
    sqnr_db: float
    cosine: float
    mismatch: str = ""

    def within(self, tolerance: float) -> bool:
        """Whether the outputs are the same up to this relative tolerance."""
        return not self.mismatch and self.relative <= tolerance

    def __str__(self) -> str:
        return (
            self.mismatch or f"relative error {self.relative:.2g} (max abs {self.max_abs:.2g}, {self.sqnr_db:.0f} dB)"
        )


def compare(reference: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> Difference:
    """The difference of `outputs` from `reference`, the worst of all tensors, computed in float64.

    Positions where the reference is not finite must hold the same value in the output.
    """
    return worst(compare_each(reference, outputs))


def compare_each(reference: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> list[Difference]:
    """As `compare`, for each tensor of the reference."""
    if len(reference) != len(outputs):
        return [incomparable(f"{len(outputs)} outputs instead of {len(reference)}")] * max(1, len(reference))
    pairs = enumerate(zip(reference, outputs, strict=True))
    return [_compare(expected, actual, index) for index, (expected, actual) in pairs]


def worst(differences: Iterable[Difference]) -> Difference:
    """The worst of several differences, measure by measure."""
    found = list(differences)
    if not found:
        return Difference(0.0, 0.0, math.inf, 1.0)
    return Difference(
        max(item.max_abs for item in found),
        max(item.relative for item in found),
        min(item.sqnr_db for item in found),
        min(item.cosine for item in found),
        next((item.mismatch for item in found if item.mismatch), ""),
    )


def rounding_tolerance(tensors: Iterable[torch.Tensor | TensorSpec]) -> float:
    """The relative error that rounding may cause in a deep model whose tensors have these dtypes."""
    return max((_TOLERANCES[item.dtype] for item in tensors if item.dtype in _TOLERANCES), default=1e-4)


def _compare(expected: torch.Tensor, actual: torch.Tensor, index: int) -> Difference:
    if expected.shape != actual.shape:
        return incomparable(f"output {index} has shape {tuple(actual.shape)} instead of {tuple(expected.shape)}")
    if expected.dtype != actual.dtype:
        return incomparable(f"output {index} is {actual.dtype} instead of {expected.dtype}")
    wide = torch.complex128 if expected.is_complex() else torch.float64
    left, right = expected.detach().cpu().to(wide), actual.detach().cpu().to(wide)
    if not (expected.is_floating_point() or expected.is_complex()):
        return _compare_exactly(left, right)
    finite = torch.isfinite(left)
    odd_left, odd_right = left[~finite], right[~finite]
    if not torch.equal(torch.nan_to_num(odd_left, nan=0.5), torch.nan_to_num(odd_right, nan=0.5)):
        return incomparable(f"output {index} differs where the reference is not finite")
    if not torch.isfinite(right[finite]).all():
        return incomparable(f"output {index} is not finite where the reference is")
    left, right = left[finite], right[finite]
    if not left.numel():
        return Difference(0.0, 0.0, math.inf, 1.0)
    error = (left - right).abs()
    max_abs, scale = float(error.max()), float(left.abs().max())
    noise, signal = float(error.square().sum()), float(left.abs().square().sum())
    norms = float(left.norm() * right.norm())
    return Difference(
        max_abs,
        max_abs / scale if scale else (0.0 if max_abs == 0 else math.inf),
        math.inf if noise == 0 else (10 * math.log10(signal / noise) if signal else -math.inf),
        float((left * right.conj()).sum().real) / norms if norms else 1.0,
    )


def _compare_exactly(left: torch.Tensor, right: torch.Tensor) -> Difference:
    """Numbers that are not rounded (indices, classes, flags): relative is the share of those that differ."""
    wrong = left != right
    share = float(wrong.double().mean()) if left.numel() else 0.0
    max_abs = float((left - right).abs().max()) if left.numel() else 0.0
    return Difference(max_abs, share, -math.inf if share else math.inf, 1.0 - share)


def incomparable(why: str) -> Difference:
    """The difference of outputs that cannot be compared at all."""
    return Difference(math.inf, math.inf, -math.inf, -1.0, why)
