"""Whether a layer's weight is its own: a rewrite of one that is not would change, or part, something else too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import fx

from fxopt.analysis.constants import held_tensors

if TYPE_CHECKING:
    from fxopt.program import Program

__all__ = ["reason_shared", "weight_uses"]


def weight_uses(program: Program) -> Mapping[int, int]:
    """How many nodes read each of the program's own tensors, by the tensor's `id`."""
    return Counter(id(tensor) for node in program.nodes for tensor in held_tensors(program, node))


def reason_shared(program: Program, node: fx.Node) -> str | None:
    """Why the weight of the layer called at `node` is not that layer's and this call's alone; None if it is."""
    layer: Any = program.module_of(node)
    places = len(program.callers(node))
    if places > 1:
        return f"it is called at {places} places"
    if program.analysis(weight_uses)[id(layer.weight)] > 1:
        return "its weight is tied to another layer's"
    return None
