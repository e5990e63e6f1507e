"""One-dimensional k-means: the k values that stand best for many.

    minimise  sum_i w_i (x_i - c_a(i))²        over the centroids c and the assignment a

In one dimension a cluster is a run of the sorted values, and what a run costs follows from prefix sums of w, w x and
w x². So the best cut into k runs is found by dynamic programming over the places where a run may end,

    D_k[j] = min over i <= j of  D_(k-1)[i] + cost(i, j)

whose best i grows with j: every other j is bounded by its neighbours, which makes a layer O(m log m). Few values may be
cut everywhere, and the result is optimal. Many may be cut at some thousand places at first (equal widths and equal
counts, both, as neither alone suits long tails); Lloyd's iterations on all of the values follow, each O(k log n) by the
same sums.

Paper: arXiv:1701.07204.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["centroids", "exact_up_to", "inertia", "nearest"]

_MOST_PLACES = 4096  # where the runs of a row may end; these bound the time of the dynamic programme
_WORK = 2**18  # places x clusters x rows
_ITERATIONS = 100

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]


class _Sums(NamedTuple):
    """Prefix sums of weights, values and squares: [rows, n + 1]."""

    weight: Floats
    first: Floats
    second: Floats

    def at(self, places: Indices) -> _Sums:
        return _Sums(*(np.take_along_axis(item, places, 1) for item in self))


def centroids(values: NDArray[np.floating], clusters: int, weights: NDArray[np.floating] | None = None) -> Floats:
    """The centroids of each row, ascending; a row of fewer distinct values repeats the last one.

    Args:
        values: [rows, n], finite.
        clusters: how many centroids a row gets.
        weights: [rows, n], positive; None for equal ones.

    Returns:
        [rows, clusters]. A row of at most `clusters` distinct values gets exactly these; one of at most
        `exact_up_to(rows, clusters)` values gets the best there are.
    """
    if weights is None:
        ordered = np.sort(values, axis=1).astype(np.float64)
        heavy = None
    else:
        order = np.argsort(values, axis=1)
        ordered = np.take_along_axis(values, order, 1).astype(np.float64)
        heavy = np.take_along_axis(weights, order, 1).astype(np.float64)
    few = np.count_nonzero(ordered[:, 1:] != ordered[:, :-1], axis=1) < clusters
    distinct = {row: np.unique(ordered[row]) for row in np.flatnonzero(few)}
    center = ordered.mean(1, keepdims=True)  # squares of values far from zero would cancel
    ordered -= center
    sums = _sums(ordered, heavy)
    places = _places(ordered, exact_up_to(len(ordered), clusters))
    bounds = np.take_along_axis(places, _optimal_cuts(sums.at(places), clusters), 1)
    if places.shape[1] <= ordered.shape[1]:
        bounds = _refined(ordered, sums, bounds)
    found: Floats = _means(sums.at(bounds)) + center
    for row, exact in distinct.items():
        found[row] = np.pad(exact, (0, clusters - len(exact)), mode="edge")
    return found


def exact_up_to(rows: int, clusters: int) -> int:
    """How many values a row may have to be clustered optimally."""
    return max(2 * clusters, min(_MOST_PLACES, _WORK // (rows * clusters)))


def nearest(values: NDArray[np.floating], centers: Floats) -> Indices:
    """For each value the index of the nearest centroid of its row: [rows, n].

    Args:
        values: [rows, n].
        centers: [rows, clusters], ascending.
    """
    middles = (centers[:, 1:] + centers[:, :-1]) / 2
    # the middle of two neighbouring numbers is one of them: it must be the lower one
    middles = np.minimum(middles, np.nextafter(centers[:, 1:], centers[:, :-1]))
    return np.stack([np.searchsorted(middle, row) for middle, row in zip(middles, values, strict=True)])


def inertia(values: NDArray[np.floating], centers: Floats, weights: NDArray[np.floating] | None = None) -> float:
    """The sum of (weighted) squared distances to the nearest centroid of the row."""
    distances = values.astype(np.float64) - np.take_along_axis(centers, nearest(values, centers), 1)
    return float(np.sum(np.square(distances) if weights is None else np.square(distances) * weights))


def _sums(ordered: Floats, weights: Floats | None) -> _Sums:
    if weights is None:
        count = np.broadcast_to(np.arange(ordered.shape[1] + 1, dtype=np.float64), (len(ordered), ordered.shape[1] + 1))
        return _Sums(count, _prefix(ordered), _prefix(ordered * ordered))
    product = weights * ordered
    return _Sums(_prefix(weights), _prefix(product), _prefix(product * ordered))


def _prefix(values: Floats) -> Floats:
    sums = np.zeros((len(values), values.shape[1] + 1))
    np.cumsum(values, 1, out=sums[:, 1:])
    return sums


def _places(ordered: Floats, count: int) -> Indices:
    """Where runs may end at first, ascending: [rows, m], from 0 to n."""
    rows, size = ordered.shape
    if size <= count:
        return np.tile(np.arange(size + 1), (rows, 1))
    counts = np.linspace(0, size, count // 2 + 1).astype(np.int64)
    found = []
    for row in ordered:
        widths = np.searchsorted(row, np.linspace(row[0], row[-1], count // 2)[1:-1])
        found.append(np.sort(np.concatenate([counts, widths])))
    return np.stack(found)


def _optimal_cuts(sums: _Sums, clusters: int) -> Indices:
    """The best cut of every row into at most so many runs: indices of the places, [rows, clusters + 1]."""
    rows, size = sums.weight.shape
    base = np.arange(rows)[:, None] * size
    flat = _Sums(*(item.ravel() for item in sums))
    best = _cost(flat, base, base + np.arange(size))
    choices = []
    for _ in range(clusters - 1):
        best, choice = _one_run_more(flat, best, base)
        choices.append(choice)
    cuts = np.zeros((rows, clusters + 1), np.int64)
    cuts[:, -1] = size - 1
    for index, choice in zip(range(clusters - 1, 0, -1), reversed(choices), strict=True):
        cuts[:, index] = choice[np.arange(rows), cuts[:, index + 1]]
    return cuts


def _one_run_more(sums: _Sums, best: Floats, base: Indices) -> tuple[Floats, NDArray[np.int32]]:
    """One layer of the dynamic programme, for all rows: the new costs, and where the last run begins."""
    rows, size = best.shape
    before = best.ravel()
    costs, choice = np.zeros_like(best), np.zeros((rows, size), np.int32)
    step = 1 << max(0, (size - 1).bit_length() - 1)
    while step and size > 1:
        ends = np.arange(step, size, 2 * step)
        low = choice[:, ends - step].astype(np.int64)
        right = ends + step
        high = np.where(right < size, choice[:, np.minimum(right, size - 1)], ends)
        counts = (high - low + 1).ravel()
        starts = np.cumsum(counts) - counts
        begin = np.arange(counts.sum()) - np.repeat(starts - (base + low).ravel(), counts)
        totals = before[begin] + _cost(sums, begin, np.repeat((base + ends).ravel(), counts))
        least = np.minimum.reduceat(totals, starts)
        hits = np.flatnonzero(totals == np.repeat(least, counts))
        first = hits[np.searchsorted(hits, starts)]
        costs[:, ends] = least.reshape(rows, -1)
        choice[:, ends] = begin[first].reshape(rows, -1) - base
        step //= 2
    return costs, choice


def _cost(sums: _Sums, begin: Indices, end: Indices) -> Floats:
    weight = sums.weight[end] - sums.weight[begin]
    first = sums.first[end] - sums.first[begin]
    spread = sums.second[end] - sums.second[begin] - first * first / np.where(weight > 0, weight, 1)
    return np.maximum(spread, 0)


def _refined(ordered: Floats, sums: _Sums, bounds: Indices) -> Indices:
    """Lloyd's iterations on the sorted values."""
    refined = bounds.copy()
    for row, line in enumerate(ordered):
        own = _Sums(*(item[row : row + 1] for item in sums))
        for _ in range(_ITERATIONS):
            means = _means(own.at(refined[row : row + 1]))[0]
            inner = np.searchsorted(line, (means[1:] + means[:-1]) / 2)
            if np.array_equal(inner, refined[row, 1:-1]):
                break
            refined[row, 1:-1] = inner
    return refined


def _means(bounded: _Sums) -> Floats:
    """The mean of each run; an empty run has that of the one before it, those in front that of the first."""
    weight, first = np.diff(bounded.weight), np.diff(bounded.first)
    means = np.where(weight > 0, first / np.where(weight > 0, weight, 1), -np.inf)
    means = np.maximum.accumulate(means, 1)
    least = np.where(np.isfinite(means), means, np.inf).min(1, keepdims=True)
    found: Floats = np.maximum(means, least)
    return found
