"""Rows of what a layer reads and of what it is to give, drawn from some batches: as many as sums over them are worth.

The sums of a layer with patches of length D take rows times D² multiplications. Where all positions of all samples
would take more than seconds, some of the positions of each batch are drawn. A caller that is content with less gets
what a fraction of a second gives, in which gathering the patches counts too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fxopt.analysis.patches import PatchLayer

__all__ = ["Sample", "Seen", "samples", "wide"]

_MULTIPLIES = 2e11  # of a layer's sums: a few seconds
_FEW_MULTIPLIES = 1e10
_TO_GATHER = 512  # multiplications that take as long as gathering a value of a patch
_ROWS_PER_VALUE = 16  # rows that are used in any case, per value of a patch
_CHUNK = 2**24  # numbers of patches that are held at a time


class Seen(NamedTuple):
    """What there is of one batch at a layer.

    Attributes:
        value: what it reads, samples on axis 0.
        target: what it is to give.
    """

    value: Tensor
    target: Tensor


class Sample(NamedTuple):
    """Some rows, in float32 or wider.

    Attributes:
        half: 0 or 1: the half of the samples that they are from.
        inputs: [groups, rows, D].
        outputs: [groups, rows, outputs / groups].
    """

    half: int
    inputs: Tensor
    outputs: Tensor


def samples(layer: PatchLayer, batches: Sequence[Seen], *, few: bool = False) -> Iterator[Sample]:
    """The rows of all batches, or a part of them that is the same at every call.

    Args:
        layer: the layer.
        batches: what it reads and gives.
        few: whether some are enough.
    """
    rows = sum(len(seen.value) * layer.positions(seen.target) for seen in batches)
    values = layer.groups * layer.length
    if few:
        affordable = _FEW_MULTIPLIES / (values * (layer.length + _TO_GATHER))
    else:
        affordable = _MULTIPLIES / (values * layer.length)
    wanted = max(_ROWS_PER_VALUE * layer.length, affordable)
    share = min(1.0, wanted / max(rows, 1))
    generator = torch.Generator().manual_seed(0)
    for batch, (value, target) in enumerate(batches):
        # batches may differ in size, and so may the positions of their samples
        positions = layer.positions(target)
        each = math.ceil(positions * share)
        picks = torch.arange(positions) if each == positions else torch.randperm(positions, generator=generator)[:each]
        picks = picks.to(value.device)
        # of neighbouring rows one half may have what the other has, if they are tokens of one sample
        middle = (len(value) + batch % 2) // 2
        for half, mine in enumerate((slice(middle), slice(middle, None))):
            for part, wished, places in _together(value[mine], target[mine], picks, layer.groups * layer.length):
                yield Sample(half, wide(layer.patches(part, wished, places)), wide(layer.rows(wished, places)))


def wide(tensor: Tensor) -> Tensor:
    """In float32 if it is narrower."""
    return tensor if tensor.dtype.itemsize >= torch.float32.itemsize else tensor.float()


def _together(value: Tensor, target: Tensor, picks: Tensor, length: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Some samples and positions at a time, of patches of that length."""
    at_once = max(1, _CHUNK // max(1, len(picks) * length))
    for places in torch.split(picks, max(1, _CHUNK // length)):
        for start in range(0, len(value), at_once):
            yield value[start : start + at_once], target[start : start + at_once], places
