from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxopt
from benchmarks.silenced import run_silenced
from fxopt.analysis.channel_rules import builtin_rules
from fxopt.analysis.channels import Channels, find_channels
from fxopt.program import Program
from fxopt.removal import remove_channels


class Normed(nn.Module):
    """A norm over the channels, between a layer that computes and one that reads them."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(3, 6, 1), norm, nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.norm(self.first(x)).relu())
        return y


class Last(nn.Module):
    """Applies a norm of the last axis to axis 1."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return y


def capture(model: nn.Module) -> Program:
    torch.manual_seed(0)
    model = model.double().eval()
    for tensor in model.parameters():
        nn.init.normal_(tensor)
    return fxopt.capture(model, (torch.randn(2, 3, 4, 4, dtype=torch.float64),))


def error(program: Program, channels: Channels, units: tuple[int, ...]) -> float:
    pruned = program.copy()
    remove_channels(pruned, channels, units)
    x = torch.randn(5, 3, 4, 4, dtype=torch.float64)
    (actual,), (expected,) = pruned.run(x), run_silenced(program, channels, units, (x,))
    return float((actual - expected).abs().max())


def test_it_is_the_program_with_zeros_for_the_weights_that_read_the_removed_channels() -> None:
    program = capture(nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 2, 1)))
    channels = find_channels(program)
    units = channels.groups[0].units
    x = torch.randn(5, 3, 4, 4, dtype=torch.float64)
    (found,) = run_silenced(program, channels, units[1:3], (x,))
    model = program.module
    with torch.no_grad():
        model.get_submodule("2").weight[:, 1:3] = 0.0
        torch.testing.assert_close(found, model(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "norm",
    [nn.BatchNorm2d(6), Last(nn.LayerNorm(6)), Last(nn.RMSNorm(6)), nn.GroupNorm(2, 6), nn.GroupNorm(6, 6)],
    ids=["batch", "layer", "rms", "group", "instance"],
)
def test_a_norm_hears_the_kept_channels_only(norm: nn.Module) -> None:
    program = capture(Normed(norm))
    channels = find_channels(program)
    units = channels.groups[0].units
    assert error(program, channels, units[1:2]) < 1e-12


def test_an_operator_that_mixes_channels_unnoticed_is_seen() -> None:
    program = capture(nn.Sequential(nn.Conv2d(3, 6, 1), nn.Softmax(1), nn.Conv2d(6, 2, 1)))
    rules = builtin_rules()
    channels = find_channels(program, rules={**rules, "softmax": rules["relu"]})
    assert error(program, channels, channels.groups[0].units[1:3]) > 1e-3
