"""How large the channels of values are over the calibration data."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, fx

from fxopt.progress import progress
from fxopt.randomness import fixed_random_state

if TYPE_CHECKING:
    from fxopt.program import Program

__all__ = ["Magnitudes", "channel_magnitudes"]


class Magnitudes(NamedTuple):
    """Of the channels of a value, float64[channels] each.

    Attributes:
        largest: magnitude that was seen.
        square: mean of the squares.
    """

    largest: Tensor
    square: Tensor


def channel_magnitudes(program: Program, axes: Mapping[str, int]) -> Mapping[str, Magnitudes]:
    """The magnitudes of some values, in one run over the calibration data.

    Args:
        program: with calibration data.
        axes: by name of a node, the axis of its value along which the channels lie.

    Raises:
        InputError: if there are no calibration data, or they do not fit the model.
    """
    found: dict[str, Magnitudes] = {}
    counts: dict[str, int] = {}

    def watch(node: fx.Node, value: Any) -> None:
        if node.name not in axes:
            return
        rows = cast("Tensor", value).detach().movedim(axes[node.name], -1)
        rows = rows.reshape(-1, rows.shape[-1])
        largest, total = rows.abs().amax(0).double(), rows.square().sum(0).double()
        if node.name in found:
            old = found[node.name]
            largest, total = torch.maximum(largest, old.largest), total + old.square
        found[node.name] = Magnitudes(largest, total)
        counts[node.name] = counts.get(node.name, 0) + len(rows)

    if axes:
        total = operator.length_hint(program.calibration, 0)
        with progress("ranges of channels", total) as advance, fixed_random_state():
            for inputs in program.calibration_inputs():
                program.run(*inputs, watch=watch)
                advance(1)
    return {name: item._replace(square=item.square / counts[name]) for name, item in found.items()}
