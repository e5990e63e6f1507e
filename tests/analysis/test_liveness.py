"""How much calibration data is run at once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fxopt.analysis.liveness import unused_after, windows
from fxopt.frontends.capture import capture

DATA = [torch.rand(count, 3, 6, dtype=torch.float64) for count in (2, 2, 3, 2, 1)]
PROGRAM = capture(
    nn.Sequential(nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4), nn.ReLU(), nn.Conv1d(4, 2, 1)).double().eval(),
    DATA[0],
    calibration=DATA,
)


@pytest.mark.parametrize(
    ("samples", "sizes"),
    [(4, [[2, 2], [3], [2, 1]]), (5, [[2, 2], [3, 2], [1]]), (1, [[2], [2], [3], [2], [1]])],
)
def test_how_many_batches_go_into_a_window(samples: int, sizes: list[list[int]]) -> None:
    peak = (4 + 4) * 6 * 8  # bytes for a sample: input and output of BatchNorm
    found = [[len(inputs[0]) for inputs in window] for window in windows(PROGRAM, peak * samples)]
    assert found == sizes


def test_when_a_value_is_not_needed_any_more() -> None:
    found = {node.name: [item.name for item in over] for node, over in unused_after(PROGRAM).items()}
    assert found == {
        "input_1": [],
        "_0": ["input_1"],
        "_1": ["_0"],
        "_2": ["_1"],
        "_3": ["_2"],
        "output": ["_3", "output"],
    }
