"""The networks that are quantized, each with images to calibrate on and others to test on."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.fashion_mnist import images, trained
from benchmarks.networks import load_network, reestimated
from benchmarks.photographs import crops, efficientnet_lite0

__all__ = ["SUBJECTS", "Subject"]

CALIBRATION_PHOTOGRAPHS = ("astronaut", "coffee", "rocket", "retina", "hubble_deep_field")
TEST_PHOTOGRAPHS = ("chelsea", "astronaut", "coffee", "rocket")
BATCH = 16


@dataclass(frozen=True)
class Subject:
    """A network in evaluation mode with its images.

    Attributes:
        calibration: float32[N, C, H, W]; every method sees these and no others.
        test: float32[M, C, H, W].
        labels: classes of the test images, int64[M]; None where there are none.
        transformer: whether it is one, which NNCF wants to be told.
    """

    name: str
    model: nn.Module
    calibration: Tensor
    test: Tensor
    labels: Tensor | None = None
    transformer: bool = False

    def example(self) -> tuple[Tensor, ...]:
        """What the network is captured with: two images."""
        return (self.calibration[:2],)

    def batches(self) -> list[Tensor]:
        """The calibration images in batches."""
        return list(self.calibration.split(BATCH))


def _fashion(arguments: argparse.Namespace) -> Subject:
    seen = images("train").first(8 * arguments.crops)
    test = images("t10k").first(arguments.images)
    return Subject("resnet14", trained(), seen.pixels, test.pixels, test.labels)


def _photographed(name: str, model: nn.Module, arguments: argparse.Namespace, *, transformer: bool = False) -> Subject:
    seen = crops(CALIBRATION_PHOTOGRAPHS, arguments.crops, seed=0)
    test = crops(TEST_PHOTOGRAPHS, arguments.test_crops, seed=1)
    return Subject(name, model, seen, test, transformer=transformer)


def _random(name: str, *, transformer: bool = False) -> Callable[[argparse.Namespace], Subject]:
    """A network of torchvision with random weights, whose batch norms have the statistics of the photographs."""

    def make(arguments: argparse.Namespace) -> Subject:
        model = load_network(f"torchvision:{name}").model
        if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
            seen = crops(CALIBRATION_PHOTOGRAPHS, arguments.crops, seed=2)
            with torch.no_grad():
                # back into torchvision's own model: torch.export refuses the dynamic batch of a program's module
                model.load_state_dict(reestimated(model, list(seen.split(BATCH))).state_dict())
        return _photographed(name, model, arguments, transformer=transformer)

    return make


SUBJECTS: Mapping[str, Callable[[argparse.Namespace], Subject]] = {
    "resnet14": _fashion,
    "efficientnet_lite0": lambda arguments: _photographed("efficientnet_lite0", efficientnet_lite0(), arguments),
    "resnet50": _random("resnet50"),
    "mobilenet_v2": _random("mobilenet_v2"),
    "mobilenet_v3_large": _random("mobilenet_v3_large"),
    "vit_b_16": _random("vit_b_16", transformer=True),
    "convnext_tiny": _random("convnext_tiny", transformer=True),
}
"""How each is made from the options of the command, by name."""
