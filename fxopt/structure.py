"""A tree of containers whose leaves are tensors: how a model's inputs and outputs are nested.

A graph takes and returns flat tensors; a `Structure` remembers what was around them, so that an engine is called like
the model and answers like it. Anything that is neither a tensor nor a container is a *constant* of the structure: it
was burnt into the graph, and a later call must pass the same. A structure is plain JSON: loading one imports no class.
A named tuple or dataclass whose class is not at hand comes back as an equally named stand-in with the same fields.
"""

from __future__ import annotations

import collections
import dataclasses
import keyword
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import torch
from torch import fx

from fxopt.errors import InputError

__all__ = ["Structure", "flatten"]

_PLAIN = (type(None), bool, int, float, str)
_KEYED = ("dict", "namedtuple", "dataclass")
_KINDS = ("tensor", "constant", "tuple", "list", *_KEYED)


@dataclass(frozen=True)
class Structure:
    """One node of the tree.

    Attributes:
        kind: "tensor", "constant", "tuple", "list", "dict", "namedtuple" or "dataclass".
        children: one per entry, in order.
        keys: dictionary keys or field names, parallel to `children`; empty for sequences.
        constant: the value, for kind "constant".
        type_name: qualified name of the container's class.
        type: the class itself where it is at hand; not part of equality, not saved.
    """

    kind: str
    children: tuple[Structure, ...] = ()
    keys: tuple[str | int, ...] = ()
    constant: Any = None
    type_name: str = ""
    type: Callable[..., Any] | None = field(default=None, compare=False, repr=False)

    def flatten(self, value: Any) -> list[Any]:
        """The leaves of `value`, which must have this structure.

        Raises:
            InputError: naming the path at which `value` differs.
        """
        leaves: list[Any] = []
        self._collect(value, "", leaves)
        return leaves

    def unflatten(self, leaves: Sequence[Any]) -> Any:
        """The value of this structure with these leaves.

        Raises:
            InputError: if the number of leaves is not `leaf_count()`.
        """
        if len(leaves) != self.leaf_count():
            raise InputError(f"expected {self.leaf_count()} tensors, got {len(leaves)}")
        iterator = iter(leaves)
        return self._build(lambda: next(iterator))

    def leaf_count(self) -> int:
        """How many tensors it holds."""
        return 1 if self.kind == "tensor" else sum(child.leaf_count() for child in self.children)

    def paths(self) -> list[str]:
        """One readable path per leaf, such as "x", "batch.image" or "outputs[0]"."""
        found: list[str] = []
        self._walk_paths("", found)
        return found

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, read by `from_json`."""
        data: dict[str, Any] = {"kind": self.kind}
        if self.children:
            data["children"] = [child.to_json() for child in self.children]
        if self.keys:
            data["keys"] = list(self.keys)
        if self.type_name:
            data["type"] = self.type_name
        if self.kind == "constant":
            plain = isinstance(self.constant, _PLAIN)
            data["value" if plain else "repr"] = self.constant if plain else repr(self.constant)
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Structure:
        """Reads what `to_json` wrote. Imports nothing.

        Raises:
            ValueError: if it is no structure. Wrong types raise TypeError, KeyError or AttributeError.
        """
        value, text, type_name = data.get("value"), data.get("repr", ""), data.get("type", "")
        if not isinstance(text, str) or not isinstance(type_name, str) or not isinstance(value, _PLAIN):
            raise TypeError(f"the type {type_name!r} or the constant {data.get('repr', value)!r} is not plain")
        structure = cls(
            kind=data["kind"],
            children=tuple(cls.from_json(child) for child in data.get("children", ())),
            keys=tuple(data.get("keys", ())),
            constant=_Opaque(text) if "repr" in data else value,
            type_name=type_name,
        )
        structure._check()
        return structure

    def _check(self) -> None:
        if self.kind not in _KINDS:
            raise ValueError(f"{self.kind!r} is no kind of structure")
        if len(self.keys) != (len(self.children) if self.kind in _KEYED else 0):
            raise ValueError(f"a {self.kind} of {len(self.children)} entries has {len(self.keys)} keys")
        if self.kind in ("tensor", "constant") and self.children:
            raise ValueError(f"a {self.kind} has no entries")
        if any(not isinstance(key, str | int) for key in self.keys):
            raise TypeError(f"the keys {self.keys} are neither text nor whole numbers")
        if self.kind in ("namedtuple", "dataclass"):
            self._stand_in  # noqa: B018 (made once, and refused here if it cannot be)

    def _collect(self, value: Any, path: str, leaves: list[Any]) -> None:
        if self.kind == "tensor":
            if not isinstance(value, torch.Tensor | fx.Proxy):
                raise InputError(f"{path or 'input'}: expected a tensor, got {_describe(value)}")
            leaves.append(value)
            return
        if self.kind == "constant":
            if not _same_constant(self.constant, value):
                raise InputError(
                    f"{path or 'input'}: was {self.constant!r} when the model was captured and is part of the program; "
                    f"got {_describe(value)}. Capture again with the new value."
                )
            return
        entries = _entries(value)
        if entries is None or entries[0] != self.kind:
            raise InputError(f"{path or 'input'}: expected a {self._noun()}, got {_describe(value)}")
        _, keys, values = entries
        if self.kind in ("tuple", "list"):
            if len(values) != len(self.children):
                raise InputError(f"{path or 'input'}: expected {len(self.children)} entries, got {len(values)}")
        elif set(keys) != set(self.keys):
            missing = [str(key) for key in self.keys if key not in keys]
            extra = [str(key) for key in keys if key not in self.keys]
            raise InputError(f"{path or 'input'}: missing {missing or 'nothing'}, unexpected {extra or 'nothing'}")
        else:
            by_key = dict(zip(keys, values, strict=True))
            values = [by_key[key] for key in self.keys]
        for index, (child, entry) in enumerate(zip(self.children, values, strict=True)):
            child._collect(entry, self._child_path(path, index), leaves)

    def _build(self, take: Callable[[], Any]) -> Any:
        if self.kind == "tensor":
            return take()
        if self.kind == "constant":
            return self.constant
        values = [child._build(take) for child in self.children]
        if self.kind == "list":
            return values
        if self.kind == "tuple":
            return tuple(values) if self.type is None else self.type(values)
        if self.kind == "dict":
            items = dict(zip(self.keys, values, strict=True))
            if self.type is not None:
                return _mapping_of(self.type, items)
            return collections.OrderedDict(items) if self.type_name == "collections.OrderedDict" else items
        fields = dict(zip((str(key) for key in self.keys), values, strict=True))
        kept = _set_later(self.type)
        answer = (self.type or self._stand_in)(**{name: value for name, value in fields.items() if name not in kept})
        for name in kept & fields.keys():
            object.__setattr__(answer, name, fields[name])  # a frozen dataclass allows no other way
        return answer

    @cached_property
    def _stand_in(self) -> Callable[..., Any]:
        name = self.type_name.rpartition(".")[2]
        name = name if name.isidentifier() and not keyword.iskeyword(name) else "Output"
        fields = [str(key) for key in self.keys]
        if self.kind == "namedtuple":
            return cast("Callable[..., Any]", collections.namedtuple(name, fields))
        return dataclasses.make_dataclass(name, fields)

    def _walk_paths(self, path: str, found: list[str]) -> None:
        if self.kind == "tensor":
            found.append(path or "output")
        for index, child in enumerate(self.children):
            child._walk_paths(self._child_path(path, index), found)

    def _child_path(self, path: str, index: int) -> str:
        if self.keys:
            key = self.keys[index]
            return f"{path}.{key}" if path else str(key)
        return f"{path or 'output'}[{index}]"

    def _noun(self) -> str:
        return self.type_name.rpartition(".")[2] or self.kind


@dataclass(frozen=True)
class _Opaque:
    """A constant that JSON cannot hold, known by its repr only."""

    text: str

    def __repr__(self) -> str:
        return self.text


def flatten(value: Any) -> tuple[list[Any], Structure]:
    """The tensors in `value`, in order, and the structure around them.

    Tuples, lists, mappings, named tuples and dataclasses are containers; `torch.fx` proxies count as tensors.

    >>> leaves, structure = flatten({"a": torch.ones(1), "b": (torch.zeros(2), 3)})
    >>> structure.paths()
    ['a', 'b[0]']
    >>> structure.unflatten(leaves)["b"][1]
    3

    Raises:
        InputError: if a dictionary in it has a key that is neither text nor a whole number.
    """
    leaves: list[Any] = []
    return leaves, _describe_structure(value, "", leaves)


def _describe_structure(value: Any, path: str, leaves: list[Any]) -> Structure:
    if isinstance(value, torch.Tensor | fx.Proxy):
        leaves.append(value)
        return Structure("tensor")
    entries = _entries(value)
    if entries is None:
        return Structure("constant", constant=value)
    kind, keys, values = entries
    for key in keys:
        if not isinstance(key, str | int):
            raise InputError(
                f"{path or 'the dictionary'}: the key {_describe(key)} is neither a string nor an integer: "
                "use one of these as the key"
            )
    names = [f"{path}.{key}" if path else str(key) for key in keys]
    paths = names or [f"{path or 'output'}[{index}]" for index in range(len(values))]
    kind_type = type(value)
    builtin = kind_type in (tuple, list, dict)
    return Structure(
        kind=kind,
        children=tuple(_describe_structure(entry, at, leaves) for entry, at in zip(values, paths, strict=True)),
        keys=tuple(keys),
        type_name="" if builtin else f"{kind_type.__module__}.{kind_type.__qualname__}",
        type=None if builtin or kind == "list" else kind_type,
    )


def _entries(value: Any) -> tuple[str, list[Any], list[Any]] | None:
    """Kind, keys and values of a container; None for anything else."""
    if isinstance(value, tuple):
        if hasattr(value, "_fields"):
            return "namedtuple", list(value._fields), list(value)
        return "tuple", [], list(value)
    if isinstance(value, list):
        return "list", [], list(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [item.name for item in dataclasses.fields(value) if item.init or hasattr(value, item.name)]
        return "dataclass", names, [getattr(value, name) for name in names]
    if isinstance(value, Mapping):
        return "dict", list(value.keys()), list(value.values())
    return None


def _mapping_of(kind: Any, items: dict[str | int, Any]) -> Any:
    """A mapping of this class. The constructor of a dict subclass may take anything, as that of defaultdict does."""
    if not (isinstance(kind, type) and issubclass(kind, dict)):
        return kind(items)
    answer = kind.__new__(kind)
    answer.update(items)
    return answer


def _set_later(kind: Callable[..., Any] | None) -> set[str]:
    """The fields of a dataclass that its constructor does not take."""
    if kind is None or not dataclasses.is_dataclass(kind):
        return set()
    return {item.name for item in dataclasses.fields(kind) if not item.init}


def _same_constant(expected: Any, value: Any) -> bool:
    if isinstance(expected, _Opaque):
        return repr(value) == expected.text
    if isinstance(expected, _PLAIN):
        return type(expected) is type(value) and (expected == value or expected != expected)
    return expected is value or bool(expected == value)


def _describe(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
