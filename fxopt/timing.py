"""How long callables take, side by side.

One absolute number says little on a shared machine: the clock, the caches and the neighbours drift. The callables
therefore take turns, A B A B, and a ratio of their medians compares what ran in the same minutes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from fxopt.backend import Engine

__all__ = ["Timing", "measure", "whole_call"]


@dataclass(frozen=True)
class Timing:
    """The seconds that each call of one callable took, in order."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Seconds: a quarter of the calls were faster than the first, a quarter slower than the second."""
        ordered = sorted(self.seconds)
        return ordered[len(ordered) // 4], ordered[(3 * len(ordered)) // 4]

    def milliseconds(self) -> dict[str, float | int]:
        """Median and quartiles in milliseconds, to the microsecond, and the number of calls: plain JSON."""
        low, high = self.quartiles
        numbers = {"median": self.median, "low": low, "high": high}
        return {name: round(value * 1e3, 3) for name, value in numbers.items()} | {"calls": len(self.seconds)}


def measure(callables: Mapping[str, Callable[[], object]], *, rounds: int = 30, warmup: int = 3) -> dict[str, Timing]:
    """Calls each in turn, `warmup` rounds without and `rounds` rounds with the clock.

    On an accelerator a callable must wait for its own work to end.

    >>> timings = measure({"a": lambda: sum(range(10)), "b": lambda: None}, rounds=5)
    >>> [len(timing.seconds) for timing in timings.values()]
    [5, 5]

    Raises:
        ValueError: if `rounds` is not positive.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be positive, not {rounds}")
    seconds: dict[str, list[float]] = {name: [] for name in callables}
    for turn in range(warmup + rounds):
        for name, function in _order(list(callables.items()), turn):
            start = time.perf_counter()
            function()
            elapsed = time.perf_counter() - start
            if turn >= warmup:
                seconds[name].append(elapsed)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def whole_call(engine: Engine, inputs: Sequence[torch.Tensor]) -> Callable[[], object]:
    """Runs an engine once, on inputs that are moved to its device ahead, to the end of what it does there."""
    given = [tensor.to(engine.device) for tensor in inputs]
    if engine.device.type != "cuda":
        return lambda: engine(*given)

    def waiting() -> None:
        engine(*given)
        torch.cuda.synchronize(engine.device)

    return waiting


def _order(items: Sequence[tuple[str, Callable[[], object]]], turn: int) -> Sequence[tuple[str, Callable[[], object]]]:
    """Every other round backwards, so that none always runs on the caches that the same other one left."""
    return items if turn % 2 == 0 else items[::-1]
