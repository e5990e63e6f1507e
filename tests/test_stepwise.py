"""A run in steps: stops where it is told to, keeps what is needed and nothing else, and gives what a run gives."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxopt.analysis.liveness import unused_after
from fxopt.frontends.capture import capture
from fxopt.stepwise import StepwiseRun


class Twice(nn.Module):
    """A value that is needed again at the end, and a tensor of the model's own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.second(y.relu()) * self.scale + y


def test_it_stops_before_and_behind_nodes_and_keeps_what_is_needed() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4)
    program = capture(Twice().eval(), x)
    first, relu, second, *rest = (node.name for node in program.nodes if node.op not in ("placeholder", "get_attr"))
    with torch.no_grad():
        run = StepwiseRun(program, unused_after(program), [x])
        run.before(second)
        run.before(second)  # it stands there already
        assert {first, relu} <= set(run.values)
        assert run.argument(second) is run.values[relu]
        run.through(second)
        assert relu not in run.values
        assert first in run.values
        run.through(rest[-2])
        (wanted,) = program.run(x)
        torch.testing.assert_close(run.values[rest[-2]], wanted)
        assert first not in run.values


def test_a_value_that_is_given_replaces_that_of_a_node() -> None:
    x = torch.randn(3, 4)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    program = capture(model, x)
    first, relu, last = (node.name for node in program.nodes if node.op not in ("placeholder", "output"))
    with torch.no_grad():
        run = StepwiseRun(program, unused_after(program), [x])
        run.before(relu)
        run.give(torch.ones(3, 4))
        assert first not in run.values
        run.through(last)
        torch.testing.assert_close(run.values[last], model[2](torch.ones(3, 4)))
