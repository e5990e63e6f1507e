"""What is left of a layer's input makes up for what goes: exactly where it can, and never for the worse."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt import Program
from fxopt.analysis.channels import find_channels
from fxopt.analysis.readers import readers
from fxopt.analysis.statistics import collect
from fxopt.compensation import compensate, kept_statistics
from fxopt.frontends.capture import capture
from fxopt.passes import PruneChannels
from fxopt.removal import remove_channels

DOUBLE = torch.float64


def captured(model: nn.Module, data: Iterable[torch.Tensor]) -> Program:
    batches = list(data)
    return capture(model.double().eval(), batches[0], calibration=batches)


def pruned(program: Program, count: int) -> Program:
    """Without the first channels of the first group, made up for."""
    result = program.copy()
    channels = find_channels(result)
    units = channels.groups[0].units[:count]
    statistics = collect(result, [reader.node.name for reader in readers(result, channels)])
    compensate(result, channels, units, statistics)
    remove_channels(result, channels, units)
    return result


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["linear", "conv", "transposed"])
def test_channels_that_follow_from_others_are_made_up_for(kind: str, bias: bool) -> None:
    torch.manual_seed(0)
    first: nn.Module
    second: nn.Module
    if kind == "linear":
        first, second = nn.Linear(4, 8), nn.Linear(8, 3, bias=bias)
        data = [torch.randn(500, 7, 4, dtype=DOUBLE) for _ in range(8)]
    else:
        layer = nn.Conv2d if kind == "conv" else nn.ConvTranspose2d
        first, second = nn.Conv2d(4, 8, 1), layer(8, 3, 3, bias=bias)
        data = [torch.randn(100, 4, 6, 6, dtype=DOUBLE) for _ in range(8)]
    with torch.no_grad():
        # of the eight channels only five are independent
        first.weight[:3] = torch.einsum("rk,k...->r...", torch.randn(3, 5) * 0.3, first.weight[3:])
        first.weight[3:7] = torch.eye(4).reshape(first.weight[3:7].shape)
        first.weight[7] = 0
    model = nn.Sequential(first, second)
    program = captured(model, data)
    result = pruned(program, 3)
    x = torch.randn(*data[0].shape, dtype=DOUBLE)
    # outputs at the border of a transposed convolution see fewer inputs than the bias stands for
    inner = (..., slice(2, -2), slice(2, -2)) if kind == "transposed" else (...,)
    expected, actual = program.run(x)[0][inner], result.run(x)[0][inner]
    error = (actual - expected).norm() / expected.norm()
    plain = program.copy()
    channels = find_channels(plain)
    remove_channels(plain, channels, channels.groups[0].units[:3])
    without = (plain.run(x)[0][inner] - expected).norm() / expected.norm()
    # what the ridge takes away from an exact answer
    assert error < 2e-3
    assert without > 0.05


def test_statistics_follow_a_removal() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 2, 1))
    program = captured(model, [torch.randn(4, 3, 8, 8, dtype=DOUBLE)])
    channels = find_channels(program)
    statistics = collect(program)
    units = channels.groups[0].units[2:5]
    left = remove_channels(program, channels, units)
    kept = kept_statistics(program, channels, units, statistics)
    assert {name: len(item.mean) for name, item in kept.items()} == {"_0": 3, "_1": 5, "_3": 5}
    assert torch.equal(kept["_3"].mean, statistics["_3"].mean[[0, 1, 5, 6, 7]])
    assert left.values["_2"].shape == (4, 5, 6, 6)


def test_the_pass_loses_less_with_data() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    ).eval()
    data = [torch.randn(16, 3, 10, 10) for _ in range(4)]
    noise = {}
    for name, calibration in {"with": data, "without": None}.items():
        program = fxopt.optimize(
            model, data[0], [PruneChannels(ratio=0.5, criterion="l2")], calibration=calibration, on_failure="raise"
        )
        (report,) = program.report.passes
        assert report.sqnr_db is not None
        noise[name] = report.sqnr_db
    unused = fxopt.optimize(
        model, data[0], [PruneChannels(ratio=0.5, criterion="l2", compensate=False)], calibration=data
    )
    assert noise["with"] > noise["without"] + 6
    assert unused.report.passes[0].sqnr_db == pytest.approx(noise["without"])


def test_a_bias_that_was_added_shrinks_with_its_layer() -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False)]
    data = [torch.randn(32, 4)]
    program = fxopt.optimize(
        nn.Sequential(*layers), data[0], [PruneChannels(ratio=0.5)], calibration=data, on_failure="raise"
    )
    shapes = {name: tuple(tensor.shape) for name, tensor in program.module.named_parameters()}
    assert shapes["2.bias"] == (4,)
    assert shapes["4.bias"] == (3,)


def test_a_batch_norm_takes_up_what_a_layer_without_bias_would_need_one_for() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8, momentum=None),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3, bias=False),
        nn.BatchNorm2d(6, momentum=None),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 5),
    )
    data = [torch.randn(16, 3, 10, 10) for _ in range(4)]
    for x in data:
        model(x)
    model.double().eval()
    data = [x.double() for x in data]
    names = [name for name, _ in model.named_parameters()]
    error = {}
    for calibration in (None, data):
        for made_up in (False, True):
            prune = PruneChannels(ratio=0.5, compensate=made_up)
            program = fxopt.optimize(model, data[0], [prune], calibration=calibration, on_failure="raise")
            assert [name for name, _ in program.module.named_parameters()] == names
            wanted, got = model(data[1]), program.module(data[1])
            # as its BatchNorm would have shown it: by the mean over the data
            error[calibration is None, made_up] = float((wanted - got).mean(0).abs().max().detach())
    assert error[True, True] < 0.5 * error[True, False]
    assert error[False, True] < 0.2 * error[False, False]


def test_biases_that_are_added_count_towards_the_budget() -> None:
    torch.manual_seed(0)
    layers = [layer for _ in range(6) for layer in (nn.Conv2d(8, 8, 1, bias=False), nn.ReLU())]
    model = nn.Sequential(*layers).eval()
    before = sum(item.numel() for item in model.parameters())
    data = [torch.randn(16, 8, 5, 5)]
    program = fxopt.optimize(model, data[0], [PruneChannels(params=0.5)], calibration=data, on_failure="raise")
    left = sum(item.numel() for item in program.module.parameters()) / before
    assert any(name.endswith("bias") for name, _ in program.module.named_parameters())
    # one channel of a layer is 4 % of the parameters
    assert left <= 0.51


def test_tied_weights_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
            self.head.weight = self.tokens.weight
            self.mixer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.tokens(x)
            return self.head(y + self.mixer(y))

    torch.manual_seed(0)
    model = Tied().eval()
    data = [torch.randint(0, 20, (32, 4)) for _ in range(3)]
    for calibration in (None, data):
        program = fxopt.optimize(
            model, data[0], [PruneChannels(ratio=0.5)], calibration=calibration, on_failure="raise"
        )
        assert program.module.tokens.weight is program.module.head.weight
        assert program.module.head.weight.shape == (20, 4)
        assert sum(item.numel() for item in program.module.parameters()) == 20 * 4 + 4 * 4 + 4
