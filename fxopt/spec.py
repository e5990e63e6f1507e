"""Spec strings: a configured pass or backend written as a Python call, `prune_channels(ratio=0.5)`.

Parsed with `ast.literal_eval`, never `eval`. Printing a configuration and parsing it gives an equal one; options at
their defaults are not printed.
"""

from __future__ import annotations

import ast
from dataclasses import MISSING, Field, fields
from typing import Any, cast

from fxopt.errors import RegistryError

__all__ = ["configure", "parse_spec", "spec_string"]

_FORM = "name or name(option=value, ...)"
_LONGEST_SHOWN = 100  # characters of a text that is refused


def parse_spec(text: str) -> tuple[str, dict[str, Any]]:
    """Name and options of a spec string.

    Raises:
        RegistryError: if it is not `name` or `name(option=literal, ...)`.

    >>> parse_spec("prune_channels(ratio=0.5, ignore=['head.*'])")
    ('prune_channels', {'ratio': 0.5, 'ignore': ['head.*']})
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        if isinstance(tree, ast.Name):
            return tree.id, {}
        if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and not tree.args:
            options = {keyword.arg: ast.literal_eval(keyword.value) for keyword in tree.keywords}
            if None not in options and len(options) == len(tree.keywords):
                return tree.func.id, cast("dict[str, Any]", options)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError) as error:  # as literal_eval documents
        raise RegistryError(f"{_shown(text)} is not a spec: write {_FORM} with literals") from error
    raise RegistryError(f"{_shown(text)} is not a spec: write {_FORM}, options by keyword, once each")


def spec_string(configured: Any) -> str:
    """The spec string of a pass or backend; parsing it gives an equal one."""
    shown = [
        f"{item.name}={getattr(configured, item.name)!r}"
        for item in fields(configured)
        if item.init and getattr(configured, item.name) != _default(item)
    ]
    return f"{configured.name}({', '.join(shown)})" if shown else str(configured.name)


def configure(kind: type[Any], options: dict[str, Any]) -> Any:
    """An instance of a pass or backend class with these options.

    Raises:
        RegistryError: for an option that it does not have, or a value that it refuses.
    """
    known = [item.name for item in fields(kind) if item.init]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise RegistryError(f"{kind.name} has no option {unknown[0]!r}; its options: {', '.join(known) or 'none'}")
    frozen = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    try:
        return kind(**frozen)
    except (TypeError, ValueError) as error:
        raise RegistryError(f"{kind.name}: {error}") from error


def _shown(text: str) -> str:
    return repr(text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}...")


def _default(item: Field[Any]) -> Any:
    if item.default is not MISSING:
        return item.default
    return item.default_factory() if item.default_factory is not MISSING else MISSING
