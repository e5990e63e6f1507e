"""Which sizes of its free axes an exported program holds for, as `torch.export` found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from fxopt.errors import CaptureError
from fxopt.free_axes import FreeAxis

__all__ = ["LARGEST", "Limits", "free_limits", "input_values"]

LARGEST = 2**31
"""A limit that is none."""

_SPECIAL = 2  # below, export takes sizes for constants in any case
_AFFORDABLE = 4  # times the size that is known to work


class Limits(NamedTuple):
    """What is known of sizes.

    Attributes:
        note: for people; None if all sizes are taken.
        edges: by the name of an axis, a size for which what was traced may not hold any more.
    """

    note: str | None
    edges: tuple[tuple[str, int], ...]


def input_values(program: torch.export.ExportedProgram) -> list[Any]:
    """A tensor without data per input; a size that is free is a symbol, whatever torch's annotations say."""
    names = set(program.graph_signature.user_inputs)
    return [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder" and node.name in names]


def free_limits(program: torch.export.ExportedProgram, axes: Sequence[FreeAxis]) -> Limits:
    """The limits of free axes.

    Raises:
        CaptureError: if export fixed one, or found that two of different names have one size.
    """
    values = input_values(program)
    notes: list[str] = []
    edges: list[tuple[str, int]] = []
    owners: dict[Any, str] = {}
    for axis in axes:
        for index, place in axis.places:
            size = values[index].shape[place]
            if not isinstance(size, torch.SymInt):
                raise CaptureError(f"torch.export fixed {axis.name} at {size}: a value in the model depends on it")
            expression = size.node.expr
            for symbol in expression.free_symbols:
                if owners.setdefault(symbol, axis.name) != axis.name:
                    raise CaptureError(
                        f"{axis.name} and {owners[symbol]} depend on each other: axes that must have one size get one "
                        "name in dynamic_axes"
                    )
            if not expression.is_Symbol:
                notes.append(f"{axis.name} is of the form {expression}")
                edges.append((axis.name, axis.other + 1))
                continue
            bounds = program.range_constraints.get(expression)
            if bounds is not None and bounds.lower > _SPECIAL:
                edges.append((axis.name, int(bounds.lower) - 1))
            if bounds is not None and bounds.upper < LARGEST:
                notes.append(f"{axis.name} is at most {bounds.upper}")
                if bounds.upper < _AFFORDABLE * axis.other:
                    edges.append((axis.name, int(bounds.upper) + 1))
    note = f"captured for sizes where {' and '.join(dict.fromkeys(notes))}" if notes else None
    return Limits(note, tuple(dict.fromkeys(edges)))
