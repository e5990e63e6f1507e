"""Removes channels: structured pruning of any graph whose channels can be followed.

A *unit* is what can only be removed as a whole: a channel with everything that is added to, multiplied with or computed
from it, in all layers. Units are scored by a criterion, the least important ones of each group are removed, and the
model that is left has smaller layers. Nothing is trained: run `reestimate_batch_norm` afterwards, or fine-tune
`program.module`. The layers that read the removed channels are rewritten to make up for them, by their mean without
calibration data. With data, those kept stand in for them, and a last rewrite fits all layers behind the first removed
channel, one after the other, to what they gave before.

How many: a share of every group (`ratio`), or as many as a budget of MACs or parameters asks for, by one threshold on
the scores of all groups. For that the scores are divided by the mean of their group; those of the criterion "gram",
errors that add up, by what a channel frees of the budget. Of a group at least `min_channels` and a tenth are left.

Refused, with the reason: groups that reach an input or output of the model, an operator that mixes channels or has no
rule, or a layer named by `ignore`; groups of no more than `min_channels`; groups that a criterion cannot score. A
program whose layers have masks (`prune_weights`) is an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any, ClassVar, NamedTuple, cast, get_args

import torch
from torch import Tensor, fx

from fxopt.absorption import absorbing_norm
from fxopt.analysis.allotment import Allotment, Candidate, Scope
from fxopt.analysis.channel_costs import ChannelCosts, Measure
from fxopt.analysis.channel_scope import Attention
from fxopt.analysis.channels import BY_ATTENTION, ChannelGroup, Channels, member_tensor
from fxopt.analysis.importance import COMPARABLE, CRITERIA, importance
from fxopt.analysis.labels import Labels, labels_in
from fxopt.analysis.measurements import keep, measured
from fxopt.analysis.norm_outputs import expected
from fxopt.analysis.readers import readers
from fxopt.analysis.statistics import carry, collect
from fxopt.compensation import compensate, kept_statistics
from fxopt.errors import PassError, PipelineError
from fxopt.masking import mask_of
from fxopt.options import check_choice, check_count, check_patterns, check_share
from fxopt.passes_base import Pass, Rewrite, Skip, listed
from fxopt.program import Program
from fxopt.reconstruction import Slicer, plan_fit, reconstruct
from fxopt.removal import remove_channels

__all__ = ["PruneChannels"]


@dataclass(frozen=True, kw_only=True)
class PruneChannels(Pass):
    """Removes the least important channels of every group. Give one of `ratio`, `macs` and `params`.

    Attributes:
        ratio: share of the channels to remove, from each group or (scope "global") from all together.
        macs: share of the MACs to keep.
        params: share of the parameters to keep.
        criterion: how channels are ranked: "l1", "l2", "bn_scale", "taylor" (takes calibration data with targets),
            "gram" (takes calibration data, and such as show what the model will see) or "random". See
            `fxopt/analysis/importance.py`.
        scope: "layer" removes the same share of every group, "isomorphic" of all groups of one structure together,
            "global" of all groups together; None stands for "layer" with `ratio` and "global" with a budget.
        round_to: what is left of a group is a multiple of this; 8 or 16 suits most kernels.
        ignore: patterns of layer paths, "head.*", whose outputs are left whole.
        layers: share to remove by pattern of layer path, instead of what the scope says.
        attention: what to remove of a grid of heads and channels: whole "heads", the same channels of every head
            ("head_dim"), or "none".
        compensate: rewrite what reads the removed channels: with calibration data those kept stand in for them
            (`fxopt/compensation.py`), and all layers behind are fitted to what they gave before
            (`fxopt/reconstruction.py`); without any the removed channels' mean, as the BatchNorm in front tells it,
            goes into the bias.
        min_channels: how many are left of a group at least.
    """

    name: ClassVar[str] = "prune_channels"
    refuses: ClassVar[frozenset[str]] = frozenset({"clustered", "fake_quantized", "quantized", "sparse"})

    ratio: float | None = None
    macs: float | None = None
    params: float | None = None
    criterion: str = "l2"
    scope: Scope | None = None
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
            check_share(name, share)
        check_choice("criterion", self.criterion, tuple(CRITERIA))
        check_choice("scope", self.scope, (None, *get_args(Scope)))
        check_choice("attention", self.attention, tuple(BY_ATTENTION))
        for name in ("round_to", "min_channels"):
            check_count(name, getattr(self, name))
        check_patterns("ignore", self.ignore)

    def plan(self, program: Program) -> Iterator[Rewrite | Skip]:
        """One decision per group of channels."""
        _refuse_masks(program)
        channels = program.analysis(BY_ATTENTION[self.attention])
        # here, so that all rewrites share one run over the data
        collect(program, self._layers_to_measure(program, channels))
        costs = ChannelCosts(program, channels, self._layers_to_gain_a_bias(program, channels))
        candidates: list[Candidate] = []
        for group, candidate in self._candidates(program, channels, costs):
            if isinstance(candidate, str):
                yield Skip(group.node, f"{group.name}: {candidate}")
            else:
                candidates.append(candidate)
        gone: list[int] = []
        for candidate, removed in zip(candidates, self._counts(program, channels, costs, candidates), strict=True):
            group = candidate.group
            if not removed:
                yield Skip(group.node, f"{group.name}: all {len(group)} channels are needed")
                continue
            kept = sorted(set(range(len(group))) - set(candidate.order[:removed].tolist()))
            gone += (group.units[place] for place in candidate.order[:removed])
            members = _members(program, channels, group)
            yield Rewrite(
                group.node,
                f"keep {len(kept)} of {len(group)} channels of {group.name}, in {listed(members[1:])}",
                {"group": group.name, "size": len(group), "kept": kept, "members": members},
            )
        if gone and self._fits(program):
            yield from plan_fit(program, _changed(program, channels, gone))

    def apply(self, program: Program, rewrite: Rewrite) -> None:
        """Removes the channels of one group from all tensors that hold them; or fits layers, once all are removed."""
        analysis = BY_ATTENTION[self.attention]
        channels = program.analysis(analysis)
        whole = measured(program, _whole)
        if whole is None or whole.attention != self.attention:
            whole = _Whole(program.copy(), channels, self.attention)
        if "fit" in rewrite.params:
            statistics = collect(program, self._layers_to_measure(program, channels))
            reconstruct(program, whole.program, rewrite.params["fit"], whole.slicer(channels))
            program.remember(analysis, channels)
            carry(program, statistics)
            return
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
        if self.compensate:
            compensate(program, channels, gone, statistics)
        left = remove_channels(program, channels, gone)
        program.remember(analysis, left)
        carry(program, kept_statistics(program, channels, gone, statistics))
        if self._fits(program):
            keep(program, _whole, cast("_Whole | None", whole))

    def _candidates(
        self, program: Program, channels: Channels, costs: ChannelCosts
    ) -> Iterator[tuple[ChannelGroup, Candidate | str]]:
        """Every group with its ranking, or why it is left alone."""
        reasons = {group.name: self._reason_to_keep(program, channels, group) for group in channels.groups}
        free = [group for group in channels.groups if reasons[group.name] is None]
        found = importance(program, channels, free, self.criterion) if free else []
        scores = dict(zip((group.name for group in free), found, strict=True))
        for group in channels.groups:
            ranked = reasons[group.name] or scores[group.name]
            if isinstance(ranked, str):
                yield group, ranked
                continue
            unit = self._saving(costs, group) if self.criterion in COMPARABLE else float(ranked.mean())
            order = torch.argsort(ranked, stable=True)
            share = self._share(_layers(program, channels, group))
            yield group, Candidate(group, order.numpy(), (ranked[order] / (unit or 1.0)).numpy(), share)

    def _saving(self, costs: ChannelCosts, group: ChannelGroup) -> float:
        """What one channel of a group frees of the budget: scores over it are worth the same at one threshold."""
        measure = self._budget or "ratio"
        return costs.left(measure, costs.mask(())) - costs.left(measure, costs.mask(group.units[:1]))

    def _reason_to_keep(self, program: Program, channels: Channels, group: ChannelGroup) -> str | None:
        """Why a group is left alone, whatever its scores; None if it is not."""
        if group.locked is not None:
            return group.locked
        paths = _layers(program, channels, group)
        if any(fnmatch(path, pattern) for path in paths for pattern in self.ignore):
            return "ignored"
        if len(group) <= self.min_channels:
            return f"has {len(group)} channels, of which {self.min_channels} are left at least"
        if self._budget is None and self._share(paths) is None:
            return "no pattern of layers names it"
        return None

    def _share(self, paths: Sequence[str]) -> float | None:
        """The share to remove that `layers` gives a group of these layers, if it names one."""
        named = (share for pattern, share in self.layers.items() if any(fnmatch(path, pattern) for path in paths))
        return next(named, None)

    def _layers_to_measure(self, program: Program, channels: Channels) -> list[str]:
        """The layers whose inputs are looked at: none without calibration data."""
        if not self._fits(program):
            return []
        return [reader.node.name for reader in readers(program, channels)]

    def _layers_to_gain_a_bias(self, program: Program, channels: Channels) -> list[str]:
        """Those without one that what they lose is made up for in."""
        if not self.compensate:
            return []
        found = []
        for node, _, labels in readers(program, channels):
            layer: Any = program.module_of(node)
            lacks = layer.bias is None and absorbing_norm(program, node) is None
            if lacks and (self._fits(program) or expected(program, node, len(labels)) is not None):
                found.append(node.name)
        return found

    def _fits(self, program: Program) -> bool:
        """Whether layers are fitted to data."""
        return self.compensate and program.calibration is not None

    @property
    def _budget(self) -> Measure | None:
        """Which of the options says how much is removed; None if only `layers` does."""
        measures: tuple[Measure, ...] = ("ratio", "macs", "params")
        return next((name for name in measures if getattr(self, name) is not None), None)

    def _counts(
        self, program: Program, channels: Channels, costs: ChannelCosts, candidates: Sequence[Candidate]
    ) -> list[int]:
        """How many channels each group loses."""
        scope = self.scope or ("layer" if self._budget == "ratio" else "global")
        allotment = Allotment(
            program, channels, costs, candidates, scope=scope, round_to=self.round_to, min_channels=self.min_channels
        )
        if self._budget is None or (self.ratio is not None and scope == "layer"):
            return allotment.at_level(self.ratio or 0.0)
        target = getattr(self, self._budget)
        return allotment.within(self._budget, 1 - target if self._budget == "ratio" else target)


class _Whole(NamedTuple):
    """A program before anything was removed, its channels, and how they were found."""

    program: Program
    channels: Channels
    attention: Attention

    def slicer(self, left: Channels) -> Slicer:
        """Cuts what a node gives in this program to the channels that are left."""

        def cut(name: str, value: Tensor) -> Tensor:
            labels = self.channels.values[name]
            if not isinstance(labels, Labels) or len(labels.axes) != 1:
                return value
            kept = torch.isin(labels.compact.reshape(-1), left.values[name].compact.reshape(-1))
            if kept.all():
                return value
            return value.index_select(labels.axes[0], kept.nonzero().reshape(-1).to(value.device))

        return cut


def _whole(_: Program) -> _Whole | None:
    """The program that channels were removed from: none, unless one is kept under this name."""
    return None


def _refuse_masks(program: Program) -> None:
    """A mask would have to be cut with its weight, and layers that are fitted again would lose their zeros."""
    masked = [str(node.target) for node in program.nodes if mask_of(program.module_of(node)) is not None]
    if masked:
        raise PipelineError(
            f"prune_channels cannot cut or fit layers that have a mask ({listed(masked)}): "
            "put it before prune_weights, or make the masks permanent with prune_weights(permanent=True)"
        )


def _changed(program: Program, channels: Channels, gone: Sequence[int]) -> set[fx.Node]:
    """The nodes whose values lose some of these units."""
    units = torch.tensor(sorted(gone))
    return {
        node
        for node in program.nodes
        if any(torch.isin(labels.compact, units).any() for labels in labels_in(channels.values[node.name]))
    }


def _members(program: Program, channels: Channels, group: ChannelGroup) -> list[str]:
    """The tensors that hold a group, each with the axis: "layer1.0.conv1.weight[0]"."""
    found = []
    for index in group.members:
        item = channels.members[index]
        if item.axis is not None and member_tensor(program, item) is not None:
            found.append(".".join(filter(None, [str(program.node(item.node).target), item.name])) + f"[{item.axis}]")
    return list(dict.fromkeys(found))


def _layers(program: Program, channels: Channels, group: ChannelGroup) -> list[str]:
    """Paths of the layers that produce the channels of a group."""
    found = []
    for index in group.members:
        item = channels.members[index]
        if item.name == "weight" and channels.produces(program, item):
            found.append(str(program.node(item.node).target))
    return found or [group.name]
