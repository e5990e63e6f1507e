"""Spec strings: parsed without evaluating, printed so that parsing gives an equal pass."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxopt import Pass, Program, Rewrite, Skip
from fxopt.errors import RegistryError
from fxopt.spec import configure, parse_spec, spec_string


@dataclass(frozen=True, kw_only=True)
class Prune(Pass):
    name: ClassVar[str] = "prune"

    ratio: float = 0.5
    ignore: tuple[str, ...] = ()
    limits: tuple[int, ...] = field(default_factory=lambda: (1, 2))
    mode: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.ratio <= 1:
            raise ValueError(f"ratio must be between 0 and 1, not {self.ratio}")

    def plan(self, program: Program) -> Iterable[Rewrite | Skip]:
        return []

    def apply(self, program: Program, rewrite: Rewrite) -> None:
        raise AssertionError("must not be reached")


@pytest.mark.parametrize(
    ("text", "name", "options"),
    [
        ("prune", "prune", {}),
        ("  prune()  ", "prune", {}),
        ("prune(ratio=0.25)", "prune", {"ratio": 0.25}),
        ("prune(ratio=-1, mode=None)", "prune", {"ratio": -1, "mode": None}),
        ("prune(ignore=['head.*', 'a'], mode=\"x\")", "prune", {"ignore": ["head.*", "a"], "mode": "x"}),
        ("prune(limits=(1,\n  2))", "prune", {"limits": (1, 2)}),
        ("prune(table={'a': [True]})", "prune", {"table": {"a": [True]}}),
    ],
)
def test_specs_parse(text: str, name: str, options: dict[str, object]) -> None:
    assert parse_spec(text) == (name, options)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "prune(",
        "prune(0.5)",
        "prune(ratio=x)",
        "prune(ratio=1 + 1j * y)",
        "prune(ratio=__import__('os').getcwd())",
        "prune(**{'ratio': 1})",
        "prune(*[1])",
        "a.prune(ratio=1)",
        "prune(ratio=1)(2)",
        "lambda: 1",
        "prune; print()",
        "prune(ratio=1, ratio=2)",
        "3",
        "prune(a={[]: 1})",
        pytest.param("-" * 100_000, id="too deep to parse"),
        pytest.param("prune(a=" + "(" * 150 + "1" + ")" * 150 + "-" * 100_000 + "1)", id="too deep inside"),
    ],
)
def test_what_is_no_spec_is_refused(text: str) -> None:
    with pytest.raises(RegistryError, match="is not a spec: write name or name") as caught:
        parse_spec(text)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("pass_", "text"),
    [
        (Prune(), "prune"),
        (Prune(ratio=0.25), "prune(ratio=0.25)"),
        (Prune(ignore=("a", "b"), mode="x"), "prune(ignore=('a', 'b'), mode='x')"),
        (Prune(limits=(1, 2)), "prune"),
        (Prune(limits=()), "prune(limits=())"),
    ],
)
def test_only_options_that_are_not_default_are_printed(pass_: Prune, text: str) -> None:
    assert str(pass_) == spec_string(pass_) == text
    name, options = parse_spec(text)
    assert name == "prune"
    assert configure(Prune, options) == pass_


def test_lists_become_tuples_so_that_passes_stay_hashable() -> None:
    made = configure(Prune, {"ignore": ["a"]})
    assert made == Prune(ignore=("a",))
    assert hash(made) == hash(Prune(ignore=("a",)))


def test_an_unknown_option_names_those_there_are() -> None:
    with pytest.raises(RegistryError, match="prune has no option 'ration'; its options: ratio, ignore, limits, mode"):
        configure(Prune, {"ration": 1})


def test_a_refused_value_is_a_registry_error_with_its_cause() -> None:
    with pytest.raises(RegistryError, match="prune: ratio must be between 0 and 1, not 2") as caught:
        configure(Prune, {"ratio": 2})
    assert isinstance(caught.value.__cause__, ValueError)


@given(
    ratio=st.floats(0, 1),
    ignore=st.lists(st.text()).map(tuple),
    limits=st.lists(st.integers()).map(tuple),
    mode=st.none() | st.text(),
)
def test_printing_and_parsing_gives_an_equal_pass(
    ratio: float, ignore: tuple[str, ...], limits: tuple[int, ...], mode: str | None
) -> None:
    pass_ = Prune(ratio=ratio, ignore=ignore, limits=limits, mode=mode)
    assert configure(Prune, parse_spec(str(pass_))[1]) == pass_
