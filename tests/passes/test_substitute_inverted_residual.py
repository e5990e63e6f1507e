"""Inverted residuals for residual blocks: exact where a block is one, as far off as they say, and only for blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxopt
from fxopt.errors import PassError
from fxopt.frontends.capture import capture
from fxopt.manager import PassManager
from fxopt.nn import InvertedResidual
from fxopt.passes import PruneWeights, SubstituteInvertedResidual
from fxopt.passes import substitute_inverted_residual as module_of_the_pass
from fxopt.passes_base import Plan, Rewrite
from fxopt.testing import assert_pass, assert_skips

DOUBLE = torch.float64


def data(*shape: int, batches: int = 3, dtype: torch.dtype = DOUBLE) -> list[Tensor]:
    """Inputs that are not negative, like those behind a ReLU, whose channels and positions depend on each other."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(shape[1], shape[1], generator=generator, dtype=DOUBLE) / shape[1] ** 0.5
    found = []
    for _ in range(batches):
        x = torch.randn(*shape, generator=generator, dtype=DOUBLE)
        x = F.avg_pool2d(F.pad(x, (1, 1, 1, 1)), 3, 1) * 3
        found.append(F.relu((x.movedim(1, -1) @ mix + 0.5).movedim(-1, 1)).to(dtype).contiguous())
    return found


class Residual(nn.Module):
    """A ReLU over a sum, as in a ResNet."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.branch, self.shortcut = branch, shortcut or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.branch(x) + self.shortcut(x))


class Basic(nn.Module):
    """The basic block of a ResNet."""

    def __init__(self, channels: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.shortcut: nn.Module | None = None
        if stride > 1 or channels != out:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        y += x if self.shortcut is None else self.shortcut(x)
        return F.relu(y)


def settled(model: nn.Module, batches: Sequence[Tensor]) -> Any:
    """With the running statistics of these batches and some weights of norms, in evaluation mode."""
    for item in model.modules():
        if isinstance(item, nn.BatchNorm2d):
            item.momentum = None
            nn.init.uniform_(item.weight, 0.5, 1.5)
            nn.init.normal_(item.bias, 0, 0.5)
    model.train()
    with torch.no_grad():
        for x in batches:
            model(x)
    return model.eval()


def basic_net(dtype: torch.dtype = DOUBLE) -> tuple[nn.Sequential, list[Tensor]]:
    torch.manual_seed(0)
    batches = data(8, 8, 8, 8, dtype=dtype)
    net = nn.Sequential(
        Basic(8, 8), Basic(8, 16, 2), Basic(16, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)
    )
    return settled(net.to(dtype), batches), batches


LIMITS: dict[str, tuple[dict[str, Any], bool]] = {
    "plain": ({"padding": 1}, True),
    "bias": ({"padding": 1, "bias": True}, True),
    "folded": ({"padding": 1, "bias": True}, False),
    "same": ({"kernel_size": 5, "padding": "same"}, True),
    "oblong": ({"kernel_size": (3, 1), "padding": (1, 0)}, True),
    "dilation": ({"padding": (2, 4), "dilation": (2, 4)}, True),
    "stride": ({"padding": 1, "stride": 2}, True),
    "stride of one axis": ({"kernel_size": (5, 3), "padding": (2, 1), "stride": (1, 2), "bias": True}, False),
}


@pytest.mark.parametrize("name", LIMITS)
def test_a_block_that_is_an_inverted_residual_is_found_again(name: str) -> None:
    options, has_norms = LIMITS[name]
    torch.manual_seed(0)
    options = {"kernel_size": 3, "bias": False, **options}
    first, last = nn.Conv2d(6, 9, **options).double(), nn.Conv2d(9, 6, 1, bias=options["bias"])
    with torch.no_grad():
        directions, taps = torch.rand(9, 6, 1, 1, dtype=DOUBLE), torch.randn(9, 1, *first.kernel_size, dtype=DOUBLE)
        first.weight.copy_(directions * taps)
    layers: list[nn.Module] = [first, nn.BatchNorm2d(9), nn.ReLU(), last, nn.BatchNorm2d(6)]
    if not has_norms:
        layers = [first, nn.ReLU(), last]
    shortcut: nn.Module | None = None
    if "stride" in options:
        # of which nothing but the bias is left, as an inverted residual has no shortcut there
        shortcut = nn.Conv2d(6, 6, 1, options["stride"])
        nn.init.zeros_(shortcut.weight)
    batches = data(8, 6, 10, 9)
    model = settled(Residual(nn.Sequential(*layers), shortcut).double(), batches)
    program = fxopt.optimize(
        model,
        batches[0],
        [SubstituteInvertedResidual(expansion=1.5, steps=0)],
        calibration=batches,
        on_failure="raise",
    )
    (rewrite,) = program.report.passes[0].rewrites
    assert "of 9 channels" in rewrite.what
    assert rewrite.what.endswith("loses 0.00% of the outputs")
    assert [program.op(node) for node in program.nodes].count("conv2d") == 3
    for x in batches:
        torch.testing.assert_close(program.run(x)[0], model(x), rtol=0, atol=1e-8)
