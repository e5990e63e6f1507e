"""Interleaved timing of what is compared, and the ratio of one to another with its spread.

`fxopt.timing` calls the candidates in turn. One absolute number says little on a shared machine: what is reported is
the median of the rounds' ratios with its quartiles, next to each candidate's median.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fxopt.timing import measure


class Spread(NamedTuple):
    """A median with its quartiles."""

    median: float
    low: float
    high: float

    def text(self, digits: int = 3, scale: float = 1.0) -> str:
        """As `median [low, high]`, each multiplied by `scale`."""
        return f"{self.median * scale:.{digits}f} [{self.low * scale:.{digits}f}, {self.high * scale:.{digits}f}]"


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles of at least one value."""
    if len(values) < 2:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


@dataclass(frozen=True)
class Timings:
    """Seconds per call of each candidate, one entry per round; all lists are of the same length."""

    seconds: Mapping[str, Sequence[float]]

    def per_call(self, name: str) -> Spread:
        """Seconds per call."""
        return spread(self.seconds[name])

    def ratio(self, candidate: str, baseline: str) -> Spread:
        """Time of `candidate` over time of `baseline`, round by round: below 1 the candidate is faster."""
        return spread([a / b for a, b in zip(self.seconds[candidate], self.seconds[baseline], strict=True)])

    def difference(self, candidate: str, baseline: str) -> Spread:
        """Seconds per call of `candidate` beyond `baseline`, round by round."""
        return spread([a - b for a, b in zip(self.seconds[candidate], self.seconds[baseline], strict=True)])


def interleave(
    candidates: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int = 1, calls: int = 1
) -> Timings:
    """Times the candidates in turn.

    Args:
        candidates: what to call, by name; called without arguments.
        rounds: how often every candidate has its turn.
        warmup: untimed rounds before.
        calls: calls in one turn; a turn's time is their mean. Raise it for calls of a few microseconds.
    """
    turns = {name: _repeat(function, calls) for name, function in candidates.items()}
    measured = measure(turns, rounds=rounds, warmup=warmup)
    return Timings({name: [turn / calls for turn in timing.seconds] for name, timing in measured.items()})


def _repeat(function: Callable[[], object], calls: int) -> Callable[[], object]:
    if calls == 1:
        return function

    def turn() -> None:
        for _ in range(calls):
            function()

    return turn
