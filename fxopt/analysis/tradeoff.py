"""Choosing one option for each of several things, so that all together cost no more than a budget and lose the least.

By Lagrange's method: for a price l of the cost, everything takes the option with the least error + l cost; the price is
found by bisection. That is optimal for the cost that it comes to; what the budget leaves beyond is spent on the single
changes that gain the most for what they take.

Reference: Everett, Generalized Lagrange multiplier method (1963).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Option", "choose"]

_STEPS = 60


class Option(NamedTuple):
    """One of several ways to do a thing."""

    cost: float
    error: float


def choose(things: Sequence[Sequence[Option]], budget: float) -> list[int]:
    """The place of the option to take for each thing.

    Args:
        things: the options of each, at least one.
        budget: of the sum of the costs. Where not even the cheapest options fit, those are chosen.
    """

    def at(price: float) -> list[int]:
        return [
            min(range(len(options)), key=lambda place: (options[place].error + price * options[place].cost, place))
            for options in things
        ]

    def cost(places: Sequence[int]) -> float:
        return sum(options[place].cost for options, place in zip(things, places, strict=True))

    best = at(0.0)
    if cost(best) <= budget:
        return best
    low, high = 0.0, 1.0
    cheapest = [min(range(len(options)), key=lambda place: tuple(options[place])) for options in things]
    if cost(cheapest) >= budget:
        return cheapest
    scale = max(option.cost for options in things for option in options)
    while cost(at(high / scale)) > budget:
        high *= 4
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if cost(at(middle / scale)) <= budget else (middle, high)
    return _filled(things, at(high / scale), budget)


def _filled(things: Sequence[Sequence[Option]], places: list[int], budget: float) -> list[int]:
    """Spends what is left of the budget."""
    places = list(places)
    left = budget - sum(options[place].cost for options, place in zip(things, places, strict=True))
    while True:
        gains = [
            ((options[place].error - option.error) / (option.cost - options[place].cost), thing, other)
            for thing, (options, place) in enumerate(zip(things, places, strict=True))
            for other, option in enumerate(options)
            if option.error < options[place].error and 0 < option.cost - options[place].cost <= left
        ]
        if not gains:
            return places
        _, thing, other = max(gains)
        left -= things[thing][other].cost - things[thing][places[thing]].cost
        places[thing] = other
