"""The model suites of the coverage benchmark: which models, how each is built, and what it is fed."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from benchmarks.errors import BenchmarkError

SUITES = {
    "timm": "benchmarks.suites.timm:TimmSuite",
    "torchvision": "benchmarks.suites.torchvision:TorchvisionSuite",
}


class Entry(NamedTuple):
    """A model of a suite, known before it is built."""

    name: str
    kind: str
    params: int


class Case(NamedTuple):
    """A built model with the shapes of its tensor inputs without the batch axis, e.g. `((3, 224, 224),)`."""

    model: nn.Module
    shapes: tuple[tuple[int, ...], ...]


class Suite(ABC):
    """A list of models; made without arguments, in the parent and in every worker."""

    @abstractmethod
    def entries(self) -> Sequence[Entry]:
        """The models, in the order of the table."""

    @abstractmethod
    def build(self, name: str) -> Case:
        """Builds one model with its default random initialisation (no pretrained weights)."""


def load_suite(name: str) -> Suite:
    """The suite of this name, or the class `package.module:Class`.

    Raises:
        BenchmarkError: there is no such suite; the message lists those that exist.
    """
    path = SUITES.get(name, name)
    module_name, _, class_name = path.partition(":")
    if not class_name:
        raise BenchmarkError(f"no suite {name!r}; there are {', '.join(SUITES)} (or package.module:Class)")
    try:
        suite = getattr(importlib.import_module(module_name), class_name)()
    except (ImportError, AttributeError) as error:
        raise BenchmarkError(f"suite {name!r} cannot be loaded: {error}") from error
    if not isinstance(suite, Suite):
        raise BenchmarkError(f"{path} is not a benchmarks.suites.Suite")
    return suite
