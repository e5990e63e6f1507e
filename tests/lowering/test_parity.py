"""What engines are held to: in integers, to what a little noise on these moves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt import Program
from fxopt.backend import Engine
from fxopt.compare import Difference
from fxopt.lowering import OnnxBackend
from fxopt.parity import Expected, disagreement
from fxopt.passes import Quantize
from fxopt.target import Target
from fxopt.verify import Reference


class Scaled(Engine):
    """Answers as another engine does, the first output times a factor."""

    def __init__(self, engine: Engine, factor: float) -> None:
        self.inputs, self.limits = engine.inputs, engine.limits
        self._engine, self._factor = engine, factor

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        first, *others = self._engine(*inputs)
        return (self._factor * first, *others)

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
    calibration = [sample(32), sample(33)] if mode == "static" else None
    return fxopt.optimize(model.eval(), (sample(4),), ["default", Quantize(mode=mode)], calibration=calibration)


def held(program: Program) -> tuple[Callable[[float], str | None], Expected]:
    """What is said against ONNX Runtime's engine times a factor."""
    backend, expected = OnnxBackend(num_threads=1), Expected.of(program)
    engine = backend.lower(program, dynamic_batch=True)
    return lambda factor: disagreement(program, Scaled(engine, factor), backend, expected), expected


@pytest.mark.usefixtures("integers_everywhere")
def test_a_wrong_engine_of_integers_is_found_where_they_move_little() -> None:
    objection, _ = held(integers(calm(), images))
    assert objection(1.0) is None
    found = objection(0.9)
    assert found is not None
    assert "relative error 0.1" in found
    assert "noise on the program's integers makes that relative error 0.0" in found


@pytest.mark.usefixtures("integers_everywhere")
@pytest.mark.parametrize("mode", ["static", "dynamic", "weight_only"])
def test_an_engine_may_be_further_off_where_the_network_amplifies(mode: str) -> None:
    objection, expected = held(integers(Restless(), rows, mode))
    assert expected.moved[0][0].relative > 0.2
    for factor, right in ((1.0, True), (0.5, False), (0.0, False), (-1.0, False)):
        assert (objection(factor) is None) == right


def test_how_far_off() -> None:
    moved = Difference(1.0, 0.3, 20.0, 1.0)
    program = fxopt.capture(calm(), (images(4),))
    reference = Expected.of(program).reference
    (wanted,) = reference.outputs[0]
    noise = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(0))

    def objection(decibel: float, of_noise: float) -> str | None:
        expected = Expected(reference, ((moved._replace(sqnr_db=of_noise),),))
        off = noise * (wanted.norm() / noise.norm() * 10 ** (-decibel / 20))
        return expected.objection(0, [wanted + off], OnnxBackend())

    assert objection(15.0, 20.0) is None
    assert objection(13.0, 20.0) is not None
    # behind noise that leaves little an engine still has to answer something
    assert objection(4.0, 0.0) is None
    assert objection(2.0, 0.0) is not None
    # whatever noise does, rounding is allowed, and a shape is not
    assert objection(90.0, math.inf) is None
    found = Expected(reference, ((moved,),)).objection(0, [wanted[:1]], OnnxBackend())
    assert found is not None
    assert "has shape" in found


class Both(nn.Module):
    """Gives indices too, of which there is no noise to signal ratio, and draws random numbers."""

    def __init__(self, noise: float = 0.0) -> None:
        super().__init__()
        self.model, self.noise = Restless(), noise

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.model(x)
        if self.noise:
            y = y + self.noise * torch.randn_like(y)
        return y, y.argmax(1)


@pytest.mark.usefixtures("integers_everywhere")
def test_each_output_is_held_to_what_noise_does_to_it() -> None:
    objection, expected = held(integers(Both(), lambda count: rows(64 * count), "dynamic"))
    values, classes = expected.moved[0]
    assert classes.relative > 0.02
    assert values.sqnr_db > 3
    for factor, right in ((1.0, True), (0.1, False), (0.0, False), (-0.2, False)):
        assert (objection(factor) is None) == right


def test_classes_are_held_to_as_many() -> None:
    classes = torch.arange(100)
    reference = Reference(((classes,),), ((classes,),), 1e-4)
    expected = Expected(reference, ((Difference(1.0, 0.02, -math.inf, 0.98),),))
    for wrong, right in ((8, True), (9, False)):
        answer = classes.clone()
        answer[:wrong] += 1
        assert (expected.objection(0, [answer], OnnxBackend()) is None) == right


@pytest.mark.usefixtures("integers_everywhere")
def test_noise_does_not_disturb_what_a_model_draws() -> None:
    program = integers(Both(noise=0.2), lambda count: rows(16 * count))
    assert all(case[0].sqnr_db > 3 for case in Expected.of(program).moved)


@pytest.mark.usefixtures("integers_everywhere")
def test_integers_are_found_in_the_graph_of_what_was_captured_again() -> None:
    program = integers(Restless(), rows)
    again = fxopt.capture(program.module, (rows(4),))
    assert "quantized" not in again.properties
    objection, expected = held(again)
    assert expected.moved
    assert objection(1.0) is None


class Offset(nn.Module):
    """Layers that read numbers far from zero, which the range of integers holds nevertheless."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(10 + self.first(x).sigmoid())


def test_the_step_of_numbers_far_from_zero() -> None:
    objection, expected = held(integers(Offset(), rows, "dynamic"))
    # a step is 11 / 255, of which 0.02 are noise; a step of what the numbers span would leave 20 dB more
    assert 60 < expected.moved[0][0].sqnr_db < 80
    assert objection(1.0) is None


class Recurrent(nn.Module):
    """An LSTM, with states if they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 16, num_layers=2)

    def forward(self, x: Tensor, states: tuple[Tensor, Tensor] | None = None) -> Tensor:
        y, _ = self.lstm(x, states)
        return y


@pytest.mark.usefixtures("integers_everywhere")
@pytest.mark.parametrize("given", [False, True], ids=["zeros", "states"])
def test_an_lstm(given: bool) -> None:
    torch.manual_seed(0)
    x, state = torch.randn(5, 2, 8), torch.randn(2, 2, 16)
    inputs = (x, (state, state.clone())) if given else (x,)
    objection, expected = held(fxopt.optimize(Recurrent().eval(), inputs, ["quantize(mode='dynamic')"]))
    assert expected.moved
    assert objection(1.0) is None
    assert objection(0.9) is not None


def test_noise_is_the_same_each_time_and_leaves_the_program_alone() -> None:
    program = integers(Restless(), rows)
    text = program.text()
    assert Expected.of(program).moved == Expected.of(program).moved
    assert program.text() == text


def test_a_program_in_floating_point_is_held_to_rounding() -> None:
    objection, expected = held(fxopt.capture(calm(), (images(4),)))
    assert expected.moved == ()
    assert objection(1.0) is None
    assert objection(0.99) is not None


@pytest.mark.parametrize("backend", ["onnx", "auto(candidates=('onnx',), rounds=1)"])
def test_an_engine_for_another_processor_is_not_compared_here(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of eight bits, any two of them large: without VNNI sums of 16 bits saturate."""
    monkeypatch.setattr(Target, "detect", lambda device="cpu": Target(device=device, instruction_set="AVX2"))
    model = nn.Sequential(nn.Linear(64, 8))
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    x = torch.rand(4, 64)
    for instructions, compared in (("AVX512 VNNI", False), ("AVX2", True)):
        target = Target(instruction_set=instructions)
        passes = ["default", Quantize()]
        compiled = fxopt.compile(model, (x,), passes=passes, calibration=[x], backend=backend, target=target)
        why = "it is for AVX512 VNNI, and AVX2 adds up its integers in 16 bits"
        assert (f"the engine was not compared with the program: {why}" in compiled.report.notes) != compared
