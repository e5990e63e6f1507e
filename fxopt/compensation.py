"""Makes up for channels that are removed: what is left of a layer's input stands in for what goes.

With the mean m and the covariance S of the input over the calibration data, and the channels split into kept (K) and
removed (R), the best linear estimate of the removed ones is x_R ~ m_R + A (x_K - m_K) with

    A = S_RK (S_KK + l I)^-1,      W'_K = W_K + W_R A,      b' = b + W_R (m_R - A m_K)

the ridge regression of what the removed channels brought into the layer's remaining weights, in closed form. l is a
thousandth of the mean variance of the kept channels, or more where few samples were seen. For convolutions A is the
same at every place of the kernel, and what they pad is not looked at. Without covariance, A = 0: the bias takes over
the mean of the removed channels, from the calibration data or, without any, as the BatchNorm in front tells it
(`fxopt/analysis/norm_outputs.py`). What is added to a bias that a layer does not have goes into the BatchNorm behind it
if it can (`fxopt/absorption.py`).

Layers that are called at several places, and grouped convolutions, are left as they are. `fxopt/reconstruction.py` goes
on from there, with all layers and what they read once everything is removed.

References: ThiNet (arXiv:1707.06342); CORP (arXiv:2602.05243).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, fx

from fxopt import edit
from fxopt.absorption import add_offset
from fxopt.analysis.channels import Channels
from fxopt.analysis.labels import Labels
from fxopt.analysis.norm_outputs import expected
from fxopt.analysis.readers import readers
from fxopt.analysis.removal_errors import ridge
from fxopt.analysis.statistics import Statistics

if TYPE_CHECKING:
    from fxopt.program import Program

__all__ = ["compensate", "kept_statistics"]


def compensate(program: Program, channels: Channels, units: Sequence[int], statistics: Statistics) -> None:
    """Changes the layers that read these units, which are still there afterwards but bring next to nothing.

    Args:
        program: is edited.
        channels: its channels.
        units: what will be removed.
        statistics: of the layers' inputs; empty without data.
    """
    gone = torch.tensor(sorted(units), dtype=torch.int64)
    for node, axis, labels in readers(program, channels):
        removed = torch.isin(labels, gone)
        if removed.any() and not removed.all():
            moments = statistics.get(node.name)
            seen = moments or expected(program, node, len(labels))
            mean = None if seen is None else seen.mean
            if mean is not None:
                covariance = None if moments is None else moments.covariance
                _make_up(program, node, axis, removed, mean, covariance, 0.0 if moments is None else moments.noise)


def _make_up(
    program: Program,
    node: fx.Node,
    axis: int,
    removed: Tensor,
    mean: Tensor,
    covariance: Tensor | None,
    noise: float,
) -> None:
    layer = cast("Any", program.module_of(node))
    removed = removed.to(mean.device)
    lost, kept = removed.nonzero().reshape(-1), (~removed).nonzero().reshape(-1)
    weight = layer.weight.detach().movedim(axis, -1)
    brought, offset = weight[..., lost].double(), mean[lost]
    if covariance is not None:
        estimate = torch.linalg.solve(ridge(covariance[kept][:, kept], noise), covariance[kept][:, lost]).T  # [R, K]
        offset = offset - estimate @ mean[kept]
        changed = torch.zeros_like(weight)
        changed[..., kept] = (weight[..., kept].double() + brought @ estimate).to(weight.dtype)
        edit.set_tensor(program, node, "weight", changed.movedim(-1, axis).contiguous())
    shift = brought @ offset  # [outputs, places of the kernel]
    shift = shift.flatten(1).sum(1) if shift.ndim > 1 else shift
    add_offset(program, node, shift)


def kept_statistics(program: Program, channels: Channels, units: Sequence[int], statistics: Statistics) -> Statistics:
    """The statistics of the layers' inputs once these units are gone.

    Args:
        program: before or after the removal.
        channels: before it.
        units: what is removed.
        statistics: before it.
    """
    gone = torch.tensor(sorted(units), dtype=torch.int64)
    for node in program.nodes:
        source = program.call(node).arguments.get("input")
        value = channels.values[source.name] if node.name in statistics and isinstance(source, fx.Node) else None
        if isinstance(value, Labels) and value.axes:
            removed = torch.isin(value.compact.reshape(-1), gone)
            if removed.any():
                statistics = statistics.kept(node.name, (~removed).nonzero().reshape(-1))
    return statistics
