"""A backend whose engines take a time that is known: what tests of `gate="time"` measure."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from fxopt import Program
from fxopt.backend import Engine
from fxopt.lowering import EagerBackend


class SlowEngine(Engine):
    """Answers as another engine does, and sleeps before."""

    def __init__(self, engine: Engine, seconds: float) -> None:
        self.inputs = engine.inputs
        self._engine = engine
        self._seconds = seconds

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        time.sleep(self._seconds)
        return self._engine(*inputs)

    def save(self, directory: Path) -> None:
        self._engine.save(directory)

    def info(self) -> Mapping[str, Any]:
        return self._engine.info()


@dataclass(frozen=True, kw_only=True)
class SlowBackend(EagerBackend):
    """Takes 3 ms for each layer, or for each 200,000 MACs of the example."""

    name: ClassVar[str] = "slow"

    by: str = "layers"

    def lower(self, program: Program, *, dynamic_batch: bool) -> Engine:
        layers = sum(program.module_of(node) is not None for node in program.nodes)
        amount = layers if self.by == "layers" else program.cost().macs / 200_000
        return SlowEngine(super().lower(program, dynamic_batch=dynamic_batch), 3e-3 * amount)
