"""How much each channel matters: one score per unit, aggregated over all members that hold it.

    l1, l2      the p-norm of all weights that produce or read the unit (group norm: DepGraph, arXiv:2301.12900)
    bn_scale    the mean |gamma| of the BatchNorms that the unit passes (Network Slimming, arXiv:1708.06519)
    random      drawn from a seeded generator

Scores are comparable within a group. Between groups they are once each is divided by the mean of its group.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from fxopt.analysis.channels import ChannelGroup, Channels, Member, member_tensor

if TYPE_CHECKING:
    from fxopt.program import Program

__all__ = ["CRITERIA", "group_scores"]


def group_scores(program: Program, channels: Channels, group: ChannelGroup, criterion: str) -> torch.Tensor | str:
    """float64[units of the group], or why the criterion says nothing about this group."""
    return CRITERIA[criterion](list(_weights(program, channels, group)), group)


class _Weight(NamedTuple):
    """A tensor of a group's members, float64, with the operator that uses it."""

    op: str
    member: Member
    tensor: torch.Tensor


def _norm(power: int) -> Callable[[Sequence[_Weight], ChannelGroup], torch.Tensor | str]:
    def scores(weights: Sequence[_Weight], group: ChannelGroup) -> torch.Tensor | str:
        matrices = [item for item in weights if item.member.name == "weight" and item.tensor.ndim > 1]
        if not matrices:
            return "no weights to rank by"
        total = torch.zeros(len(group), dtype=torch.float64)
        for _, member, tensor in matrices:
            others = [axis for axis in range(tensor.ndim) if axis != member.axis]
            total += _by_unit(member, group, tensor.abs().pow(power).sum(others))
        return total.pow(1 / power)

    return scores


def _bn_scale(weights: Sequence[_Weight], group: ChannelGroup) -> torch.Tensor | str:
    found = []
    for op, member, tensor in weights:
        if op == "batch_norm" and member.name == "weight":
            count = _by_unit(member, group, torch.ones(len(tensor)))
            found.append(_by_unit(member, group, tensor.abs()) / count.clamp(min=1))
    return torch.stack(found).mean(0) if found else "no batch norm to rank by"


def _random(_: Sequence[_Weight], group: ChannelGroup) -> torch.Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(group.name.encode()))
    return torch.rand(len(group), generator=generator, dtype=torch.float64)


def _weights(program: Program, channels: Channels, group: ChannelGroup) -> Iterator[_Weight]:
    nodes = {node.name: node for node in program.graph.nodes}
    for index in group.members:
        member = channels.members[index]
        tensor = member_tensor(program, member)
        if tensor is not None:
            yield _Weight(program.op(nodes[member.node]), member, tensor.detach().cpu().double())


def _by_unit(item: Member, group: ChannelGroup, values: torch.Tensor) -> torch.Tensor:
    """Sums one value per index of a member into one per unit of a group."""
    place = {unit: position for position, unit in enumerate(group.units)}
    slots = torch.tensor([place.get(unit, len(group)) for unit in item.labels.tolist()])
    return torch.zeros(len(group) + 1, dtype=torch.float64).index_add_(0, slots, values.double())[: len(group)]


CRITERIA: Mapping[str, Callable[[Sequence[_Weight], ChannelGroup], torch.Tensor | str]] = {
    "l1": _norm(1),
    "l2": _norm(2),
    "bn_scale": _bn_scale,
    "random": _random,
}
"""The criteria by name."""
