"""Layers are measured on the backend that the program is for, each shape once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxopt
from fxopt import BackendUnavailable, InputError
from fxopt.analysis.shapes import TensorSpec
from fxopt.layer_times import WORTH, LayerTimes, time_ratio
from fxopt.lowering import EagerBackend, OnnxBackend
from fxopt.target import Target
from tests.slow_backend import SlowBackend

ROWS = TensorSpec((4, 8), torch.float32)


def test_a_ratio_is_that_of_the_times() -> None:
    times = LayerTimes(SlowBackend(), Target())
    twice = times.ratio(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 2), nn.Linear(2, 8)), ROWS)
    assert 1.2 < twice < 2.5
    assert times.ratio(nn.Sequential(nn.Linear(8, 2), nn.Linear(2, 8)), nn.Linear(8, 8), ROWS) < WORTH


def test_layers_of_one_shape_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    lowered = []
    lower = SlowBackend.lower

    def counted(self: SlowBackend, program: fxopt.Program, *, dynamic_batch: bool) -> object:
        lowered.append(program.text())
        return lower(self, program, dynamic_batch=dynamic_batch)

    monkeypatch.setattr(SlowBackend, "lower", counted)
    times = LayerTimes(SlowBackend(), Target())
    one, other = nn.Linear(8, 8), nn.Linear(8, 8)
    assert times.ratio(one, nn.Linear(8, 8), ROWS) == times.ratio(other, nn.Linear(8, 8), ROWS)
    assert len(lowered) == 2
    times.ratio(one, nn.Linear(8, 8), ROWS._replace(shape=(2, 8)))
    times.ratio(one, nn.Linear(8, 8, bias=False), ROWS)
    assert len(lowered) == 6


@pytest.mark.parametrize("backend", [EagerBackend(), OnnxBackend()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_backend_can_be_asked(backend: fxopt.Backend, dtype: torch.dtype) -> None:
    layer = nn.Linear(8, 8).to(dtype)
    ratio = LayerTimes(backend, Target()).ratio(layer, layer, ROWS._replace(dtype=dtype))
    assert 0.01 < ratio < 100
    assert layer.training


def test_the_backend_of_a_program_must_be_known_and_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    program = fxopt.capture(nn.Linear(8, 8), torch.zeros(4, 8))
    with pytest.raises(InputError, match='pass backend=, such as backend="onnx"'):
        time_ratio(program, nn.Linear(8, 8), [nn.Linear(8, 8)], ROWS)
    monkeypatch.setattr(EagerBackend, "unavailable", lambda _: "not today")
    with pytest.raises(BackendUnavailable, match="eager: not today"):
        fxopt.optimize(nn.Linear(8, 8), torch.zeros(4, 8), [], backend="eager")
