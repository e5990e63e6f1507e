"""Linear regression from sums that stream by, no further than it helps on data that were not fitted.

The rows u of inputs and y of outputs come batch by batch; kept are their means, covariances C = cov(u, u) and
B = cov(u, y). A solution moves weights W0 that are known already,

    W = W0 + (C + l I)^-1 (B - C W0),       b = mean(y) - mean(u) W,

which is the least squares solution for l = 0, and W0 with another bias for l = inf. Samples are dealt out to two
halves, and l, in multiples of the mean variance, is for each output the one with which each half explains the other
best (two-fold cross-validation), so that a few samples do not spoil good weights.

The covariances are of u - c, c the mean of the first rows: sums of float32 products keep their digits. The bias is
fitted to all samples in any case.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Regression"]

_RIDGES = (torch.inf, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
_WORTH_WHILE = 1e-6  # of an output's variance: what is left of less is rounding


class _Sums:
    """Of the rows of one half."""

    def __init__(self, weight: Tensor) -> None:
        groups, length, outputs = weight.shape
        self.count = 0
        self.inputs = weight.new_zeros(groups, length)
        self.outputs = weight.new_zeros(groups, outputs)
        self.gram = weight.new_zeros(groups, length, length)
        self.products = weight.new_zeros(groups, length, outputs)
        self.squares = weight.new_zeros(groups, outputs)

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        self.count += inputs.shape[1]
        self.inputs += inputs.sum(1)
        self.outputs += outputs.sum(1)
        self.gram += inputs.transpose(1, 2) @ inputs
        self.products += inputs.transpose(1, 2) @ outputs
        self.squares += outputs.square().sum(1)

    def joined(self, other: _Sums) -> _Sums:
        both = object.__new__(_Sums)
        for name in ("count", "inputs", "outputs", "gram", "products", "squares"):
            setattr(both, name, getattr(self, name) + getattr(other, name))
        return both

    def moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """Covariance of the inputs, of inputs and outputs, and the variance of each output."""
        covariance = self.gram / self.count - _outer(self.inputs, self.inputs) / self.count**2
        cross = self.products / self.count - _outer(self.inputs, self.outputs) / self.count**2
        variance = self.squares / self.count - (self.outputs / self.count).square()
        return covariance, cross, variance


class Regression:
    """Regression of outputs on inputs, for several groups of both at once.

    Args:
        weight: what is known, float64[groups, D, outputs].
        ridges: the values of l to choose from, in multiples of the mean variance; inf first.
    """

    def __init__(self, weight: Tensor, ridges: Sequence[float] = _RIDGES) -> None:
        self._weight = weight
        self._ridges = ridges
        self._halves = [_Sums(weight) for _ in range(2)]
        self._centres: tuple[Tensor, Tensor] | None = None

    def add(self, half: int, inputs: Tensor, outputs: Tensor) -> None:
        """Takes in some rows.

        Args:
            half: 0 or 1.
            inputs: [groups, rows, D].
            outputs: [groups, rows, outputs].
        """
        if not inputs.shape[1]:
            return
        if self._centres is None:
            self._centres = inputs.mean(1, keepdim=True), outputs.mean(1, keepdim=True)
        self._halves[half].add(inputs - self._centres[0], outputs - self._centres[1])

    def solve(self) -> tuple[Tensor, Tensor, float, float]:
        """The weights and the bias, and what share of an output's variance they and the known weights leave.

        Returns:
            Weights [groups, D, outputs], bias [groups, outputs], and both shares, means over the outputs, as measured
            on the other half each; nan if a half is empty, where the weights are the known ones.
        """
        assert self._centres is not None, "no rows"
        both = self._halves[0].joined(self._halves[1])
        weight, left, before = self._weight, torch.nan, torch.nan
        if all(half.count for half in self._halves):
            errors = self._errors()
            least, places = errors.min(0)
            places = torch.where(errors[0] - least > _WORTH_WHILE, places, 0)
            left, before = float(least.mean()), float(errors[0].mean())
            moments = both.moments()
            for place in sorted(set(places.flatten().tolist())):
                chosen = (places == place).unsqueeze(1)
                weight = torch.where(chosen, _solved(moments, self._weight, self._ridges[place]), weight)
        centre_in, centre_out = (centre.squeeze(1).double() for centre in self._centres)
        mean_in, mean_out = centre_in + both.inputs / both.count, centre_out + both.outputs / both.count
        bias = mean_out - (mean_in.unsqueeze(1) @ weight).squeeze(1)
        return weight, bias, left, before

    def _errors(self) -> Tensor:
        """By ridge, the share of each output's variance in a half that what the other half gives leaves, on average.

        Returns:
            float64[ridges, groups, outputs]
        """
        moments = [half.moments() for half in self._halves]
        found = []
        for ridge in self._ridges:
            shares = []
            for mine, (covariance, cross, variance) in (moments, moments[::-1]):
                weight = _solved(mine, self._weight, ridge)
                left = variance + (weight * (covariance @ weight - 2 * cross)).sum(1)
                shares.append(torch.where(variance > 0, left / variance, 0.0))
            found.append((shares[0] + shares[1]) / 2)
        return torch.stack(found)


def _solved(moments: tuple[Tensor, Tensor, Tensor], known: Tensor, ridge: float) -> Tensor:
    if ridge == torch.inf:
        return known
    covariance, cross, _ = moments
    mean = covariance.diagonal(dim1=1, dim2=2).mean(1)
    amount = torch.where(mean > 0, ridge * mean, 1.0)
    unit = torch.eye(covariance.shape[1], dtype=covariance.dtype, device=covariance.device)
    system, wanted = covariance + amount[:, None, None] * unit, cross - covariance @ known
    factor, failed = torch.linalg.cholesky_ex(system)
    # sums of float32 products can leave a covariance that is not quite positive
    moved: Tensor = torch.linalg.solve(system, wanted) if failed.any() else torch.cholesky_solve(wanted, factor)
    return known + moved


def _outer(left: Tensor, right: Tensor) -> Tensor:
    return left.unsqueeze(2) * right.unsqueeze(1)
