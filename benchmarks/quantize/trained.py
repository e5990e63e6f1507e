"""The networks that are trained on Fashion-MNIST, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from benchmarks.fashion_mnist import trained, trained_mobilenet

__all__ = ["TRAINED"]

TRAINED: Mapping[str, Callable[[], nn.Module]] = {"resnet14": trained, "mobilenet": trained_mobilenet}
