"""Checks of options take what is right, and say of anything else what would be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fxopt.options import check_choice, check_count, check_patterns, check_share


@pytest.mark.parametrize(
    ("check", "good", "bad", "message"),
    [
        (lambda value: check_choice("a", value, ("x", None)), ["x", None], ["y", 1], "a must be one of 'x', None, not"),
        (lambda value: check_count("a", value), [1, 9], [0, True, 2.0, "1"], "a must be an integer of at least 1, not"),
        (lambda value: check_count("a", value, least=0), [0], [-1], "a must be an integer of at least 0, not"),
        (lambda value: check_share("a", value), [0.5, 0.001], [0, 1, True, 1.5, "0.5"], "a must be a share between 0"),
        (lambda value: check_patterns("a", value), [(), ("head.*",)], ["head", ["head"], (1,)], "a must be a tuple of"),
    ],
)
def test_checks(check: Callable[[Any], None], good: list[Any], bad: list[Any], message: str) -> None:
    for value in good:
        check(value)
    for value in bad:
        with pytest.raises(ValueError, match=message):
            check(value)
