"""Results that depend on the values of a program's tensors: kept until an edit, or until training wrote into a tensor.

Other analyses read the graph, which training leaves as it is. What was measured on data is out of date after it: the
second round of pruning, training, pruning must not plan on the statistics of the first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

from fxopt.analysis.constants import held_tensors

if TYPE_CHECKING:
    from fxopt.program import Program

__all__ = ["keep", "measured"]

T = TypeVar("T")


class _Measurement(NamedTuple):
    versions: tuple[tuple[int, int], ...]
    result: Any


def measured(program: Program, function: Callable[[Program], T]) -> T:
    """What `function` finds out about a program, computed once while its graph and its tensors stay as they are."""
    found = program.analysis(_kept).get(function)
    if found is None or found.versions != _versions(program):
        result = function(program)
        keep(program, function, result)
        return result
    return cast(T, found.result)


def keep(program: Program, function: Callable[[Program], T], result: T) -> None:
    """Takes `result` for what `function` would find out: after an edit that leaves it valid, or a better answer."""
    kept = {**program.analysis(_kept), function: _Measurement(_versions(program), result)}
    program.remember(_kept, kept)


def _kept(_: Program) -> Mapping[Callable[[Program], Any], _Measurement]:
    return {}


def _versions(program: Program) -> tuple[tuple[int, int], ...]:
    """Changes whenever a tensor is replaced or, by anything that torch counts as a write, written into."""
    tensors = (tensor for node in program.graph.nodes for tensor in held_tensors(program, node))
    return tuple((id(tensor), -1 if tensor.is_inference() else tensor._version) for tensor in tensors)
