"""What engines are held to: in integers, to what a little noise on these moves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt import Program
from fxopt.backend import Engine
from fxopt.lowering import OnnxBackend
from fxopt.parity import Expected, disagreement
from fxopt.passes import Quantize


class Scaled(Engine):
    """Answers as another engine does, times a factor."""

    def __init__(self, engine: Engine, factor: float) -> None:
        self.inputs, self.limits = engine.inputs, engine.limits
        self._engine, self._factor = engine, factor

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(self._factor * output for output in self._engine(*inputs))

    def save(self, directory: Path) -> None:
        self._engine.save(directory)

    def info(self) -> Mapping[str, Any]:
        return self._engine.info()


def calm() -> nn.Module:
    """What it answers moves as far as what it reads."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10)]
    return nn.Sequential(*layers).eval()


class Restless(nn.Module):
    """Each layer trebles what its input moves (random networks beyond the edge of chaos do)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(8))
        for layer in self.layers:
            nn.init.normal_(layer.weight, std=4 / 8)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def images(count: int) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(count))


def rows(count: int) -> Tensor:
    return torch.randn(count, 64, generator=torch.Generator().manual_seed(count))


def integers(model: nn.Module, sample: Callable[[int], Tensor], mode: str = "static") -> Program:
    calibration = None if mode == "dynamic" else [sample(32), sample(33)]
    return fxopt.optimize(model.eval(), (sample(4),), ["default", Quantize(mode=mode)], calibration=calibration)


@pytest.mark.usefixtures("integers_everywhere")
def test_a_wrong_engine_of_integers_is_found_where_they_move_little() -> None:
    program, backend = integers(calm(), images), OnnxBackend()
    expected = Expected.of(program)
    engine = backend.lower(program, dynamic_batch=True)
    assert disagreement(program, engine, backend, expected) is None
    found = disagreement(program, Scaled(engine, 0.9), backend, expected)
    assert found is not None
    assert "relative error 0.1" in found


@pytest.mark.usefixtures("integers_everywhere")
@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_an_engine_may_be_further_off_where_the_network_amplifies(mode: str) -> None:
    program, backend = integers(Restless(), rows, mode), OnnxBackend()
    expected = Expected.of(program)
    moved = expected.moved
    assert moved is not None
    assert moved.relative > 0.2
    off = moved._replace(relative=3 * moved.relative, sqnr_db=moved.sqnr_db - 5)
    assert expected.allows(off, backend)
    assert not expected.allows(off._replace(sqnr_db=moved.sqnr_db - 7), backend)
    assert not expected.allows(off._replace(relative=5 * moved.relative), backend)
    engine = backend.lower(program, dynamic_batch=True)
    assert disagreement(program, engine, backend, expected) is None
    assert disagreement(program, Scaled(engine, -1.0), backend, expected) is not None


class Classes(nn.Module):
    """Gives indices, of which there is no noise to signal ratio."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Restless()

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).argmax(1)


@pytest.mark.usefixtures("integers_everywhere")
def test_a_few_classes_may_differ_where_noise_changes_some() -> None:
    program, backend = integers(Classes(), lambda count: rows(64 * count)), OnnxBackend()
    expected = Expected.of(program)
    assert expected.moved is not None
    assert expected.moved.relative > 0.02
    engine = backend.lower(program, dynamic_batch=True)
    assert disagreement(program, engine, backend, expected) is None
    assert disagreement(program, Scaled(engine, 2), backend, expected) is not None


def test_noise_is_the_same_each_time_and_leaves_the_program_alone() -> None:
    program = integers(Restless(), rows)
    text = program.text()
    assert Expected.of(program).moved == Expected.of(program).moved
    assert program.text() == text


def test_a_program_in_floating_point_is_held_to_rounding() -> None:
    expected = Expected.of(fxopt.capture(calm(), (images(4),)))
    assert (expected.tolerance, expected.moved) == (1e-4, None)
