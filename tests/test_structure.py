"""Nesting of inputs and outputs: flatten, unflatten, JSON, and the errors that name a path."""

from __future__ import annotations

import collections
import dataclasses
import enum
import json
import types
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxopt.errors import InputError
from fxopt.structure import Structure, flatten

A, B, C = torch.zeros(1), torch.ones(2), torch.full((3,), 2.0)


class Pair(NamedTuple):
    left: Any
    right: Any


@dataclasses.dataclass
class Detections:
    boxes: Any
    scores: Any
    note: str = "none"


@pytest.mark.parametrize(
    ("value", "kind", "paths"),
    [
        (A, "tensor", ["output"]),
        ((A, B), "tuple", ["output[0]", "output[1]"]),
        ([A, [B]], "list", ["output[0]", "output[1][0]"]),
        ({"a": A, "b": {"c": B}}, "dict", ["a", "b.c"]),
        (collections.OrderedDict(out=A, aux=B), "dict", ["out", "aux"]),
        (Pair(A, (B, C)), "namedtuple", ["left", "right[0]", "right[1]"]),
        (Detections(A, B), "dataclass", ["boxes", "scores"]),
        ((A, None, 3, "x", [True, B]), "tuple", ["output[0]", "output[4][1]"]),
        ((), "tuple", []),
    ],
)
def test_round_trip_keeps_type_order_and_constants(value: Any, kind: str, paths: list[str]) -> None:
    leaves, structure = flatten(value)
    assert structure.kind == kind
    assert structure.paths() == paths
    assert structure.leaf_count() == len(leaves) == len(paths)
    again = structure.unflatten(leaves)
    assert type(again) is type(value)
    assert flatten(again)[1] == structure
    assert [id(leaf) for leaf in structure.flatten(again)] == [id(leaf) for leaf in leaves]
    loaded = Structure.from_json(json.loads(json.dumps(structure.to_json())))
    assert loaded == structure
    assert loaded.paths() == paths


def test_named_tuple_and_dataclass_come_back_as_stand_ins_without_their_class() -> None:
    for value in (Pair(A, B), Detections(A, B, note="two")):
        leaves, structure = flatten(value)
        answer = Structure.from_json(structure.to_json()).unflatten(leaves)
        assert type(answer) is not type(value)
        assert type(answer).__name__ == type(value).__name__
        assert flatten(answer)[1].keys == structure.keys
    assert answer.note == "two"
    assert answer.boxes is A


def test_ordered_dict_comes_back_without_its_type_at_hand() -> None:
    leaves, structure = flatten(collections.OrderedDict(out=A))
    assert type(Structure.from_json(structure.to_json()).unflatten(leaves)) is collections.OrderedDict


def test_a_loaded_constant_that_json_cannot_hold_is_compared_by_its_repr() -> None:
    _, structure = flatten({"x": A, "dtype": torch.float16})
    loaded = Structure.from_json(json.loads(json.dumps(structure.to_json())))
    assert loaded.flatten({"x": B, "dtype": torch.float16})[0] is B
    with pytest.raises(InputError, match=r"dtype: was torch\.float16"):
        loaded.flatten({"x": B, "dtype": torch.float32})


@pytest.mark.parametrize(
    ("captured", "given_value", "message"),
    [
        ({"x": A}, {"x": 3.0}, r"x: expected a tensor, got float 3\.0"),
        ({"x": A}, {"y": A}, r"missing \['x'\], unexpected \['y'\]"),
        ({"x": (A, B)}, {"x": (A,)}, r"x: expected 2 entries, got 1"),
        ({"x": (A, B)}, {"x": [A, B]}, r"x: expected a tuple, got list"),
        ({"x": {"y": [A]}}, {"x": {"y": [None]}}, r"x\.y\[0\]: expected a tensor, got NoneType"),
        ({"x": A, "flag": True}, {"x": A, "flag": False}, r"flag: was True when the model was captured.*Capture again"),
        ({"x": A, "n": 1}, {"x": A, "n": True}, r"n: was 1 when"),
        ({"x": Pair(A, B)}, {"x": (A, B)}, r"x: expected a Pair, got tuple"),
    ],
)
def test_another_structure_is_refused_with_the_path(captured: Any, given_value: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        flatten(captured)[1].flatten(given_value)


def test_dictionaries_may_come_in_another_order() -> None:
    structure = flatten({"a": A, "b": B})[1]
    assert structure.flatten({"b": B, "a": A}) == [A, B]


def test_nan_constants_are_equal() -> None:
    structure = flatten({"x": A, "fill": float("nan")})[1]
    assert structure.flatten({"x": A, "fill": float("nan")}) == [A]


def test_the_number_of_leaves_is_checked() -> None:
    with pytest.raises(InputError, match="expected 2 tensors, got 1"):
        flatten((A, B))[1].unflatten([A])


_CONSTANTS = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
_LEAVES = st.builds(lambda: torch.zeros(1)) | _CONSTANTS
_KEYS = st.text(min_size=1) | st.integers()
_VALUES = st.recursive(
    _LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(_KEYS, inner, max_size=3)
        | st.builds(Pair, inner, inner)
        | st.builds(Detections, inner, inner)
    ),
    max_leaves=12,
)


@given(_VALUES)
def test_any_nesting_round_trips(value: Any) -> None:
    leaves, structure = flatten(value)
    assert len(structure.paths()) == len(leaves)
    again = structure.unflatten(leaves)
    assert [id(leaf) for leaf in structure.flatten(again)] == [id(leaf) for leaf in leaves]
    loaded = Structure.from_json(json.loads(json.dumps(structure.to_json())))
    assert [id(leaf) for leaf in loaded.flatten(again)] == [id(leaf) for leaf in leaves]


class Colour(enum.Enum):
    RED = 1


class Level(str, enum.Enum):
    LOW = "low"


@pytest.mark.parametrize("key", [Colour.RED, (1, 2), None, 0.5])
def test_keys_that_json_cannot_hold_are_refused(key: Any) -> None:
    with pytest.raises(InputError, match=r"x\.y\[1\]: the key .* is neither a string nor an integer"):
        flatten({"x": {"y": [A, {key: B}]}})


def test_keys_keep_their_type_and_what_finds_them() -> None:
    leaves, structure = flatten({True: A, 2: B, "2": C, Level.LOW: A})
    answer = Structure.from_json(json.loads(json.dumps(structure.to_json()))).unflatten(leaves)
    assert [type(key) for key in answer] == [bool, int, str, str]
    assert answer[Level.LOW] is A
    assert answer[2] is B


class Strict(dict[str, Any]):
    def __init__(self, size: int, label: str) -> None:
        super().__init__(size=size, label=label)


@pytest.mark.parametrize(
    "value",
    [
        collections.defaultdict(lambda: C, a=A, b=B),
        collections.OrderedDict(b=A, a=B),
        collections.Counter(a=1),
        Strict(1, "a"),
        types.MappingProxyType({"a": A}),
        collections.UserDict(a=A),
    ],
)
def test_mappings_come_back_as_their_class(value: Any) -> None:
    leaves, structure = flatten(value)
    answer = structure.unflatten(leaves)
    assert type(answer) is type(value)
    assert list(answer) == list(value)
    assert all(answer[key] is value[key] for key in value)


@dataclasses.dataclass(frozen=True)
class Counted:
    boxes: Any
    total: Any = dataclasses.field(init=False)
    unset: Any = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "total", self.boxes)


def test_fields_that_the_constructor_does_not_take_are_kept() -> None:
    value = Counted(A)
    object.__setattr__(value, "total", B)
    leaves, structure = flatten(value)
    loaded = Structure.from_json(json.loads(json.dumps(structure.to_json())))
    for answer in (structure.unflatten(leaves), loaded.unflatten(leaves)):
        assert answer.boxes is A
        assert answer.total is B
        assert not hasattr(answer, "unset")
    assert type(structure.unflatten(leaves)) is Counted


@pytest.mark.parametrize(
    "data",
    [
        {"kind": "thing"},
        {"kind": "dict", "children": [{"kind": "tensor"}]},
        {"kind": "tuple", "keys": ["a"], "children": [{"kind": "tensor"}]},
        {"kind": "tensor", "children": [{"kind": "tensor"}]},
        {"kind": "dict", "keys": [[]], "children": [{"kind": "tensor"}]},
        {"kind": "namedtuple", "keys": ["a b"], "children": [{"kind": "tensor"}]},
        {"kind": "constant", "value": []},
        {"kind": "tuple", "type": 3},
    ],
)
def test_json_that_is_no_structure_is_refused(data: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        Structure.from_json(data)
