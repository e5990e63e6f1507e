"""What every engine does, whatever its backend: the files beside this one hold what is particular to each."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt.backend import Backend, Engine
from fxopt.compare import compare
from fxopt.errors import InputError
from fxopt.lowering import EagerBackend, InductorBackend, OnnxBackend, OpenVinoBackend
from fxopt.program import Program
from tests.lowering.engines import in_threads, saved

BACKENDS = (
    EagerBackend(),
    OnnxBackend(num_threads=1),
    OpenVinoBackend(num_threads=1),
    OpenVinoBackend(num_threads=2, hint="throughput"),
    InductorBackend(),
)


class Shares(nn.Module):
    """Gives something new, its input, a view of it, a weight, and the same for each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 5)
        self.weight = nn.Parameter(torch.arange(3000.0))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.second(self.first(x).relu()), x, x[:, 0], self.weight, self.weight[:3].expand(x.shape[0], 3)


@pytest.fixture(scope="module", params=BACKENDS, ids=str)
def lowered(request: pytest.FixtureRequest) -> tuple[Backend, Program, Engine]:
    backend: Backend = request.param
    reason = backend.unavailable()
    if reason is not None:
        pytest.skip(reason)
    torch.manual_seed(0)
    program = fxopt.capture(Shares().eval(), torch.randn(2, 8))
    return backend, program, backend.lower(program, dynamic_batch=True)


def test_every_batch_and_layout(lowered: tuple[Backend, Program, Engine]) -> None:
    _, program, engine = lowered
    strided = torch.randn(8, 6).t()[::2]
    assert not strided.is_contiguous()
    for x in (torch.randn(1, 8), torch.randn(2, 8), torch.randn(5, 8), strided, nn.Parameter(torch.randn(3, 8))):
        outputs = engine(x)
        assert compare(program.run(x), outputs).within(1e-6)
        assert not any(output.requires_grad for output in outputs)


def test_what_is_told_of_it(lowered: tuple[Backend, Program, Engine]) -> None:
    backend, _, engine = lowered
    info = engine.info()
    assert info["backend"] == backend.name
    assert info["version"]
    assert info["device"] == str(engine.device) == "cpu"
    assert info["dynamic_batch"] is engine.dynamic_batch is True
    assert info["bytes"] >= 4 * 3000
    assert list(map(str, engine.inputs)) == ["x: float32[batch, 8]"]
    assert engine.cannot_run() is None
    assert all({"name", "type", "precision"} <= layer.keys() for layer in engine.layers())


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((torch.randn(2, 8, dtype=torch.float64),), "input x: expected torch.float32 .*, got torch.float64"),
        ((torch.randn(2, 9),), re.escape("input x: expected shape [batch, 8], got [2, 9]")),
        ((torch.randn(2, 8, device="meta"),), "input x: expected it on cpu, got meta"),
        ((torch.randn(8),), re.escape("input x: expected shape [batch, 8], got [8]")),
        ((np.zeros((2, 8), dtype=np.float32),), "input x: expected a tensor .*, got ndarray"),
        ((torch.randn(2, 8), torch.randn(2, 8)), "got 2"),
        ((), re.escape("expected 1 inputs (x: float32[batch, 8]), got 0")),
    ],
)
def test_wrong_inputs_are_named(
    lowered: tuple[Backend, Program, Engine], inputs: tuple[Tensor, ...], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        lowered[2](*inputs)


def test_an_empty_batch_is_answered_or_refused(lowered: tuple[Backend, Program, Engine]) -> None:
    _, program, engine = lowered
    nothing = torch.randn(0, 8)
    if "batch" in engine.limits:
        with pytest.raises(InputError, match="input x: this engine takes a batch of 1 to "):
            engine(nothing)
    else:
        assert compare(program.run(nothing), engine(nothing)).within(0)


def test_threads_share_an_engine(lowered: tuple[Backend, Program, Engine]) -> None:
    _, program, engine = lowered
    inputs = [torch.randn(size, 8) for size in (1, 2, 3, 4)]
    expected = [program.run(x) for x in inputs]
    wrong: list[str] = []

    def work(index: int) -> None:
        for _ in range(100):
            difference = compare(expected[index], engine(inputs[index]))
            if not difference.within(1e-6):
                wrong.append(str(difference))

    in_threads(work, 4)
    assert wrong == []


def test_results_share_no_memory_with_the_inputs_or_the_engine(lowered: tuple[Backend, Program, Engine]) -> None:
    _, program, engine = lowered
    x = torch.randn(2, 8)
    before = x.clone()
    expected = [tensor.clone() for tensor in program.run(x)]
    for _ in range(2):
        outputs = engine(x)
        assert compare(expected, outputs).within(1e-6)
        for output in outputs:
            output.copy_(torch.full_like(output, -7))
        assert torch.equal(x, before)


def test_the_same_in_a_new_process(
    lowered: tuple[Backend, Program, Engine],
    tmp_path: Path,
    new_process,  # type: ignore[no-untyped-def]
) -> None:
    backend, program, engine = lowered
    saved(program, engine, backend, tmp_path / "out")
    examples = [(x, engine(x)) for x in (torch.randn(1, 8), torch.randn(4, 8))]
    torch.save(examples, tmp_path / "expected.pt")
    source = f"""
import torch, fxopt
loaded = fxopt.load({str(tmp_path / "out")!r})
for x, expected in torch.load({str(tmp_path / "expected.pt")!r}):
    print(*(torch.equal(a, b) for a, b in zip(loaded.engine(x), expected, strict=True)))
loaded.save({str(tmp_path / "again")!r})
"""
    assert new_process.code(source).split() == ["True"] * 10
    again = fxopt.load(tmp_path / "again")
    x, expected = examples[1]
    assert compare(expected, again.engine(x)).within(0)


def test_training_the_program_changes_the_eager_engine_alone(lowered: tuple[Backend, Program, Engine]) -> None:
    backend, program, engine = lowered
    x = torch.randn(2, 8)
    before = engine(x)
    with torch.no_grad():
        for parameter in program.module.parameters():
            parameter.add_(1)
    assert compare(before, engine(x)).within(1e-6) == (backend.name != "eager")
    with torch.no_grad():
        for parameter in program.module.parameters():
            parameter.sub_(1)
