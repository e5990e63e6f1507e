"""One-dimensional k-means: optimal where it says so, close to it elsewhere."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from fxopt.kmeans import centroids, exact_up_to, inertia, nearest


def best_by_trying(values: Any, clusters: int, weights: Any) -> float:
    """The least inertia over all cuts of the sorted values into runs."""
    order = np.argsort(values)
    values, weights = values[order], weights[order]
    best = np.inf
    for cuts in itertools.combinations_with_replacement(range(len(values) + 1), clusters - 1):
        total = 0.0
        for begin, end in itertools.pairwise((0, *cuts, len(values))):
            if end > begin:
                run, heavy = values[begin:end], weights[begin:end]
                total += float(heavy @ np.square(run - np.average(run, weights=heavy)))
        best = min(best, total)
    return best


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("decimals", [1, 9])  # with one, values repeat
@pytest.mark.parametrize("clusters", [1, 2, 3, 5])
def test_few_values_are_clustered_optimally(clusters: int, decimals: int, weighted: bool) -> None:
    generator = np.random.default_rng(clusters)
    for size in range(1, 10):
        values = np.round(generator.standard_normal((3, size)), decimals) + 100
        weights = generator.random((3, size)) + 0.01 if weighted else np.ones((3, size))
        found = centroids(values, clusters, weights if weighted else None)
        for row in range(3):
            one = slice(row, row + 1)
            best = best_by_trying(values[row], clusters, weights[row])
            assert inertia(values[one], found[one], weights[one]) == pytest.approx(best, abs=1e-10)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_no_more_values_than_clusters_are_kept_exactly(dtype: Any) -> None:
    close = np.array([0.1, np.nextafter(dtype(0.1), dtype(1)), -7.0, 0.0, 1e6], dtype)
    values = np.tile(close, 400)[None]
    found = centroids(values, 8)
    assert found.shape == (1, 8)
    assert np.array_equal(np.take_along_axis(found, nearest(values, found), 1), values)


def test_many_values_come_close_to_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).laplace(size=(1, 3000))
    assert exact_up_to(1, 16) >= 3000
    best = inertia(values, centroids(values, 16))
    monkeypatch.setattr("fxopt.kmeans._MOST_PLACES", 100)
    assert exact_up_to(1, 16) == 100
    found = inertia(values, centroids(values, 16))
    assert best <= found <= 1.01 * best


def test_one_outlier_does_not_spoil_the_start() -> None:
    values = np.random.default_rng(0).standard_normal((1, 20_000))
    alone = inertia(values, centroids(values, 15))
    values[0, 0] = 1e4
    assert inertia(values, centroids(values, 16)) <= 1.02 * alone


def test_weights_move_centroids() -> None:
    values, weights = np.array([[0.0, 1.0, 10.0]]), np.array([[1.0, 3.0, 1.0]])
    assert centroids(values, 2, weights).tolist() == [[0.75, 10.0]]
    assert centroids(values, 2).tolist() == [[0.5, 10.0]]


def test_inertia_counts_weights() -> None:
    values = np.array([[0.0, 1.0, 10.0]])
    assert inertia(values, np.array([[0.0, 8.0]])) == 1 + 4
    assert inertia(values, np.array([[0.0, 8.0]]), np.array([[1.0, 2.0, 3.0]])) == 2 + 12
