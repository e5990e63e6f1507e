"""How the values of a program are spread over the calibration data, and which range of integers suits them.

A histogram per value, gathered in one run: its bins lie symmetrically about zero, so that a wider range takes in the
narrower one by joining neighbouring bins, and nothing is ever spread over bins that it was not in. Ranges from it:

    minmax       all that was seen
    percentile   what is left without 1 / 100,000 of the numbers at either end
    mse          of the ranges inside that, the one whose integers are off by the least, squared (arXiv:1810.05723)
    entropy      the one whose histogram, in as many steps as integers, differs the least from what was seen, by the
                 Kullback-Leibler divergence (Migacz, 8-bit inference with TensorRT, 2017)
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, fx

from fxopt.analysis.measurements import keep, measured
from fxopt.errors import InputError
from fxopt.integer_scheme import IntegerType
from fxopt.progress import progress
from fxopt.quantization import Affine
from fxopt.randomness import fixed_random_state

if TYPE_CHECKING:
    from fxopt.program import Program

__all__ = ["Observer", "Spread", "affine_of", "value_spreads"]

Observer = Literal["minmax", "percentile", "mse", "entropy"]

_BINS = 8192  # a power of two; at least a quarter of them is used
_TAIL = 1e-5  # of the numbers, left out by "percentile" at either end
_TRIES = 64  # ranges that "mse" and "entropy" look at, at either end


class Spread:
    """What was seen of a value.

    Attributes:
        low, high: the smallest and the largest number.
        count: how many numbers.
    """

    def __init__(self) -> None:
        self.low, self.high, self.count = torch.inf, -torch.inf, 0
        self._half = 0.0  # the bins reach from minus to plus this
        self._bins = torch.zeros(_BINS, dtype=torch.float64)

    def add(self, value: Tensor) -> None:
        """Takes in numbers, which must be finite."""
        if not value.numel():
            return
        low, high = (float(each) for each in torch.aminmax(value))
        self.low, self.high, self.count = min(low, self.low), max(high, self.high), self.count + value.numel()
        self._reach(max(-low, high))
        found = torch.histc(value.float(), _BINS, -self._half, self._half) if self._half else None
        if found is not None:
            self._bins += found.double().cpu()

    def bins(self) -> tuple[Tensor, Tensor]:
        """The middles of the bins that are not empty, and the counts in them, float64."""
        if not self._half:
            return torch.zeros(1, dtype=torch.float64), torch.tensor([float(max(self.count, 1))], dtype=torch.float64)
        width = 2 * self._half / _BINS
        middles = (torch.arange(_BINS, dtype=torch.float64) + 0.5) * width - self._half
        kept = self._bins > 0
        return middles[kept].clamp(self.low, self.high), self._bins[kept]

    def _reach(self, most: float) -> None:
        if self._half == 0 and most > 0:
            self._half = most
        while self._half < most:
            joined = self._bins.reshape(-1, 2).sum(1)
            self._bins = torch.nn.functional.pad(joined, (_BINS // 4, _BINS // 4))
            self._half *= 2


def value_spreads(program: Program, values: Collection[str]) -> Mapping[str, Spread]:
    """What the values of at least these nodes are over the calibration data, in one run for all not known yet.

    Raises:
        InputError: if there are no calibration data, they do not fit the model, or a value is not finite on them.
    """
    known = measured(program, _gathered)
    missing = {name: Spread() for name in values if name not in known}
    if missing:

        def watch(node: fx.Node, value: Any) -> None:
            if node.name in missing:
                tensor = cast("Tensor", value).detach()
                if not bool(torch.isfinite(tensor).all()):
                    raise InputError(f"what {node.name} gives is not finite on the calibration data")
                missing[node.name].add(tensor)

        total = operator.length_hint(program.calibration, 0)
        with progress("ranges of values", total) as advance, fixed_random_state():
            for inputs in program.calibration_inputs():
                program.run(*inputs, watch=watch)
                advance(1)
        known = {**known, **missing}
        keep(program, _gathered, cast("Mapping[str, Spread]", known))
    return known


def affine_of(spread: Spread, type: IntegerType, observer: Observer) -> Affine:  # noqa: A002 (the field's name)
    """The map of a value's range, as an observer sees it, onto integers.

    Raises:
        InputError: if nothing was seen.
    """
    if not spread.count:
        raise InputError("the calibration data hold no numbers to tell a range by")
    whole = Affine.over(type, spread.low, spread.high)
    middles, counts = spread.bins()
    if observer == "minmax" or len(middles) == 1:
        return whole
    if observer == "percentile":
        shares = counts.cumsum(0) / counts.sum()
        low = middles[int((shares > _TAIL).nonzero()[0])]
        high = middles[int((shares >= 1 - _TAIL).nonzero()[0])]
        return Affine.over(type, float(low), float(high))
    error = _squared_error if observer == "mse" else _divergence
    tries = [1 - step / _TRIES for step in range(_TRIES)]
    ends = [(share, share) for share in tries]
    if type.low == 0:
        # one end after the other: few values have two long tails
        ends = [(1.0, share) for share in tries]
    best, least = whole, error(whole, middles, counts)
    kept = (1.0, 1.0)
    for _ in range(2 if type.low == 0 and spread.low < 0 < spread.high else 1):
        for below, above in ends:
            tried = Affine.over(type, spread.low * below, spread.high * above)
            found = error(tried, middles, counts)
            if found < least:
                best, least, kept = tried, found, (below, above)
        ends = [(share, kept[1]) for share in tries]
    return best


def _gathered(_: Program) -> Mapping[str, Spread]:
    """What was gathered so far."""
    return {}


def _squared_error(affine: Affine, middles: Tensor, counts: Tensor) -> float:
    return float(((affine.rounded(middles) - middles).square() * counts).sum())


def _divergence(affine: Affine, middles: Tensor, counts: Tensor) -> float:
    """Of what was seen, with all that is out of range at its ends, from its histogram by integers."""
    low, high = affine.range
    inside = (middles >= low) & (middles <= high)
    if not bool(inside.any()):
        return torch.inf
    codes = ((middles / affine.scale).round() + affine.zero_point).clamp(affine.type.low, affine.type.high)
    codes = (codes - affine.type.low).long()
    steps = affine.type.high - affine.type.low + 1
    seen = counts / counts.sum()
    kept = seen[inside].clone()
    kept[0] += seen[middles < low].sum()
    kept[-1] += seen[middles > high].sum()
    # each integer's share is spread evenly over the bins that it stands for
    totals = torch.zeros(steps, dtype=torch.float64).index_add_(0, codes[inside], seen[inside])
    sizes = torch.zeros(steps, dtype=torch.float64).index_add_(0, codes[inside], torch.ones_like(seen[inside]))
    stands = (totals / sizes)[codes[inside]]
    return float((kept * (kept * stands.sum() / stands).log()).sum())
