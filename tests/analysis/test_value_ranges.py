from __future__ import annotations

import torch
from torch import nn

from fxopt.analysis.measurements import measured
from fxopt.analysis.value_ranges import value_ranges
from fxopt.frontends.capture import capture


class Masks(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (2 * x).masked_fill(x > 0, float("-inf"))


def test_the_largest_finite_magnitude_over_example_and_data() -> None:
    program = capture(Masks(), (torch.tensor([[1.0, -3.0]]),))
    assert measured(program, value_ranges) == {"x": 3.0, "mul": 6.0, "masked_fill": 6.0, "output": 6.0}
    program.calibration = [torch.tensor([[50.0, 1.0]]), torch.tensor([[-7.0, 1.0]])]
    found = value_ranges(program)
    assert (found["x"], found["mul"], found["masked_fill"]) == (50.0, 100.0, 14.0)
    assert "gt" not in found
