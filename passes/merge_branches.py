"""Merges parallel convolutions of one input whose outputs are added, into one convolution; linear layers likewise.

    s1 (W1 * x + b1) + s2 (W2 * x + b2) + s3 x + t   ->   W * x + b
    W = s1 embed(W1) + s2 embed(W2) + s3 embed(1),    b = s1 b1 + s2 b2 + t

where s and t are constants per channel: scales, signs, BatchNorm with fixed statistics on a branch, on the input itself
or on the sum. `embed` places a kernel in the larger one (`fxopt.kernels`): sizes, dilations and groups may differ as
long as the paddings line up. What is added besides stays a sum with the merged layer. A layer that is called elsewhere
too stays there; here the merged one takes its place.

Refused, with the reason: branches of different inputs, an output with other users, strides or paddings that do not fit,
padding other than zeros, training mode, and whatever would cost more multiply-accumulates than the branches do (1x3 and
3x1 alone). Computed in float64. Papers: RepVGG 2101.03697, ACNet 1908.03930, MobileOne 2206.04040.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, fx, nn

from fxopt import edit
from fxopt.analysis.affine import Affine, formula_of
from fxopt.analysis.branches import Branch, BranchReader, addends_of, input_of, layer_of, sum_tree
from fxopt.analysis.shapes import TensorSpec, shapes
from fxopt.kernels import (
    Convolution,
    Geometry,
    embed,
    geometry_of,
    identity_geometry,
    identity_weight,
    join,
    make_module,
)
from fxopt.passes_base import Pass, Rewrite, Skip
from fxopt.program import Program

__all__ = ["MergeBranches"]


@dataclass(frozen=True, kw_only=True)
class MergeBranches(Pass):
    """Merges parallel convolutions and linear layers whose outputs are added."""

    name: ClassVar[str] = "merge_branches"
    exact: ClassVar[bool] = True

    def plan(self, program: Program) -> Iterator[Rewrite | Skip]:
        """One decision per sum that has a convolution or linear layer among its addends."""
        reader = BranchReader(program)
        decisions: list[Rewrite | Skip] = []
        done: set[fx.Node] = set()
        # from the outputs: what scales or normalises a sum is merged with it
        for node in reversed(program.nodes):
            if node in done:
                continue
            sums = sum_tree(program, node)
            addends = addends_of(program, node, sums)
            done.update(sums)
            branches = [reader.read(addend, outermost=addend is node) for addend, _ in addends]
            decision = _decide(program, branches)
            if isinstance(decision, _Choice):
                done.update(inner for index in decision.addends for inner in branches[index].inner)
                decisions.append(decision.rewrite(node, sums))
            elif decision is not None:
                decisions.append(Skip(node.name, decision))
        yield from reversed(decisions)

    def apply(self, program: Program, rewrite: Rewrite) -> None:
        """Puts the merged layer in the place of the costliest branch, and takes the sum out."""
        root = program.node(rewrite.node)
        chosen = rewrite.params["addends"]
        leaves = [program.node(name) for name in rewrite.params["layers"]]
        addends = addends_of(program, root, [program.node(name) for name in rewrite.params["sums"]])
        base = max(leaves, key=lambda leaf: _geometry(program, leaf).macs)
        source = input_of(base)
        total = _Total([], 0.0)
        for index in chosen:
            addend, factor = addends[index]
            _expand(program, addend, factor, {source, *leaves}, total)
        merged = edit.replace(program, base, _merged(program, total, source, base), (source,))
        rest = [addend for index, addend in enumerate(addends) if index not in chosen]
        if rest:
            rest.insert(chosen[0], (merged, 1.0))
            merged = _add_up(program, root, rest)
        edit.bypass(program, root, merged)


class _Choice(NamedTuple):
    """Which addends become one layer, and what layer that is."""

    addends: list[int]
    leaves: dict[fx.Node, Geometry | None]
    geometry: Geometry

    def rewrite(self, root: fx.Node, sums: Sequence[fx.Node]) -> Rewrite:
        layers = [leaf for leaf, geometry in self.leaves.items() if geometry is not None]
        names = [str(layer.target) for layer in layers]
        names += [f"the identity of {leaf.name}" for leaf, geometry in self.leaves.items() if geometry is None]
        what = f"merge {', '.join(names[:-1])} and {names[-1]} into one {self.geometry}"
        params = {
            "sums": [node.name for node in sums],
            "addends": self.addends,
            "layers": [layer.name for layer in layers],
        }
        return Rewrite(root.name, what, params)


def _decide(program: Program, branches: list[Branch]) -> _Choice | str | None:
    """Which of the addends of a sum become one layer; why none do; None if it has nothing to do with layers."""
    by_source: dict[fx.Node, list[int]] = {}
    for index, branch in enumerate(branches):
        by_source.setdefault(branch.source, []).append(index)
    reasons = []
    for source, indices in by_source.items():
        choice = _choose(program, source, {index: branches[index] for index in indices})
        if isinstance(choice, _Choice):
            return choice
        reasons += [] if choice is None else [choice]
    if len(branches) == 1:
        return None  # no sum: if there is one below, it is asked itself
    for index, branch in enumerate(branches):
        others = [other for at, other in enumerate(branches) if at != index]
        if branch.blocked is not None and any(branch.blocked[0] in (item.source, item.origin) for item in others):
            return branch.blocked[1]
    if reasons:
        return reasons[0]
    if len(by_source) > 1 and any(branch.has_layer for branch in branches):
        names = dict.fromkeys(branch.origin.name for branch in branches)
        return f"the branches read different values: {', '.join(names)}"
    return None


def _choose(program: Program, source: fx.Node, branches: dict[int, Branch]) -> _Choice | str | None:
    """The first set of branches of one source, costliest first, that one layer computes at no higher cost."""
    layers = [geometry for branch in branches.values() for geometry in branch.leaves.values() if geometry is not None]
    if not layers or len({leaf for branch in branches.values() for leaf in branch.leaves}) < 2:
        return None
    spec = program.analysis(shapes)[source.name]
    assert isinstance(spec, TensorSpec)
    spatial = len(layers[0].size)
    axis = 1 if spatial else len(spec.shape) - 1
    identity = identity_geometry(spec.shape[axis], spatial)
    order = sorted(branches, key=lambda index: -_cost(branches[index].leaves))
    reason: str | None = None
    for position in range(len(order)):
        chosen: list[int] = []
        leaves: dict[fx.Node, Geometry | None] = {}
        whole: Geometry | None = None
        for index in order[position:]:
            branch = branches[index]
            trial = leaves | branch.leaves
            joined = join([geometry or identity for geometry in trial.values()])
            budget = (whole.macs if whole else 0) + _cost(trial) - _cost(leaves)
            if not branch.axes <= {axis}:
                reason = reason or "a constant is not one per channel"
            elif isinstance(joined, str):
                reason = reason or joined
            elif joined.macs > budget:
                cost = f"{joined.macs} multiply-accumulates per position instead of {budget}"
                reason = reason or f"one {joined} would cost more than the branches: {cost}"
            else:
                chosen, leaves, whole = [*chosen, index], trial, joined
        if whole is not None and len(leaves) > 1 and any(leaves.values()):
            chosen.sort()
            named = {leaf: geometry for index in chosen for leaf, geometry in branches[index].leaves.items()}
            return _Choice(chosen, named, whole)
    return reason


def _cost(leaves: dict[fx.Node, Geometry | None]) -> int:
    return sum(geometry.macs for geometry in leaves.values() if geometry is not None)


def _add_up(program: Program, root: fx.Node, addends: Sequence[tuple[fx.Node, float]]) -> fx.Node:
    """New nodes in front of `root` that add up the addends in their order; the first has the factor 1."""
    total = addends[0][0]
    for node, factor in addends[1:]:
        if abs(factor) == 1:
            total = edit.insert_before(program, root, operator.add if factor > 0 else operator.sub, (total, node))
        else:
            total = edit.insert_before(program, root, torch.add, (total, node), {"alpha": factor})
    return total


@dataclass
class _Total:
    """What a set of addends comes to: leaves with their factors, and a constant."""

    terms: list[tuple[fx.Node, Tensor | float]]
    shift: Tensor | float


def _expand(program: Program, node: fx.Node, factor: Tensor | float, stops: set[fx.Node], total: _Total) -> None:
    """Adds `factor` times `node` to the total, as a function of the nodes in `stops`."""
    if node in stops:
        total.terms.append((node, factor))
        return
    formula = formula_of(program, node)
    assert isinstance(formula, Affine)
    total.shift = total.shift + factor * formula.shift
    for operand, own in formula.operands:
        _expand(program, operand, factor * own, stops, total)


def _merged(program: Program, total: _Total, source: fx.Node, base: fx.Node) -> Convolution:
    """The layer that computes the total; of the dtype and device of the layer called at `base`."""
    like = layer_of(program, base)
    own = _geometry(program, base)
    identity = identity_geometry(own.inputs, len(own.size))
    parts = [(identity if leaf is source else _geometry(program, leaf)) for leaf, _ in total.terms]
    whole = join(parts)
    assert isinstance(whole, Geometry)
    layers = [layer_of(program, leaf) for leaf, _ in total.terms if leaf is not source]
    weight: Tensor | float = 0.0
    bias = total.shift
    for (leaf, factor), part in zip(total.terms, parts, strict=True):
        if leaf is source:
            own_weight = identity_weight(part.inputs, len(part.size)).to(like.weight.device)
        else:
            layer = layer_of(program, leaf)
            own_weight = layer.weight.detach().double()
            bias = bias + (factor * layer.bias.detach().double() if layer.bias is not None else 0.0)
        scale = factor.reshape(-1, 1, *(1,) * len(whole.size)) if isinstance(factor, Tensor) else factor
        weight = weight + scale * embed(own_weight, part, whole)
    assert isinstance(weight, Tensor)
    return make_module(whole, _parameter(weight, like, layers), _bias(bias, whole, like, layers))


def _bias(value: Tensor | float, whole: Geometry, like: Convolution, layers: list[Convolution]) -> nn.Parameter | None:
    if not isinstance(value, Tensor):
        if value == 0 and all(layer.bias is None for layer in layers):
            return None
        value = torch.full((whole.outputs,), value, dtype=torch.float64, device=like.weight.device)
    return _parameter(value, like, layers)


def _parameter(value: Tensor, like: Convolution, layers: list[Convolution]) -> nn.Parameter:
    trains = any(layer.weight.requires_grad for layer in layers)
    return nn.Parameter(value.to(like.weight.dtype), requires_grad=trains)


def _geometry(program: Program, node: fx.Node) -> Geometry:
    geometry = geometry_of(layer_of(program, node))
    assert isinstance(geometry, Geometry)
    return geometry
