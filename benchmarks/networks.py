"""The networks of the pass benchmarks: `torchvision:NAME`, `timm:NAME`, and small tricky ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

import fxopt
from benchmarks.errors import BenchmarkError
from benchmarks.numerics import randomise, seed


class Network(NamedTuple):
    """A model in evaluation mode with seeded random weights and statistics, and a batch for it."""

    name: str
    model: nn.Module
    inputs: tuple[Tensor, ...]


class SharedConvolution(nn.Module):
    """conv -> bn1 -> the same conv -> bn2."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.bn2 = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn2(self.conv(self.bn1(self.conv(x)).relu()))
        return y


class SharedNorm(nn.Module):
    """One batch norm after two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn(self.conv2(self.bn(self.conv1(x)).relu()))
        return y


class SecondUser(nn.Module):
    """The convolution's output is read by the batch norm and by an addition."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        z: Tensor = self.bn(y) + y
        return z


class NormFirst(nn.Module):
    """A batch norm before an unpadded convolution, and one before a padded one, where it cannot go in exactly."""

    def __init__(self) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(8)
        self.conv1 = nn.Conv2d(8, 8, 1)
        self.bn2 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv2(self.bn2(self.conv1(self.bn1(x)).relu()))
        return y


TRICKY: dict[str, Callable[[], nn.Module]] = {
    "shared-convolution": SharedConvolution,
    "shared-norm": SharedNorm,
    "second-user": SecondUser,
    "norm-first": NormFirst,
}


def load_network(name: str, *, size: int | None = None, batch: int = 1) -> Network:
    """Builds a network.

    Args:
        name: `torchvision:NAME`, `timm:NAME` or one of `TRICKY`.
        size: height and width of the input; None for the network's own.
        batch: batch size of the input.

    Raises:
        BenchmarkError: there is no such network.
    """
    torch.manual_seed(seed(name))
    library, _, model_name = name.partition(":")
    shape: tuple[int, ...]
    if name in TRICKY:
        model, shape = TRICKY[name](), (8, 32, 32)
    elif library in {"torchvision", "timm"} and model_name:
        from benchmarks.suites import load_suite

        try:
            model, (shape,) = load_suite(library).build(model_name)
        except (KeyError, ValueError, RuntimeError) as error:
            raise BenchmarkError(f"{name} cannot be built: {error}") from error
        if size is not None:
            shape = (*shape[:-2], size, size)
    else:
        raise BenchmarkError(f"no network {name!r}; there are torchvision:NAME, timm:NAME, {', '.join(TRICKY)}")
    generator = torch.Generator().manual_seed(seed(name))
    randomise(model.eval(), generator)
    return Network(name, model, (torch.randn(batch, *shape, generator=generator),))


def reestimated(model: nn.Module, calibration: Sequence[Tensor]) -> nn.Module:
    """A copy in evaluation mode whose batch norms have the statistics of these batches."""
    program = fxopt.optimize(
        model, calibration[0][:2], ["reestimate_batch_norm"], calibration=calibration, on_no_match="ignore"
    )
    return program.module.eval()
