"""A dense convolution as a depthwise and a pointwise one, with weights that are fitted to it.

A convolution is y = u W + b with patches u of C channels times K places (`fxopt/analysis/patches.py`). There are two
orders, both with a multiplier T:

    depthwise_first  K places of each channel to T values, then 1 x 1     W'[c] = D[c] P[c],  D[c] [K, T], P[c] [T, out]
    pointwise_first  1 x 1 to T values per output, then their K places    W'[o] = A[o] B[o],  A[o] [C, T], B[o] [T, K]

so each slice of W, that of an input channel or that of an output, has rank T; at the rank that it has anyway, W' = W.
Without data W' has the largest singular values of each slice. With the covariance S of the patches,

    tr((W - W')ᵀ S (W - W'))

is made small by alternating least squares, each output counted as what is behind makes of it:

    depthwise_first  P of all channels by the normal equations (Dᵀ S D) P = Dᵀ S W, D = blockdiag(D[c]); then channel
                     after channel the best D[c] P[c] beside the others as they are: with R = S[c,c]^1/2 and the error
                     E = W - W', D[c] is R^-1 times the first T left singular vectors of
                     R (D[c] P[c] + S[c,c]^-1 (S E)[c])
    pointwise_first  A[o] given B[o], then B[o] given A[o], each by its normal equations; outputs are independent

No step makes the error larger. Both start from the SVDs of slices that are whitened by their own part of S. The error
is the share of the variance of the outputs that is lost (of their energy, for S = I), and the mean of what is lost
goes into the bias.

References: Network Decoupling (arXiv:1808.05517) for depthwise_first, FALCON (arXiv:1909.11321) for pointwise_first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from fxopt.analysis.layer_moments import Moments
from fxopt.analysis.patches import PatchLayer
from fxopt.analysis.removal_errors import ridge
from fxopt.substitution import Sizes

__all__ = ["Fitted", "Form", "Order", "Separable", "full_multiplier"]

Order = Literal["depthwise_first", "pointwise_first"]

_SWEEPS = 60
_PROGRESS = 1e-3  # of the error: a sweep that gains less is the last
_NOTHING = 1e-13  # of the variance: rounding
_MULTIPLIES = 5e11  # of the sweeps of a layer, which end sooner in the largest: some ten seconds
_CHUNK = 2**24  # numbers that are held at a time


class Form(NamedTuple):
    """A way to write a layer.

    Attributes:
        order: which of the two layers is first.
        multiplier: T.
        macs: for the example.
    """

    order: Order
    multiplier: int
    macs: int


class Fitted(NamedTuple):
    """A form with its weights.

    Attributes:
        form: which.
        error: the share of the outputs' variance, or energy, that is lost.
        weights: of the two layers, in the order in which they run, each in its layer's shape, float64.
        offset: what is to be added to the layer's bias, float64[outputs].
    """

    form: Form
    error: float
    weights: tuple[Tensor, Tensor]
    offset: Tensor


def full_multiplier(layer: nn.Module, order: Order) -> int:
    """The multiplier at which a convolution loses nothing."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    places = weight[0, 0].numel()
    groups: int = layer.groups  # type: ignore[assignment]
    return min(places, len(weight) // groups if order == "depthwise_first" else weight.shape[1])


class Separable:
    """The separable forms of one convolution.

    Args:
        layer: a convolution, 1-D to 3-D.
        scale: what each output counts, float64[outputs], positive.
        sizes: of the example.
        patches: moments of its patches; None for the forms that are nearest to its weights.

    Attributes:
        macs: of the layer, for the example.
    """

    def __init__(self, layer: nn.Module, scale: Tensor, sizes: Sizes, patches: Moments | None = None) -> None:
        matrix = PatchLayer(layer).weight
        self._kernel: tuple[int, ...] = tuple(layer.kernel_size)  # type: ignore[arg-type]
        self._layer, self._sizes, self._seen = layer, sizes, patches
        self._scale = scale.reshape(len(matrix), 1, -1)
        # groups, C, K, outputs
        self._weight = matrix.reshape(len(matrix), -1, math.prod(self._kernel), matrix.shape[2])
        # few data do not know all of it
        self._safe = None
        if patches is not None:
            self._safe = torch.stack([ridge(part, patches.noise) for part in patches.covariance])
        self.macs = math.prod(sizes.outputs) * matrix.numel()

    def form(self, order: Order, multiplier: int) -> Form:
        """A form, with its MACs; its multiplier is at most the full one."""
        multiplier = min(multiplier, full_multiplier(self._layer, order))
        before, after = math.prod(self._sizes.inputs), math.prod(self._sizes.outputs)
        groups, channels, places, outputs = self._weight.shape
        if order == "depthwise_first":
            each = after * channels * (places + outputs)
        else:
            each = outputs * (before * channels + after * places)
        return Form(order, multiplier, groups * multiplier * each)

    def forms(self, orders: Sequence[Order], multiplier: int | None = None) -> Iterator[Form]:
        """All forms that take fewer MACs than the layer; of several orders, those alone that are fitted in a minute.

        Args:
            orders: to look at.
            multiplier: the only one to look at.
        """
        for order in orders:
            full = full_multiplier(self._layer, order)
            for each in range(1, full + 1) if multiplier is None else [multiplier]:
                form = self.form(order, each)
                slow = len(orders) > 1 and self._seen is not None and self._sweep(form) > _MULTIPLIES / 2
                if form.macs < self.macs and not (slow and order == "pointwise_first"):
                    yield form

    def _sweep(self, form: Form) -> float:
        """Multiplications of a sweep of the fit."""
        groups, channels, places, outputs = self._weight.shape
        unknowns = (channels * form.multiplier) ** 3 / 3
        if form.order == "depthwise_first":
            return groups * (2 * (channels * places) ** 2 * outputs + unknowns)
        return groups * outputs * (2 * (channels * places) ** 2 * form.multiplier + unknowns)

    def fitted(self, form: Form) -> Fitted:
        """The weights of a form."""
        groups, channels, _, outputs = self._weight.shape
        ones = (1,) * len(self._kernel)
        scaled = self._weight * self._scale.unsqueeze(1)
        sweeps = int(min(max(_MULTIPLIES / self._sweep(form), 1), _SWEEPS))
        if form.order == "depthwise_first":
            found = _depthwise_first(scaled, self._safe, form.multiplier, sweeps)
            depthwise, pointwise = _balanced(*found, self._scale.unsqueeze(1))
            whole = depthwise @ pointwise
            weights = (
                depthwise.transpose(2, 3).reshape(-1, 1, *self._kernel),
                pointwise.reshape(groups, -1, outputs).transpose(1, 2).reshape(groups * outputs, -1, *ones),
            )
        else:
            found = _pointwise_first(scaled, self._safe, form.multiplier, sweeps)
            pointwise, depthwise = _balanced(*found, self._scale.transpose(1, 2).unsqueeze(3))
            whole = (pointwise @ depthwise).permute(0, 2, 3, 1)
            weights = (
                pointwise.transpose(2, 3).reshape(-1, channels, *ones),
                depthwise.reshape(groups * outputs, -1, *self._kernel),
            )
        lost = (self._weight - whole).reshape(groups, -1, outputs)
        mean = lost.new_zeros(groups, 1, lost.shape[1]) if self._seen is None else self._seen.mean.unsqueeze(1)
        error = self._energy(lost) / max(self._energy(self._weight.reshape(lost.shape)), 1e-300)
        return Fitted(form, error, weights, (mean @ lost).reshape(-1))

    def _energy(self, matrix: Tensor) -> float:
        """The variance of u times a matrix, each output scaled."""
        scaled = matrix * self._scale
        return float((scaled * (scaled if self._seen is None else self._seen.covariance @ scaled)).sum())


def _depthwise_first(weight: Tensor, covariance: Tensor | None, multiplier: int, sweeps: int) -> tuple[Tensor, Tensor]:
    """D [groups, C, K, T] and P [groups, C, T, outputs], for W [groups, C, K, outputs]."""
    groups, channels, places, outputs = weight.shape
    if covariance is None:
        depthwise = _principal_axes(weight, multiplier)
        return depthwise, depthwise.transpose(2, 3) @ weight
    spread = covariance.reshape(groups, channels, places, channels, places)
    own = spread.diagonal(dim1=1, dim2=3).movedim(-1, 1)  # [groups, C, K, K]
    values, vectors = torch.linalg.eigh(own)
    roots = (vectors * values.sqrt().unsqueeze(2)) @ vectors.transpose(2, 3)
    inverse = (vectors / values.sqrt().unsqueeze(2)) @ vectors.transpose(2, 3)
    depthwise = inverse @ _principal_axes(roots @ weight, multiplier)
    flat = weight.reshape(groups, -1, outputs)
    wanted = covariance @ flat
    before = torch.inf
    for left_over in reversed(range(sweeps)):
        seen = torch.einsum("gxck,gckt->gxct", covariance.reshape(groups, -1, channels, places), depthwise).flatten(2)
        system = torch.einsum("gckt,gckx->gctx", depthwise, seen.reshape(groups, channels, places, -1)).reshape(
            groups, seen.shape[2], -1
        )
        solved = _solved(system, seen.transpose(1, 2) @ flat)
        pointwise = solved.reshape(groups, channels, multiplier, outputs)
        left = wanted - seen @ solved  # S E
        error = float((flat * left).sum())
        if not left_over or _is_done(before, error, float((flat * wanted).sum())):
            break
        before = error
        depthwise = depthwise.clone()
        for channel in range(channels):
            rows = slice(channel * places, (channel + 1) * places)
            product = depthwise[:, channel] @ pointwise[:, channel]
            root, back = roots[:, channel], inverse[:, channel]
            goal = root @ product + back @ left[:, rows]
            axes = _principal_axes(goal, multiplier)
            depthwise[:, channel] = back @ axes
            moved = back @ axes @ (axes.transpose(1, 2) @ goal) - product
            left = left - covariance[:, :, rows] @ moved
    return depthwise, pointwise


def _pointwise_first(weight: Tensor, covariance: Tensor | None, multiplier: int, sweeps: int) -> tuple[Tensor, Tensor]:
    """A [groups, outputs, C, T] and B [groups, outputs, T, K], for W [groups, C, K, outputs]."""
    slices = weight.permute(0, 3, 1, 2)
    groups, channels, places, outputs = weight.shape
    if covariance is None:
        pointwise = _principal_axes(slices, multiplier)
        return pointwise, pointwise.transpose(2, 3) @ slices
    spread = covariance.reshape(groups, channels, places, channels, places)
    over_places = spread.diagonal(dim1=2, dim2=4).mean(-1).unsqueeze(1)  # [groups, 1, C, C]
    wanted = (covariance @ weight.reshape(groups, -1, outputs)).reshape(weight.shape).permute(0, 3, 1, 2)
    at_once = max(1, _CHUNK // (groups * channels * places * channels * multiplier))
    found = []
    for some, goal in zip(torch.split(slices, at_once, 1), torch.split(wanted, at_once, 1), strict=True):
        depthwise = _principal_axes(some.transpose(2, 3) @ over_places @ some, multiplier).transpose(2, 3)
        before = torch.inf
        for left_over in reversed(range(sweeps)):
            seen = torch.einsum("gckdl,gotl->gockdt", spread, depthwise)
            system = torch.einsum("gotk,gockdu->goctdu", depthwise, seen)
            inner = goal @ depthwise.transpose(2, 3)
            pointwise = _solved(system.flatten(4).flatten(2, 3), inner.flatten(2).unsqueeze(3))
            # of the same outputs, and never singular
            pointwise = torch.linalg.qr(pointwise.reshape(*some.shape[:3], multiplier))[0]
            seen = torch.einsum("gckdl,godt->gocktl", spread, pointwise)
            system = torch.einsum("goct,gockul->gotkul", pointwise, seen)
            inner = pointwise.transpose(2, 3) @ goal
            depthwise = _solved(system.flatten(4).flatten(2, 3), inner.flatten(2).unsqueeze(3)).reshape(inner.shape)
            total = float((some * goal).sum())
            error = total - float((depthwise * inner).sum())
            if not left_over or _is_done(before, error, total):
                break
            before = error
            depthwise = torch.linalg.qr(depthwise.transpose(2, 3))[0].transpose(2, 3)
        found.append((pointwise, depthwise))
    pointwise, depthwise = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
    return pointwise, depthwise


def _balanced(first: Tensor, last: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The factors [..., n, T] and [..., T, m] of one product, of equal norm for each of the T; outputs not scaled."""
    last = last / scale
    sizes = last.norm(dim=-1, keepdim=True) / first.norm(dim=-2, keepdim=True).transpose(-1, -2)
    root = torch.where(sizes > 0, sizes.sqrt(), 1.0)
    return first * root.transpose(-1, -2), last / root


def _principal_axes(matrix: Tensor, count: int) -> Tensor:
    """The first left singular vectors, [..., n, count]."""
    if matrix.shape[-2] > matrix.shape[-1] >= count:
        # 512 slices of 512 x 9 are seconds this way, and minutes by the other
        axes: Tensor = torch.linalg.svd(matrix, full_matrices=False).U
    else:
        axes = torch.linalg.eigh(matrix @ matrix.transpose(-1, -2)).eigenvectors.flip(-1)
    return axes[..., :count]


def _solved(system: Tensor, wanted: Tensor) -> Tensor:
    """The solution of normal equations."""
    factor, failed = torch.linalg.cholesky_ex(system)
    # what is all but singular is not quite positive after rounding
    return torch.linalg.lstsq(system, wanted).solution if failed.any() else torch.cholesky_solve(wanted, factor)


def _is_done(before: float, error: float, total: float) -> bool:
    """Whether a sweep gained too little to go on, or all but nothing is lost."""
    return before - error <= _PROGRESS * error or error <= _NOTHING * total
