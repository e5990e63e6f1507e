"""One option for each thing under a budget: as good as trying all, or nearly, and within the budget if anything is."""

from __future__ import annotations

import itertools
import random

from fxopt.analysis.tradeoff import Option, choose


def cost(things: list[list[Option]], places: list[int]) -> float:
    return sum(options[place].cost for options, place in zip(things, places, strict=True))


def error(things: list[list[Option]], places: list[int]) -> float:
    return sum(options[place].error for options, place in zip(things, places, strict=True))


def test_nearly_as_good_as_the_best_of_all_choices() -> None:
    draw = random.Random(0)
    exact = 0
    for _ in range(100):
        things = [
            [Option(10.0, 0.0)] + [Option(draw.uniform(1, 9), draw.uniform(0, 1)) for _ in range(4)] for _ in range(4)
        ]
        least = sum(min(options)[0] for options in things)
        budget = draw.uniform(least, 40)
        found = choose(things, budget)
        assert cost(things, found) <= budget
        fitting = [list(each) for each in itertools.product(range(5), repeat=4) if cost(things, list(each)) <= budget]
        best = min(error(things, each) for each in fitting)
        # the gap of a Lagrangian is at most the error of one thing
        assert error(things, found) <= best + max(option.error for options in things for option in options)
        exact += error(things, found) <= best + 1e-9
    assert exact >= 50


def test_a_budget_that_is_too_small_gives_the_cheapest_and_a_large_one_loses_nothing() -> None:
    things = [[Option(4.0, 0.0), Option(1.0, 0.9), Option(1.0, 0.5)], [Option(2.0, 0.0)]]
    assert choose(things, 1.0) == [2, 0]
    assert choose(things, 6.0) == [0, 0]
    assert choose(things, 5.9) == [2, 0]
    assert choose([], 1.0) == []
