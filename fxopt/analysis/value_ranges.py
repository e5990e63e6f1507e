"""How large the values of a program become: on its example inputs, and on the calibration data if there are any.

Infinities are left out: they mask, and every float has them.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from fxopt.progress import progress
from fxopt.randomness import fixed_random_state

if TYPE_CHECKING:
    from fxopt.program import Program

__all__ = ["value_ranges"]


def value_ranges(program: Program) -> Mapping[str, float]:
    """The largest finite magnitude that each node has given, by its name; those that give no floating numbers are out.

    One run over the data; ask through `fxopt.analysis.measurements`.

    Raises:
        InputError: if the calibration data do not fit the model.
    """
    found: defaultdict[str, float] = defaultdict(float)

    def watch(node: fx.Node, value: Any) -> None:
        for tensor in _floating(value):
            found[node.name] = max(found[node.name], _largest(tensor))

    with fixed_random_state():
        program.run(*program.example_inputs, watch=watch)
        if program.calibration is not None:
            with progress("ranges of the values", operator.length_hint(program.calibration, 0)) as advance:
                for inputs in program.calibration_inputs():
                    program.run(*inputs, watch=watch)
                    advance(1)
    return dict(found)


def _floating(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _floating(item)


def _largest(tensor: Tensor) -> float:
    if not tensor.numel():
        return 0.0
    extremes = torch.stack(torch.aminmax(tensor)).abs()
    if not bool(extremes.isfinite().all()):
        tensor = tensor[tensor.isfinite()]
        return float(tensor.abs().max()) if tensor.numel() else 0.0
    return float(extremes.max())
