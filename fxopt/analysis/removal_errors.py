"""How badly a layer does without a channel of its input, with all that is left making up for it: from the Gram.

A layer reads x with covariance S and has the weight W. If channel c goes and the others stand in for it as well as they
can (`fxopt/compensation.py`), the squared error of its output grows by

    |W_c|² / P_cc,      P = (S + l I)^-1

which is what Optimal Brain Surgeon removes weights by, for whole columns. Relative to the variance of the output,
tr(W S Wᵀ), the errors of several layers add up. Once c is gone, both change for the others:

    W <- W - W_c P_c / P_cc,      P <- P - P_c P_cᵀ / P_cc

so channels are taken one after the other, the least harmful first, and of two that say the same only one is cheap.
Large groups go in rounds, in each of which a share of the channels is taken by the same scores.

l is larger where few samples were seen, so that what they leave undecided is not taken for spare.

References: Optimal Brain Surgeon (Hassibi and Stork 1992), Optimal Brain Compression (arXiv:2208.11580), CORP
(arXiv:2602.05243).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Quadratic", "removal_errors", "ridge"]

_RIDGE = 1e-3
_MOST_SHRINKAGE = 0.999
_ROUNDS = 64


def ridge(covariance: Tensor, noise: float) -> Tensor:
    """The covariance with more on its diagonal: for what a few samples cannot know; float64[C, C].

    That is the shrinkage r towards m I, m the mean variance, that is best if the covariance is as uncertain as it looks
    (Ledoit and Wolf 2004): S + r / (1 - r) m I. At least a thousandth of m is added.

    Args:
        covariance: [C, C] in float64.
        noise: see `InputMoments.noise`.
    """
    mean = float(covariance.diagonal().mean())
    unit = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    if mean <= 0:
        return covariance + unit
    structure = float((covariance - mean * unit).square().sum()) / (mean * len(covariance)) ** 2
    share = min(noise / structure, _MOST_SHRINKAGE) if structure > 0 else _MOST_SHRINKAGE
    return covariance + max(_RIDGE, share / (1 - share)) * mean * unit


class Quadratic:
    """What removing input channels costs one layer.

    Args:
        covariance: of its input, [C, C] in float64.
        noise: of that, see `InputMoments.noise`.
        columns: of its weight, [rows, C] in float64.
        units: position of the unit that each channel belongs to, int64[C]; -1 for those that stay.
    """

    def __init__(self, covariance: Tensor, noise: float, columns: Tensor, units: Tensor) -> None:
        self._units = units.to(covariance.device)
        self._inverse = torch.linalg.inv(ridge(covariance, noise))
        self._products = columns.T @ columns
        energy = float((self._products * covariance).sum())
        self._scale = 1 / energy if energy > 0 else 0.0

    def errors(self, count: int) -> Tensor:
        """What each of `count` units would cost now, over the variance of the layer's output; float64 on the CPU."""
        each: Tensor = self._scale * self._products.diagonal() / self._inverse.diagonal()
        # -1 counts from the end: what stays goes to a place of its own
        found = each.new_zeros(count + 1).index_add_(0, self._units % (count + 1), each)
        return found[:count].cpu()

    def remove(self, units: Tensor) -> None:
        """Takes the channels of these units away; the others make up for them."""
        gone = torch.isin(self._units, units.to(self._units.device))
        if not gone.any():
            return
        out, left = gone.nonzero().reshape(-1), (~gone).nonzero().reshape(-1)
        inverse, products = self._inverse, self._products
        taken = torch.linalg.solve(inverse[out][:, out], inverse[out][:, left])  # [gone, left]
        crossed = products[left][:, out] @ taken
        self._products = products[left][:, left] - crossed - crossed.T + taken.T @ products[out][:, out] @ taken
        self._inverse = inverse[left][:, left] - inverse[left][:, out] @ taken
        self._units = self._units[left]


def removal_errors(layers: Sequence[Quadratic], count: int) -> Tensor:
    """What each of `count` units costs when its turn comes: they go by increasing score. float64[count].

    Args:
        layers: all that read the units; they are used up.
        count: number of units.
    """
    scores = torch.full((count,), torch.inf, dtype=torch.float64)
    waiting = torch.ones(count, dtype=torch.bool)
    least = 0.0
    at_once = -(-count // _ROUNDS)
    while waiting.any():
        errors = sum((layer.errors(count) for layer in layers), torch.zeros(count, dtype=torch.float64))
        errors = errors.masked_fill(~waiting, torch.inf)
        found, picked = errors.sort(stable=True)
        picked = picked[:at_once][found[:at_once].isfinite()]
        if not len(picked):
            break
        # the order in which they go is the order of their scores
        scores[picked] = found[: len(picked)].clamp(min=least)
        least = float(scores[picked].max())
        waiting[picked] = False
        for layer in layers:
            layer.remove(picked)
    return scores
