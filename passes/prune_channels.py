"""Removes channels: structured pruning of any graph whose channels can be followed.

A *unit* is what can only be removed as a whole: a channel with everything that is added to, multiplied with or computed
from it, in all layers. Units are scored by a criterion, the least important ones of each group are removed, and the
model that is left has smaller layers. Nothing is trained: run `reestimate_batch_norm` afterwards, or fine-tune
`program.module`. With calibration data, the layers that read the removed channels are rewritten so that those left make
up for them, as well as a linear estimate can.

How many: a share of every group (`ratio`), or as many as a budget of MACs or parameters asks for, by one threshold on
the scores of all groups (each divided by the mean of its group) that is found by bisection. Of a group at least
`min_channels` and a tenth are left.

Refused, with the reason: groups that reach an input or output of the model, an operator that mixes channels or has no
rule, or a layer named by `ignore`; groups of no more than `min_channels`; groups that a criterion cannot score.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch

from fxopt.analysis.channel_costs import ChannelCosts
from fxopt.analysis.channel_scope import Attention
from fxopt.analysis.channels import BY_ATTENTION, ChannelGroup, Channels
from fxopt.analysis.importance import CRITERIA, group_scores
from fxopt.analysis.statistics import carry, collect
from fxopt.compensation import compensate, kept_statistics, readers
from fxopt.errors import InputError, PassError
from fxopt.passes_base import Pass, Rewrite, Skip
from fxopt.program import Program
from fxopt.removal import remove_channels

__all__ = ["PruneChannels"]

_LEAST_SHARE = 0.1  # of a group, that is always left: no layer collapses
_BISECTIONS = 40


@dataclass(frozen=True, kw_only=True)
class PruneChannels(Pass):
    """Removes the least important channels of every group. Give one of `ratio`, `macs` and `params`.

    Attributes:
        ratio: share of the channels to remove, from each group or (scope "global") from all together.
        macs: share of the MACs to keep.
        params: share of the parameters to keep.
        criterion: how channels are ranked: "l1", "l2", "bn_scale" or "random".
        scope: "layer" removes the same share of every group, "global" what is below one threshold; None stands for
            "layer" with `ratio` and "global" with a budget.
        round_to: what is left of a group is a multiple of this; 8 or 16 suits most kernels.
        ignore: patterns of layer paths, "head.*", whose outputs are left whole.
        layers: share to remove by pattern of layer path, instead of what the scope says.
        attention: what to remove of a grid of heads and channels: whole "heads", the same channels of every head
            ("head_dim"), or "none".
        compensate: with calibration data, rewrite what reads the removed channels so that those kept stand in for them
            (see `fxopt/compensation.py`).
        min_channels: how many are left of a group at least.
    """

    name: ClassVar[str] = "prune_channels"

    ratio: float | None = None
    macs: float | None = None
    params: float | None = None
    criterion: str = "l2"
    scope: Literal["layer", "global"] | None = None
    round_to: int = 1
    ignore: tuple[str, ...] = ()
    layers: Mapping[str, float] = field(default_factory=dict)
    attention: Attention = "head_dim"
    compensate: bool = True
    min_channels: int = 1

    def __post_init__(self) -> None:
        given = [name for name in ("ratio", "macs", "params") if getattr(self, name) is not None]
        if len(given) > 1 or (not given and not self.layers):
            raise ValueError(f"give one of ratio, macs and params, not {' and '.join(given) or 'none'}")
        shares = {name: getattr(self, name) for name in given} | {
            f"layers[{key!r}]": each for key, each in self.layers.items()
        }
        for name, share in shares.items():
            if not isinstance(share, int | float) or not 0 < share < 1:
                raise ValueError(f"{name} must be a share between 0 and 1, not {share!r}")
        _choice("criterion", self.criterion, tuple(CRITERIA))
        _choice("scope", self.scope, (None, "layer", "global"))
        _choice("attention", self.attention, tuple(BY_ATTENTION))
        for name in ("round_to", "min_channels"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(f"{name} must be an integer of at least 1, not {getattr(self, name)!r}")
        ignored: object = self.ignore
        if isinstance(ignored, str):
            raise ValueError(f"ignore must be a tuple of patterns: write ({self.ignore!r},) for this one alone")

    def plan(self, program: Program) -> Iterator[Rewrite | Skip]:
        """One decision per group of channels."""
        channels = program.analysis(BY_ATTENTION[self.attention])
        # here, so that all rewrites share one run over the data
        collect(program, self._layers_to_measure(program, channels))
        candidates: list[_Candidate] = []
        for group in channels.groups:
            candidate = self._candidate(program, channels, group)
            if isinstance(candidate, str):
                yield Skip(group.node, f"{group.name}: {candidate}")
            else:
                candidates.append(candidate)
        for candidate, removed in zip(candidates, self._choose(program, channels, candidates), strict=True):
            group = candidate.group
            if not removed:
                yield Skip(group.node, f"{group.name}: all {len(group)} channels are needed")
                continue
            kept = sorted(set(range(len(group))) - set(candidate.order[:removed].tolist()))
            places = len({channels.members[index].node for index in group.members})
            yield Rewrite(
                group.node,
                f"keep {len(kept)} of {len(group)} channels of {group.name}, in {places} places",
                {"group": group.name, "size": len(group), "kept": kept},
            )

    def apply(self, program: Program, rewrite: Rewrite) -> None:
        """Removes the channels of one group from all tensors that hold them."""
        analysis = BY_ATTENTION[self.attention]
        channels = program.analysis(analysis)
        group = channels.group(rewrite.params["group"])
        if group is None or group.locked is not None or len(group) != rewrite.params["size"]:
            raise PassError(
                f"the program has no group {rewrite.params['group']} of {rewrite.params['size']} channels",
                pass_name=self.name,
                node=rewrite.node,
            )
        kept = set(rewrite.params["kept"])
        gone = [unit for position, unit in enumerate(group.units) if position not in kept]
        statistics = collect(program, self._layers_to_measure(program, channels))
        if statistics:
            compensate(program, channels, gone, statistics)
        left = remove_channels(program, channels, gone)
        program.remember(analysis, left)
        carry(program, kept_statistics(program, channels, gone, statistics))

    def _candidate(self, program: Program, channels: Channels, group: ChannelGroup) -> _Candidate | str:
        """The group with its ranking, or why it is left alone."""
        if group.locked is not None:
            return group.locked
        paths = _layers(program, channels, group)
        if any(fnmatch(path, pattern) for path in paths for pattern in self.ignore):
            return "ignored"
        if len(group) <= self.min_channels:
            return f"has {len(group)} channels, of which {self.min_channels} are left at least"
        scores = group_scores(program, channels, group, self.criterion)
        if isinstance(scores, str):
            return scores
        named = (share for pattern, share in self.layers.items() if any(fnmatch(path, pattern) for path in paths))
        share = next(named, None)
        if share is None and self._budget is None:
            return "no pattern of layers names it"
        order = torch.argsort(scores, stable=True)
        mean = float(scores.mean()) or 1.0
        return _Candidate(group, order.numpy(), (scores[order] / mean).numpy(), share)

    def _layers_to_measure(self, program: Program, channels: Channels) -> list[str]:
        """The layers whose inputs are looked at: none without calibration data."""
        if not self.compensate or program.calibration is None:
            return []
        return [reader.node.name for reader in readers(program, channels)]

    @property
    def _budget(self) -> str | None:
        """Which of the options says how much is removed; None if only `layers` does."""
        return next((name for name in ("ratio", "macs", "params") if getattr(self, name) is not None), None)

    def _choose(self, program: Program, channels: Channels, candidates: list[_Candidate]) -> list[int]:
        """How many channels each group loses."""
        by_layer = self.scope == "layer" or (self.scope is None and self._budget == "ratio")

        def removed(level: float) -> list[int]:
            return [self._removed(candidate, level, by_layer=by_layer) for candidate in candidates]

        if self._budget is None or (self._budget == "ratio" and by_layer):
            return removed(self.ratio or 0.0)
        share = _share_left(program, channels, candidates, self._budget)
        target = getattr(self, self._budget)
        target = 1 - target if self._budget == "ratio" else target
        low, high = 0.0, 1.0 if by_layer else 1.01 * max((item.scores[-1] for item in candidates), default=0.0)
        least = share(removed(high))
        if least > target:
            raise InputError(
                f"{self} cannot be reached: with a tenth of every group that can be pruned, {least:.0%} are left. "
                "fxopt.explain shows what is locked, and why."
            )
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            low, high = (middle, high) if share(removed(middle)) > target else (low, middle)
        # both levels differ by a step of some groups: taken one after the other, as far as is needed
        steps = [removed(low)]
        for index, count in enumerate(removed(high)):
            if count != steps[-1][index]:
                steps.append([*steps[-1][:index], count, *steps[-1][index + 1 :]])
        return min(steps, key=lambda counts: abs(share(counts) - target))

    def _removed(self, candidate: _Candidate, level: float, *, by_layer: bool) -> int:
        """How many channels a group loses at a share (of the group) or threshold (of its scores), after rounding."""
        count = len(candidate.group)
        if candidate.share is not None:
            wanted = round(count * candidate.share)
        else:
            wanted = round(count * level) if by_layer else int(np.searchsorted(candidate.scores, level))
        least = max(self.min_channels, math.ceil(count * _LEAST_SHARE))
        kept = round(max(count - wanted, least) / self.round_to) * self.round_to
        while kept < least:
            kept += self.round_to
        return max(count - kept, 0)


class _Candidate(NamedTuple):
    """A group that may be pruned.

    Attributes:
        order: positions of its units, the least important first.
        scores: in that order, over the mean of the group.
        share: of it to remove, if `layers` names it.
    """

    group: ChannelGroup
    order: np.ndarray
    scores: np.ndarray
    share: float | None


def _share_left(
    program: Program, channels: Channels, candidates: Sequence[_Candidate], measure: str
) -> Callable[[Sequence[int]], float]:
    """The share of MACs, parameters or ("ratio") channels that is left if each candidate loses so many channels."""
    costs = ChannelCosts(program, channels)
    measures: dict[str, Callable[[np.ndarray], float]] = {
        "macs": lambda kept: costs.macs(kept) / program.cost().macs,
        "params": lambda kept: costs.params(kept) / program.cost().params,
        "ratio": lambda kept: float(kept.mean()),
    }

    def share(counts: Sequence[int]) -> float:
        pairs = zip(candidates, counts, strict=True)
        gone = (item.group.units[place] for item, count in pairs for place in item.order[:count])
        return measures[measure](costs.mask(gone))

    return share


def _layers(program: Program, channels: Channels, group: ChannelGroup) -> list[str]:
    """Paths of the layers that produce the channels of a group."""
    nodes = {node.name: node for node in program.graph.nodes}
    found = []
    for index in group.members:
        item = channels.members[index]
        if item.name == "weight" and channels.produces(program, item):
            found.append(str(nodes[item.node].target))
    return found or [group.name]


def _choice(option: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{option} must be one of {', '.join(map(repr, allowed))}, not {value!r}")
