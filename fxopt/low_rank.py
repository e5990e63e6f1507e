"""Low-rank forms of a linear layer or convolution: the subspaces that they go through, their MACs and their errors.

A layer is y = u W + b with patches u of length D (`fxopt/analysis/patches.py`). Its low-rank forms put a narrow layer
in between:

    svd      the kernel k to r channels, then 1 to the outputs          W' = W V Vᵀ
    spatial  k x 1 to r channels, then 1 x k to the outputs             W' = E D W, on the axis pair (channel, row)
    tucker   1 to r1 channels, k to r2 channels, then 1 to the outputs  W' = E D W V Vᵀ, E D on the channels

With the covariance S of the patches, the error of the outputs is tr((W - W')ᵀ S (W - W')), which is what is minimised:
V are the principal axes of the outputs, Wᵀ S W; and E = K^-1/2 U, D = Uᵀ K^1/2 with the axes U of K^1/2 M Mᵀ K^1/2,
where M is W unfolded along the axis and K the part of S that belongs to it. That is the whitened SVD; for S = I it is
the plain one. Each output counts as what is behind makes of it (`fxopt/analysis/destinations.py`). The mean of what is
lost goes into the bias.

References: Zhang et al. (arXiv:1505.06798) for the axes of the outputs, Jaderberg et al. (arXiv:1405.3866) for the
spatial form, Kim et al. (arXiv:1511.06530) for Tucker-2 by truncated SVDs, SVD-LLM (arXiv:2403.07378) for whitening.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from fxopt.analysis.layer_moments import LayerMoments
from fxopt.analysis.patches import PatchLayer
from fxopt.analysis.removal_errors import ridge
from fxopt.substitution import Sizes

__all__ = ["Factors", "Form", "Grid", "LowRank", "Method", "methods_for"]

Method = Literal["svd", "spatial", "tucker"]

_GRID = 12  # ranks of an input axis that are tried


class Grid(NamedTuple):
    """Which forms are looked at.

    Attributes:
        methods: which kinds.
        round_to: ranks, times the groups, are multiples of this.
        rank: the one rank that is asked for; for "tucker" both are it, or all channels where there are no more.
    """

    methods: tuple[Method, ...]
    round_to: int = 1
    rank: int | None = None


class Form(NamedTuple):
    """A way to write a layer.

    Attributes:
        method: which of the low-rank forms.
        ranks: channels in between, per group: (r,), or (r1, r2) for "tucker".
        macs: for the example.
        error: the share of the outputs' variance that is lost.
    """

    method: Method
    ranks: tuple[int, ...]
    macs: int
    error: float


@dataclass(frozen=True, eq=False)
class Factors:
    """The layers of a form.

    Attributes:
        weights: in the order in which they run, each in its layer's shape, float64.
        offset: what is to be added to the layer's bias, float64[outputs].
    """

    weights: tuple[Tensor, ...]
    offset: Tensor


def methods_for(layer: nn.Module) -> tuple[Method, ...]:
    """The forms that a layer has."""
    kernel = [] if isinstance(layer, nn.Linear) else list(layer.kernel_size)  # type: ignore[arg-type]
    if math.prod(kernel) == 1:
        return ("svd",)
    return ("svd", "spatial", "tucker") if len(kernel) == 2 and min(kernel) > 1 else ("svd", "tucker")


class _Axis:
    """An axis of the patches: projections onto it, for every rank at once.

    Attributes:
        encode: E, [groups, n, n].
        decode: D, [groups, n, n]; both truncated to r columns or rows.
    """

    def __init__(self, unfolded: Tensor, covariance: Tensor | None) -> None:
        if covariance is None:
            axes = _principal_axes(unfolded)
            self.encode, self.decode = axes, axes.transpose(1, 2)
            return
        values, vectors = torch.linalg.eigh(covariance)
        roots = values.clamp(min=0).sqrt()
        # what never varies is neither read nor missed
        inverse = torch.where(roots > 1e-7 * roots.amax(1, keepdim=True), 1 / roots, 0.0)
        white = (vectors * roots.unsqueeze(1)) @ vectors.transpose(1, 2)
        axes = _principal_axes(white @ unfolded)
        self.encode = (vectors * inverse.unsqueeze(1)) @ vectors.transpose(1, 2) @ axes
        self.decode = axes.transpose(1, 2) @ white


class LowRank:
    """The low-rank forms of one layer.

    Args:
        layer: a linear layer or a convolution.
        scale: what each output counts, float64[outputs], positive.
        sizes: of the example.
        grid: which forms are looked at.
        moments: of its patches and outputs; None for the plain forms. Forms but "svd" take the patches.

    Attributes:
        macs: of the layer, for the example.
        forms: all that take fewer.
    """

    def __init__(
        self, layer: nn.Module, scale: Tensor, sizes: Sizes, grid: Grid, moments: LayerMoments | None = None
    ) -> None:
        patches = PatchLayer(layer)
        self._groups, self._length = patches.groups, patches.length
        self._weight = patches.weight
        self._scale = scale.reshape(self._groups, 1, -1)
        self._kernel: tuple[int, ...] = tuple(getattr(layer, "kernel_size", ()))
        seen = None if moments is None else moments.patches
        # few data do not know all of it
        safe = None if seen is None else torch.stack([ridge(part, seen.noise) for part in seen.covariance])
        scaled = self._weight * self._scale
        if moments is None:
            spread = scaled.transpose(1, 2) @ scaled
        else:
            spread = moments.outputs.covariance * self._scale * self._scale.transpose(1, 2)
        self._axes = torch.linalg.eigh(spread if safe is None else scaled.transpose(1, 2) @ safe @ scaled)[1].flip(2)
        self._inputs: dict[Method, _Axis] = {
            method: _Axis(scaled.reshape(self._groups, self._size(method), -1), self._along(method, safe))
            for method in grid.methods
            if method != "svd"
        }
        self._mean_in = None if seen is None else seen.mean
        self._mean_out = None
        if moments is not None:
            bias = torch.as_tensor(patches.bias).expand(len(scale)).reshape(self._groups, -1)
            self._mean_out = moments.outputs.mean - bias
        self.macs = self._macs(sizes)
        # now, so that the covariance need not be kept
        energy = (self._axes * (spread @ self._axes)).sum(1).clamp(min=0)
        forms = self._forms(sizes, grid, energy, None if seen is None else seen.covariance)
        self.forms = tuple(form for form in forms if form.macs < self.macs)

    def _forms(self, sizes: Sizes, grid: Grid, energy: Tensor, covariance: Tensor | None) -> Iterator[Form]:
        """All forms of the grid.

        Args:
            sizes: of the example.
            grid: what to look at.
            energy: the variance along each axis of the outputs, [groups, outputs].
            covariance: of the patches.
        """
        total = max(float(energy.sum()), 1e-300)
        outputs = self._weight.shape[2]
        step = grid.round_to // math.gcd(grid.round_to, self._groups)
        for method in grid.methods:
            size = self._size(method)
            if method == "svd":
                for rank in _ranks(outputs, step, outputs, grid.rank):
                    yield Form(
                        method, (rank,), self._macs(sizes, method, (rank,)), float(energy[:, rank:].sum()) / total
                    )
                continue
            most = min(size, self._kernel[1] * outputs) if method == "spatial" else size
            by_rank = self._lost_along(method, covariance)
            for rank in _ranks(most, step, _GRID, grid.rank, at_most=method == "tucker"):
                lost = by_rank[:, rank]
                if method == "spatial":
                    yield Form(method, (rank,), self._macs(sizes, method, (rank,)), float(lost.sum()) / total)
                    continue
                for last in _ranks(outputs, step, outputs, grid.rank, at_most=True):
                    # the axes of the outputs are orthogonal: what the two projections lose adds up
                    error = float(energy[:, last:].sum() + lost[:, :last].sum()) / total
                    yield Form(method, (rank, last), self._macs(sizes, method, (rank, last)), error)

    def _macs(self, sizes: Sizes, method: Method | None = None, ranks: tuple[int, ...] = ()) -> int:
        """Multiply-accumulates of a form, or of the layer."""
        before, after = math.prod(sizes.inputs), math.prod(sizes.outputs)
        outputs = self._weight.shape[2]
        if method is None:
            each = after * self._length * outputs
        elif method == "svd":
            each = after * ranks[0] * (self._length + outputs)
        elif method == "spatial":
            between = math.prod((*sizes.outputs[:-1], sizes.inputs[-1]))
            each = ranks[0] * (between * self._size(method) + after * self._kernel[1] * outputs)
        else:
            one, two = ranks
            middle = one * math.prod(self._kernel) * two + two * outputs
            each = before * self._size(method) * one + after * middle
        return self._groups * each

    def factors(self, method: Method, ranks: tuple[int, ...]) -> Factors:
        """The weights of a form."""
        if method == "svd":
            return self._svd(*ranks)
        return self._spatial(*ranks) if method == "spatial" else self._tucker(*ranks)

    def _svd(self, rank: int) -> Factors:
        axes = self._axes[..., :rank]
        first = (self._weight * self._scale) @ axes
        last = axes.transpose(1, 2) / self._scale
        if self._mean_out is None:
            offset = None
        else:
            # W' = W V Vᵀ, so that the mean of what is lost is known from that of the outputs
            mean = self._mean_out.unsqueeze(1) * self._scale
            offset = (mean - mean @ axes @ axes.transpose(1, 2)) / self._scale
        return self._factors((first, self._kernel), (last, _ones(self._kernel)), offset=offset)

    def _spatial(self, rank: int) -> Factors:
        encode, core = self._projected("spatial", rank)
        height, width = self._kernel
        # from channels, rows, r, and from r, columns, outputs
        rows = encode.reshape(self._groups, -1, height, rank).permute(0, 3, 1, 2)
        columns = core.reshape(self._groups, rank, width, -1).permute(0, 3, 1, 2)
        offset = self._offset(self._weight - self._refolded(encode @ core))
        return Factors(
            (rows.reshape(self._groups * rank, -1, height, 1), columns.reshape(-1, rank, 1, width)),
            self._per_output(offset),
        )

    def _tucker(self, first_rank: int, last_rank: int) -> Factors:
        encode, core = self._projected("tucker", first_rank)
        axes = self._axes[..., :last_rank]
        middle = (self._refolded(core) * self._scale) @ axes
        last = axes.transpose(1, 2) / self._scale
        whole = self._refolded(encode @ (middle @ last).reshape(self._groups, first_rank, -1))
        return self._factors(
            (encode, _ones(self._kernel)),
            (middle, self._kernel),
            (last, _ones(self._kernel)),
            offset=self._offset(self._weight - whole),
        )

    def _factors(self, *layers: tuple[Tensor, tuple[int, ...]], offset: Tensor | None) -> Factors:
        """From matrices [groups, D, outputs] and the kernels of their layers."""
        weights = []
        for matrix, kernel in layers:
            flat = matrix.transpose(1, 2).reshape(self._groups * matrix.shape[2], -1)
            weights.append(flat.reshape(len(flat), -1, *kernel).contiguous())
        return Factors(tuple(weights), self._per_output(offset))

    def _projected(self, method: Method, rank: int) -> tuple[Tensor, Tensor]:
        """E and D W for a projection of the inputs, [groups, n, r] and [groups, r, the rest]."""
        axis = self._inputs[method]
        unfolded = self._weight.reshape(self._groups, self._size(method), -1)
        return axis.encode[..., :rank], axis.decode[:, :rank] @ unfolded

    def _per_output(self, offset: Tensor | None) -> Tensor:
        zeros = self._weight.new_zeros(self._groups * self._weight.shape[2])
        return zeros if offset is None else offset.reshape(-1)

    def _lost_along(self, method: Method, covariance: Tensor | None) -> Tensor:
        """What a projection of the inputs loses along each axis of the outputs, [groups, size + 1, outputs], by rank.

        What is lost at rank r is the sum of e_k B_k over k >= r, with B_k = d_k W. So its variance is a sum over such k
        and l of B_k S_kl B_l, with the covariance S in the coordinates E: of pairs, each at the smaller of its two.
        """
        axis = self._inputs[method]
        size = self._size(method)
        unfolded = self._weight.reshape(self._groups, size, -1)
        parts = (axis.decode @ unfolded).reshape(self._groups, size, -1, self._weight.shape[2])
        parts = (parts * self._scale.unsqueeze(1)) @ self._axes.unsqueeze(1)
        if covariance is None:
            each = parts.square().sum(2)
        else:
            places = parts.shape[2]
            turned = axis.encode.transpose(1, 2) @ covariance.reshape(self._groups, size, -1)
            turned = turned.reshape(self._groups, size * places, size, places).transpose(2, 3)
            turned = turned @ axis.encode.unsqueeze(1)
            pairs = 2 * torch.ones(size, size, dtype=turned.dtype, device=turned.device).triu(1)
            pairs.fill_diagonal_(1)
            turned = turned.reshape(self._groups, size, places, places, size) * pairs[:, None, None]
            flat = parts.transpose(1, 2).reshape(self._groups, places * size, -1)
            each = (parts * (turned.flatten(3).flatten(1, 2) @ flat).reshape(parts.shape)).sum(2)
        lost = each.flip(1).cumsum(1).flip(1).clamp(min=0)
        found: Tensor = torch.cat([lost, torch.zeros_like(lost[:, :1])], 1)
        return found

    def _offset(self, lost: Tensor) -> Tensor | None:
        """The mean of what is lost, [groups, outputs]; None where the patches are not known."""
        return None if self._mean_in is None else (self._mean_in.unsqueeze(1) @ lost).squeeze(1)

    def _size(self, method: Method) -> int:
        """Of the axis of the inputs that a form projects."""
        channels = self._length // math.prod(self._kernel)
        return channels * self._kernel[0] if method == "spatial" else channels

    def _refolded(self, matrix: Tensor) -> Tensor:
        """To [groups, D, outputs]; the axis that is projected comes first in D."""
        return matrix.reshape(self._groups, -1, self._weight.shape[2])

    def _along(self, method: Method, covariance: Tensor | None) -> Tensor | None:
        """The covariance along an axis, the mean over the places of the others, [groups, n, n]."""
        if covariance is None:
            return None
        size = self._size(method)
        parts = covariance.reshape(self._groups, size, self._length // size, size, -1)
        found: Tensor = parts.diagonal(dim1=2, dim2=4).mean(-1)
        return found


def _principal_axes(matrix: Tensor) -> Tensor:
    """The left singular vectors, all of them, the largest values first."""
    axes: Tensor = torch.linalg.eigh(matrix @ matrix.transpose(1, 2)).eigenvectors
    return axes.flip(2)


def _ones(kernel: tuple[int, ...]) -> tuple[int, ...]:
    return (1,) * len(kernel)


def _ranks(size: int, step: int, most: int, rank: int | None, *, at_most: bool = False) -> list[int]:
    """The ranks to try, up to a size: multiples of a step, evenly spaced if there are too many; or the one given."""
    if rank is not None:
        return [min(rank, size)] if at_most or rank <= size else []
    found = list(range(step, size + 1, step))
    if at_most and (not found or found[-1] != size):
        found.append(size)
    if len(found) > most:
        found = [found[round(place * (len(found) - 1) / (most - 1))] for place in range(most)]
    return list(dict.fromkeys(found))
