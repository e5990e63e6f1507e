"""How much each channel matters: one score per unit, aggregated over all members that hold it.

    l1, l2      the p-norm of all weights that produce or read the unit (group norm: DepGraph, arXiv:2301.12900)
    bn_scale    the mean |gamma| of the BatchNorms that the unit passes (Network Slimming, arXiv:1708.06519)
    taylor      the mean squared change of the loss without it (`sensitivity`); calibration data with targets
    gram        the error of the layers that read it when the others make up for it (`removal_errors`); calibration data
    random      drawn from a seeded generator

Scores are comparable within a group. Between groups those of `taylor` and `gram` are too: they say what the whole
network, or the layers that read, lose; the others are once each is divided by the mean of its group.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor

from fxopt.analysis.channels import ChannelGroup, Channels, Member, member_tensor
from fxopt.analysis.norm_outputs import Expected, expected
from fxopt.analysis.readers import readers
from fxopt.analysis.removal_errors import Quadratic, removal_errors
from fxopt.analysis.sensitivity import loss_changes
from fxopt.analysis.statistics import collect

if TYPE_CHECKING:
    from fxopt.program import Program

__all__ = ["COMPARABLE", "CRITERIA", "Criterion", "importance"]

Criterion = Callable[["Program", Channels, Sequence[ChannelGroup]], list[Tensor | str]]
"""For each group, float64[its units], or why it says nothing about this group."""


def importance(
    program: Program, channels: Channels, groups: Sequence[ChannelGroup], criterion: str
) -> list[Tensor | str]:
    """For each group a score per unit, float64, or why the criterion says nothing about it.

    Raises:
        InputError: if the criterion takes calibration data and there are none that do.
    """
    return CRITERIA[criterion](program, channels, groups)


_CHUNK = 2**16  # numbers that are converted to float64 at a time


class _Weight(NamedTuple):
    """A tensor of a group's members, with the operator that uses it."""

    op: str
    member: Member
    tensor: Tensor


def _norm(program: Program, channels: Channels, groups: Sequence[ChannelGroup], *, power: int) -> list[Tensor | str]:
    return [_group_norm(program, channels, group, power) for group in groups]


def _group_norm(program: Program, channels: Channels, group: ChannelGroup, power: int) -> Tensor | str:
    matrices = [
        item for item in _weights(program, channels, group) if item.member.name == "weight" and item.tensor.ndim > 1
    ]
    if not matrices:
        return "no weights to rank by"
    total = torch.zeros(len(group), dtype=torch.float64)
    for _, member, tensor in matrices:
        total += _by_unit(member.labels, group, _power_sums(tensor, cast("int", member.axis), power))
    return total.pow(1 / power)


def _power_sums(tensor: Tensor, axis: int, power: int) -> Tensor:
    """Sums of |w|^power in float64 for each index of an axis, a part of the tensor at a time."""
    matrix = tensor.movedim(axis, 0)
    rows = max(1, _CHUNK * len(matrix) // max(tensor.numel(), 1))
    sums = torch.empty(len(matrix), dtype=torch.float64)
    # into one tensor: small results kept between large temporaries would keep the allocator from reusing their place
    for start in range(0, len(matrix), rows):
        part = matrix[start : start + rows]
        sums[start : start + rows] = part.reshape(len(part), -1).double().abs().pow(power).sum(1)
    return sums


def _bn_scale(program: Program, channels: Channels, groups: Sequence[ChannelGroup]) -> list[Tensor | str]:
    return [_group_scale(program, channels, group) for group in groups]


def _group_scale(program: Program, channels: Channels, group: ChannelGroup) -> Tensor | str:
    found = []
    for op, member, tensor in _weights(program, channels, group):
        if op == "batch_norm" and member.name == "weight":
            count = _by_unit(member.labels, group, torch.ones(len(tensor)))
            found.append(_by_unit(member.labels, group, tensor.abs().cpu()) / count.clamp(min=1))
    return torch.stack(found).mean(0) if found else "no batch norm to rank by"


def _random(_program: Program, _channels: Channels, groups: Sequence[ChannelGroup]) -> list[Tensor | str]:
    found: list[Tensor | str] = []
    for group in groups:
        generator = torch.Generator().manual_seed(zlib.crc32(group.name.encode()))
        found.append(torch.rand(len(group), generator=generator, dtype=torch.float64))
    return found


def _taylor(program: Program, channels: Channels, groups: Sequence[ChannelGroup]) -> list[Tensor | str]:
    changes = loss_changes(program, channels)
    return [
        torch.tensor([changes[unit] for unit in group.units], dtype=torch.float64)
        if all(unit in changes for unit in group.units)
        else "nothing that mixes channels reads it"
        for group in groups
    ]


def _gram(program: Program, channels: Channels, groups: Sequence[ChannelGroup]) -> list[Tensor | str]:
    """Units that only products read, such as queries and keys, are ranked by their share of the squared weights."""
    reading = list(readers(program, channels))
    statistics = collect(program, [reader.node.name for reader in reading])
    found: list[Tensor | str] = []
    for group in groups:
        place = {unit: position for position, unit in enumerate(group.units)}
        layers = []
        for reader in reading:
            moments = statistics[reader.node.name]
            units = torch.tensor([place.get(unit, -1) for unit in reader.labels.tolist()])
            if bool((units >= 0).any()) and moments.gram is not None:
                covariance = _with_unseen(
                    cast("Tensor", moments.covariance), expected(program, reader.node, len(units))
                )
                layers.append(Quadratic(covariance, moments.noise, reader.columns(program), units))
        norms = removal_errors(layers, len(group)) if layers else _group_norm(program, channels, group, 2)
        if not layers and isinstance(norms, Tensor):
            norms = norms.square() / norms.square().sum().clamp(min=torch.finfo(torch.float64).tiny)
        found.append(norms)
    return found


def _with_unseen(covariance: Tensor, training: Expected | None) -> Tensor:
    """A covariance with what the calibration data show less of than the training data did, as far as BatchNorm tells.

    A few images leave most channels of the last layers at rest; that makes them no less needed. BatchNorm knows how
    the variances of the channels compare; what a channel lacks in this comparison goes onto the diagonal, as nothing
    tells what it goes along with.
    """
    if training is None:
        return covariance
    seen, known = covariance.diagonal(), training.variance.to(covariance)
    share = seen.sum() / known.sum().clamp(min=torch.finfo(known.dtype).tiny)
    return covariance + torch.diag((share * known - seen).clamp(min=0))


def _weights(program: Program, channels: Channels, group: ChannelGroup) -> Iterator[_Weight]:
    for index in group.members:
        member = channels.members[index]
        tensor = member_tensor(program, member)
        if tensor is not None:
            yield _Weight(program.op(program.node(member.node)), member, tensor.detach())


def _by_unit(labels: Tensor, group: ChannelGroup, values: Tensor) -> Tensor:
    """Sums one value per label into one per unit of a group."""
    place = {unit: position for position, unit in enumerate(group.units)}
    slots = torch.tensor([place.get(unit, len(group)) for unit in labels.tolist()])
    return torch.zeros(len(group) + 1, dtype=torch.float64).index_add_(0, slots, values.double())[: len(group)]


CRITERIA: Mapping[str, Criterion] = {
    "l1": partial(_norm, power=1),
    "l2": partial(_norm, power=2),
    "bn_scale": _bn_scale,
    "taylor": _taylor,
    "gram": _gram,
    "random": _random,
}
"""The criteria by name."""

COMPARABLE = frozenset({"taylor", "gram"})
"""Those whose scores are comparable between groups as they are."""
