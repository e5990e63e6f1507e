"""Re-estimates the statistics of BatchNorm from calibration data, for a network whose weights were changed.

Pruning, factorizing or quantizing a layer moves the mean and the variance of what it gives, while the BatchNorm behind
it still subtracts and divides by the old ones. This puts the right ones in their place, from unlabelled batches and
without training:

    running_mean = sum x / n        running_var = sum (x - running_mean)² / (n - 1)

over all n values that a channel has in the calibration data; n - 1 is what PyTorch divides by for `running_var`. x is
what a BatchNorm sees once all those before it have their new statistics: see `fxopt.analysis.norm_inputs` for how that
takes only one run over the data. There is nothing to choose: more data give better statistics, some hundred images are
enough.

It belongs behind the passes that change weights and before `fold_batch_norm`, which takes the BatchNorm away. Refused,
with the reason: training mode, no running statistics, channels with less than two values, values that are not finite.
A BatchNorm that is called at several places gets statistics of its own at each; its weight and bias stay shared.

Papers: arXiv:1803.05407 (section 3.2), arXiv:2007.02491 (after pruning), arXiv:2105.07576 (PreciseBN).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, fx
from torch.nn.modules.batchnorm import _BatchNorm

from fxopt import edit
from fxopt.analysis.affine import formula_of
from fxopt.analysis.measurements import keep, measured
from fxopt.analysis.norm_inputs import Moments, norm_inputs
from fxopt.errors import InputError
from fxopt.passes_base import Pass, Rewrite, Skip
from fxopt.program import Program

__all__ = ["ReestimateBatchNorm"]


@dataclass(frozen=True, kw_only=True)
class ReestimateBatchNorm(Pass):
    """Re-estimates the running statistics of BatchNorm from the calibration data."""

    name: ClassVar[str] = "reestimate_batch_norm"

    def plan(self, program: Program) -> Iterator[Rewrite | Skip]:
        """One decision per BatchNorm call.

        Raises:
            InputError: if there is a BatchNorm to re-estimate, and no calibration data or such as do not fit the model.
        """
        formulas = {node: formula_of(program, node) for node in program.nodes if program.op(node) == "batch_norm"}
        seen: Mapping[str, Moments] = {}
        if not all(isinstance(formula, str) for formula in formulas.values()):
            if program.calibration is None:
                raise InputError(f"{self.name} needs data: pass calibration=, an iterable of unlabelled batches")
            seen = measured(program, norm_inputs)
        for node, formula in formulas.items():
            reason = formula if isinstance(formula, str) else _reason_to_keep(program, node, seen[node.name])
            if reason is not None:
                yield Skip(node.name, reason)
                continue
            places = len(program.callers(node))
            own = f" for this one of its {places} calls" if places > 1 else ""
            yield Rewrite(node.name, f"re-estimate {node.target}{own}")

    def apply(self, program: Program, rewrite: Rewrite) -> None:
        """Gives one BatchNorm call its statistics.

        They are no part of the plan, as they belong to the weights at hand: a plan replays on another checkpoint.
        """
        seen = measured(program, norm_inputs)
        node = program.node(rewrite.node)
        new = _statistics(program, node, seen[node.name])
        counter = _norm(program, node).num_batches_tracked
        if counter is not None and len(program.callers(node)) > 1:
            # training counts in place, and the copy for this call would count on the same tensor
            new["num_batches_tracked"] = counter.clone()
        for name, value in new.items():
            edit.set_tensor(program, node, name, value)
        # what norms see does not depend on the running statistics that the program holds
        keep(program, norm_inputs, seen)


def _reason_to_keep(program: Program, node: fx.Node, seen: Moments) -> str | None:
    """Why a BatchNorm keeps its statistics; None if it gets new ones."""
    if seen.count < 2:
        return f"the calibration data give a channel {seen.count} value, and a variance takes two"
    new = _statistics(program, node, seen)
    if not all(value.isfinite().all() for value in new.values()):
        return "its input is not finite on the calibration data"
    norm = _norm(program, node)
    if all(torch.equal(value, norm.get_buffer(name)) for name, value in new.items()):
        return f"{node.target} has the statistics of the calibration data already"
    return None


def _statistics(program: Program, node: fx.Node, seen: Moments) -> dict[str, Tensor]:
    """The new buffers of a BatchNorm call by name, in the data types and on the devices of the old ones."""
    old = _norm(program, node).get_buffer
    return {"running_mean": seen.mean.to(old("running_mean")), "running_var": seen.variance.to(old("running_var"))}


def _norm(program: Program, node: fx.Node) -> _BatchNorm:
    return cast(_BatchNorm, program.module_of(node))
