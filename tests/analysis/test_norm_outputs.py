"""norm_outputs: the mean of channels behind a BatchNorm, against samples."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fxopt
from fxopt.analysis.norm_outputs import expected
from fxopt.passes import PruneChannels


class _Behind(nn.Module):
    """A layer that reads what `kind` makes of one or two norms."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.norms = nn.ModuleList(nn.BatchNorm2d(6) for _ in range(2))
        for norm in self.norms:
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
        self.prelu = nn.PReLU(6)
        self.pool = nn.AvgPool2d(2)
        self.conv = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.read(x))

    def read(self, x: Tensor) -> Tensor:
        a, b = (norm(x) for norm in self.norms)
        return {
            "norm": lambda: a,
            "relu": lambda: functional.relu(a),
            "silu": lambda: functional.silu(a) * 1.5 + 0.25,
            "pooled": lambda: self.pool(torch.clamp(a, 0.0, 6.0)),
            "sum": lambda: functional.relu(a + functional.gelu(b)),
            "prelu": lambda: self.prelu(a),
            "product": lambda: a * b,
            "max": lambda: functional.max_pool2d(a, 2),
            "none": lambda: functional.relu(x),
        }[self.kind]()


@pytest.mark.parametrize("kind", ["norm", "relu", "silu", "pooled", "sum"])
def test_mean_behind_a_norm(kind: str) -> None:
    model = _Behind(kind).eval()
    # both norms see what is independent and standard normal only one after the other: a sum takes its summands so
    x = torch.randn(64, 6, 32, 32)
    program = fxopt.capture(model, x[:2])
    found = expected(program, program.node("conv"), 6)
    assert found is not None
    a, b = (torch.randn(64, 6, 32, 32) for _ in range(2))
    with torch.no_grad():
        if kind == "sum":
            one, other = (norm(each) for norm, each in zip(model.norms, (a, b), strict=True))
            sampled = functional.relu(one + functional.gelu(other))
        else:
            sampled = model.read(a)
    torch.testing.assert_close(found.mean.float(), sampled.mean((0, 2, 3)), atol=0.06, rtol=0.0)


@pytest.mark.parametrize("kind", ["prelu", "product", "max", "none"])
def test_no_norm_tells(kind: str) -> None:
    program = fxopt.capture(_Behind(kind).eval(), torch.randn(2, 6, 8, 8))
    assert expected(program, program.node("conv"), 6) is None


def test_pruning_without_data_puts_the_mean_into_the_bias() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 8, 1, bias=False), nn.BatchNorm2d(8)
    )
    x = torch.randn(64, 3, 10, 10)
    for _ in range(60):
        model(x)
    with torch.no_grad():
        model[1].bias += 1.0
        model[3].weight.abs_()
    model.eval()
    noise = []
    for compensate in (True, False):
        program = fxopt.optimize(model, x, [PruneChannels(ratio=0.5, compensate=compensate)], on_failure="raise")
        error = program.report.passes[0].sqnr_db
        assert error is not None
        noise.append(error)
    assert noise[0] > noise[1] + 3
