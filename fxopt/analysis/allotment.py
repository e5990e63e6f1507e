"""How many channels each group loses, for a share of them or a budget of the whole program.

Groups are ranked in pools: each by itself, those of one structure together ("isomorphic", arXiv:2407.04616), or all
together. A level is the share of every pool that goes, the least important channels first; it is found by bisection. Of
a group at least a tenth is left, so that no layer collapses.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from fxopt.analysis.channel_costs import ChannelCosts, Measure
from fxopt.analysis.channels import ChannelGroup, Channels
from fxopt.errors import InputError

if TYPE_CHECKING:
    from fxopt.program import Program

__all__ = ["Allotment", "Candidate", "Scope"]

Scope = Literal["layer", "isomorphic", "global"]

_LEAST_SHARE = 0.1
_BISECTIONS = 40


class Candidate(NamedTuple):
    """A group that may lose channels.

    Attributes:
        group: the group.
        order: positions of its units, the least important first.
        scores: in that order; comparable with those of the other groups in its pool.
        share: of it to remove, whatever the others lose; None if it is among those that are ranked.
    """

    group: ChannelGroup
    order: np.ndarray
    scores: np.ndarray
    share: float | None


class Allotment:
    """Counts of channels to remove, one per candidate.

    Args:
        program: the program.
        channels: its channels.
        costs: of these.
        candidates: the groups that may lose some.
        scope: how they are pooled.
        round_to: what is left of a group is a multiple of this.
        min_channels: how many are left of a group at least.
    """

    def __init__(
        self,
        program: Program,
        channels: Channels,
        costs: ChannelCosts,
        candidates: Sequence[Candidate],
        *,
        scope: Scope,
        round_to: int,
        min_channels: int,
    ) -> None:
        self._costs = costs
        self._candidates = candidates
        self._round_to = round_to
        self._min_channels = min_channels
        keys = [_pool(program, channels, scope, place, item) for place, item in enumerate(candidates)]
        self._pools = [
            _Pool([place for place, other in enumerate(keys) if other == key], candidates)
            for key in dict.fromkeys(keys)
        ]

    def at_level(self, level: float) -> list[int]:
        """What goes if every pool loses this share."""
        wanted = np.zeros(len(self._candidates), dtype=np.int64)
        for pool in self._pools:
            pool.lowest(level, wanted)
        return [self._rounded(item, int(count)) for item, count in zip(self._candidates, wanted, strict=True)]

    def within(self, measure: Measure, target: float) -> list[int]:
        """What goes so that a share `target` is left of the MACs, the parameters or (for "ratio") the channels.

        Raises:
            InputError: if more than that is left when every group has lost all it can.
        """

        def left(counts: Sequence[int]) -> float:
            pairs = zip(self._candidates, counts, strict=True)
            gone = (item.group.units[place] for item, count in pairs for place in item.order[:count])
            return self._costs.left(measure, self._costs.mask(gone))

        low, high = 0.0, 1.0
        least = left(self.at_level(high))
        if least > target:
            raise InputError(
                f"{measure} of {target:g} cannot be reached: with a tenth of every group that can be pruned, "
                f"{least:.0%} are left. fxopt.explain shows what is locked, and why."
            )
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            low, high = (middle, high) if left(self.at_level(middle)) > target else (low, middle)
        # both levels differ by a step of some groups: taken one after the other, as far as is needed
        steps = [self.at_level(low)]
        for index, count in enumerate(self.at_level(high)):
            if count != steps[-1][index]:
                steps.append([*steps[-1][:index], count, *steps[-1][index + 1 :]])
        return min(steps, key=lambda counts: abs(left(counts) - target))

    def _rounded(self, candidate: Candidate, wanted: int) -> int:
        count = len(candidate.group)
        least = max(self._min_channels, math.ceil(count * _LEAST_SHARE))
        kept = round(max(count - wanted, least) / self._round_to) * self._round_to
        while kept < least:
            kept += self._round_to
        return max(count - kept, 0)


def _structure_of(program: Program, channels: Channels, group: ChannelGroup) -> Hashable:
    """What groups of one structure have in common: the operators and tensors that hold their channels."""
    members = (channels.members[index] for index in group.members)
    return tuple(sorted((program.op(program.node(item.node)), item.name, item.axis or 0) for item in members))


def _pool(program: Program, channels: Channels, scope: Scope, place: int, candidate: Candidate) -> Hashable:
    if candidate.share is not None or scope == "layer":
        return place
    return _structure_of(program, channels, candidate.group) if scope == "isomorphic" else None


class _Pool:
    """Groups whose channels are ranked together."""

    def __init__(self, places: Sequence[int], candidates: Sequence[Candidate]) -> None:
        scores = np.concatenate([candidates[place].scores for place in places])
        owners = np.concatenate([np.full(len(candidates[place].scores), place) for place in places])
        self._owners = owners[np.argsort(scores, kind="stable")]
        self._share = candidates[places[0]].share

    def lowest(self, level: float, counts: np.ndarray) -> None:
        """Adds to the count of each group what is in the lowest share of the pool."""
        share = level if self._share is None else self._share
        np.add.at(counts, self._owners[: round(share * len(self._owners))], 1)
