"""Checks of the options of passes, which a spec string may give as values of any type."""

from __future__ import annotations

import math
from collections.abc import Iterable

__all__ = ["check_choice", "check_count", "check_flag", "check_number", "check_patterns", "check_share"]


def check_choice(name: str, value: object, allowed: Iterable[object]) -> None:
    """Takes one of several values.

    Raises:
        ValueError: if it is none of them.
    """
    choices = tuple(allowed)
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, not {value!r}")


def check_count(name: str, value: object, *, least: int = 1) -> None:
    """Takes a whole number.

    Raises:
        ValueError: if it is none, or too small.
    """
    if type(value) is not int or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, not {value!r}")


def check_flag(name: str, value: object) -> None:
    """Takes True or False.

    Raises:
        ValueError: if it is neither.
    """
    if type(value) is not bool:
        raise ValueError(f"{name} must be True or False, not {value!r}")


def check_number(name: str, value: object) -> None:
    """Takes a finite number.

    Raises:
        ValueError: if it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} must be a number, not {value!r}")


def check_share(name: str, value: object) -> None:
    """Takes a share, neither none nor all.

    Raises:
        ValueError: if it is no number between 0 and 1.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise ValueError(f"{name} must be a share between 0 and 1, not {value!r}")


def check_patterns(name: str, value: object) -> None:
    """Takes a tuple of patterns of paths.

    Raises:
        ValueError: if it is one pattern, or something else.
    """
    if isinstance(value, str):
        raise ValueError(f"{name} must be a tuple of patterns: write ({value!r},) for this one alone")
    if not isinstance(value, tuple) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"{name} must be a tuple of patterns, not {value!r}")
