"""Axes beside the batch that may have any size: height and width of pictures, lengths of sequences.

The caller names them, by input and axis; axes of one name have one size. Another size is tried, which the model must
take and which every proof takes too. It is one that suits strides and windows: 32 more than a multiple of 32, else a
multiple of the example's; or half of that, where the model takes no more (a table of positions). Several axes are given
sizes that differ, so that none is taken for another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from fxopt.errors import InputError

__all__ = ["BATCH", "DynamicAxes", "FreeAxis", "Places", "named_places", "other_sizes", "resized", "sizes_text"]

DynamicAxes = Mapping[str, Mapping[int, str] | Sequence[int]]
"""By the name of a flat input: names by axis, or the axes alone."""

Places = tuple[tuple[int, int], ...]
"""Pairs of a flat input and an axis of it."""

BATCH = "batch"
"""What the axis is called that carries the batch."""

_STRIDE = 32


class FreeAxis(NamedTuple):
    """Axes of one name, which have one size, and may have any.

    Attributes:
        name: what errors and saved engines call it.
        places: where it is.
        size: the example's.
        other: another size that the model takes.
    """

    name: str
    places: Places
    size: int
    other: int


def named_places(dynamic_axes: Any, names: Sequence[str], inputs: Sequence[torch.Tensor]) -> dict[str, Places]:
    """The places of each name; axes without one are called by their input and number.

    Args:
        dynamic_axes: `DynamicAxes`, as the caller gave it.
        names: of the flat inputs.
        inputs: the example's, flat.

    Raises:
        InputError: if there is no such input or axis, or axes of one name have different sizes.
    """
    if not isinstance(dynamic_axes, Mapping):
        raise InputError(
            f'dynamic_axes must be a mapping such as {{"{names[0]}": {{2: "height"}}}}, not {dynamic_axes!r}'
        )
    found: dict[str, Places] = {}
    for key, axes in dynamic_axes.items():
        if key not in names:
            raise InputError(f"dynamic_axes names no input of the model by {key!r}: the inputs are {', '.join(names)}")
        index = list(names).index(key)
        for axis, name in _by_axis(key, axes, inputs[index].ndim).items():
            if (index, axis) in found.get(name, ()):
                raise InputError(f"dynamic_axes names axis {axis} of {key} twice")
            found[name] = (*found.get(name, ()), (index, axis))
    for name, places in found.items():
        sizes = {inputs[index].shape[axis] for index, axis in places}
        if len(sizes) > 1:
            where = ", ".join(f"axis {axis} of {names[index]}" for index, axis in places)
            raise InputError(f"dynamic_axes calls axes of different sizes {name}: {where}. One name is one size")
    return found


def other_sizes(size: int, rank: int) -> list[int]:
    """Sizes to try in place of the example's, the best first.

    Args:
        size: the example's.
        rank: how many axes come before this one, whose sizes it is not to have.
    """
    step = _STRIDE if size % _STRIDE == 0 else max(size, 2)
    tried = [size + step * (rank + 1), size * (rank + 2), size // 2]
    return [item for item in dict.fromkeys(tried) if item > 1 and item != size]


def resized(inputs: Sequence[torch.Tensor], sizes: Mapping[Places, int]) -> tuple[torch.Tensor, ...]:
    """Inputs at other sizes: the entries along the axes repeated as needed, in reverse, as none may hang on a place."""
    found = list(inputs)
    for places, size in sizes.items():
        for index, axis in places:
            tensor = found[index]
            picks = torch.arange(size, device=tensor.device) % tensor.shape[axis]
            found[index] = tensor.index_select(axis, picks.flip(0))
    return tuple(found)


def sizes_text(sizes: Mapping[str, int]) -> str:
    """Sizes by name, for people: "height 96, width 128"."""
    return ", ".join(f"{name} {size}" for name, size in sizes.items())


def _by_axis(key: str, axes: Any, rank: int) -> dict[int, str]:
    """Names by axis, counted from the front."""
    if isinstance(axes, str) or not isinstance(axes, Mapping | Sequence):
        raise InputError(f"dynamic_axes[{key!r}] must be a mapping of axes to names, or some axes, not {axes!r}")
    if not isinstance(axes, Mapping) and len({*axes}) != len(axes):
        raise InputError(f"dynamic_axes[{key!r}] holds an axis twice")
    found: dict[int, str] = {}
    for axis in axes:
        if type(axis) is not int or not -rank <= axis < rank:
            raise InputError(f"dynamic_axes names axis {axis!r} of {key}, which has {rank} axes")
        name = axes[axis] if isinstance(axes, Mapping) else f"{key}_{axis % rank}"
        if not isinstance(name, str) or not name.isidentifier():
            raise InputError(f"dynamic_axes calls axis {axis} of {key} {name!r}: use a word, such as 'height'")
        if axis % rank in found:
            raise InputError(f"dynamic_axes names axis {axis % rank} of {key} twice")
        found[axis % rank] = name
    return found
