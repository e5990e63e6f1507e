from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import fxopt
from fxopt.backend import Engine, FixedBatchWarning
from fxopt.compare import compare
from fxopt.errors import ArtifactError, BackendError, InputError
from fxopt.lowering import EagerBackend
from fxopt.lowering.eager_archive import load_archive
from fxopt.program import BatchAxis, Program
from tests.lowering.engines import saved

BACKEND = EagerBackend()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, ids: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.norm(self.embedding(ids).mean(1))
        return features, x.reshape(x.shape[0], -1) * 2


INPUTS = (torch.randint(0, 9, (2, 3)), torch.randn(2, 3, 2))


def lowered(model: nn.Module) -> tuple[Program, Engine]:
    program = fxopt.capture(model, INPUTS)
    return program, BACKEND.lower(program, dynamic_batch=True)


def test_it_answers_like_the_program() -> None:
    program, engine = lowered(Net().eval())
    inputs = program.inputs_with_batch(5)
    expected, actual = program.run(*inputs), engine(*inputs)
    assert all(torch.equal(left, right) for left, right in zip(expected, actual, strict=True))
    assert not any(tensor.requires_grad for tensor in actual)
    assert engine.info()["dynamic_batch"] is True
    with pytest.raises(InputError, match=re.escape("input x: expected shape [batch, 3, 2], got [5, 3, 3]")):
        engine(inputs[0], torch.randn(5, 3, 3))


def test_a_program_in_training_mode_trains() -> None:
    program, engine = lowered(Net().train())
    features, _ = engine(*program.inputs_with_batch(4))
    features.square().sum().backward()
    gradients = [parameter.grad for parameter in program.module.parameters()]
    assert len(gradients) == 3
    assert all(gradient is not None for gradient in gradients)


class Shares(nn.Module):
    """Gives its input, a view of it, a parameter, a view of a buffer, and something new."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("table", torch.arange(6.0))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x, x[:, 0], self.weight, self.table[1:4], x * self.weight


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("load", [False, True])
def test_results_share_no_memory_with_the_inputs_or_the_engine(tmp_path: Path, training: bool, load: bool) -> None:
    program = fxopt.capture(Shares().train(training), torch.randn(2, 3))
    engine = BACKEND.lower(program, dynamic_batch=True)
    if load:
        engine = BACKEND.load(tmp_path / "out", saved(program, engine, BACKEND, tmp_path / "out"))
    x = torch.randn(2, 3)
    expected = [x.clone(), x[:, 0].clone(), torch.ones(3), torch.tensor([1.0, 2.0, 3.0]), x.clone()]
    for _ in range(2):
        outputs = engine(x)
        for output, wanted in zip(outputs, expected, strict=True):
            assert torch.equal(output, wanted)
            with torch.no_grad():
                output.fill_(-7)


def test_a_result_that_is_a_parameter_still_trains_it() -> None:
    program = fxopt.capture(Shares().train(), torch.randn(2, 3))
    outputs = BACKEND.lower(program, dynamic_batch=True)(torch.randn(2, 3))
    outputs[2].sum().backward()
    (weight,) = program.module.parameters()
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.ones(3))


def test_results_that_are_new_are_not_copied() -> None:
    class Doubled(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            doubled = x * 2
            return doubled, doubled.flatten()

    engine = BACKEND.lower(fxopt.capture(Doubled().eval(), torch.randn(2, 3)), dynamic_batch=True)
    whole, flat = engine(torch.randn(2, 3))
    assert whole.data_ptr() == flat.data_ptr()


def test_an_error_of_any_class_is_a_backend_error() -> None:
    _, engine = lowered(Net().eval())
    with pytest.raises(BackendError, match="torch failed to run the program: IndexError: index out of range") as caught:
        engine(torch.full((2, 3), 9), INPUTS[1])
    assert isinstance(caught.value.__cause__, IndexError)


def test_saved_and_loaded_with_any_batch(tmp_path: Path) -> None:
    program, engine = lowered(Net().eval())
    manifest = saved(program, engine, BACKEND, tmp_path / "out")
    loaded = BACKEND.load(tmp_path / "out", manifest)
    inputs = program.inputs_with_batch(5)
    assert compare(engine(*inputs), loaded(*inputs)).within(1e-6)
    assert loaded.info()["dynamic_batch"] is True
    again = saved(program, loaded, BACKEND, tmp_path / "again")
    assert compare(engine(*inputs), BACKEND.load(tmp_path / "again", again)(*inputs)).within(1e-6)


def test_a_batch_that_cannot_be_saved_dynamic_is_saved_fixed_with_a_warning(tmp_path: Path) -> None:
    class Fixed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.ones(2, 3)

    program = fxopt.capture(Fixed().eval(), torch.randn(2, 3))
    program.batch = BatchAxis((0,), 2)
    engine = BACKEND.lower(program, dynamic_batch=True)
    with pytest.warns(FixedBatchWarning, match="saved with a fixed batch of 2"):
        manifest = saved(program, engine, BACKEND, tmp_path / "out")
    loaded = BACKEND.load(tmp_path / "out", manifest)
    assert loaded.info()["dynamic_batch"] is False
    assert "fixed batch of 2" in loaded.info()["notes"][0]
    with pytest.raises(InputError, match=re.escape("expected shape [2, 3], got [3, 3]")):
        loaded(torch.randn(3, 3))


class Trap:
    """Unpickling it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self.path,)


def test_an_archive_with_pickles_or_foreign_code_is_refused(tmp_path: Path) -> None:
    _, engine = lowered(Net().eval())
    engine.save(tmp_path)
    good = tmp_path / "model.pt2"
    load_archive(good)  # as saved it is accepted
    sprung = tmp_path / "sprung"
    pickled = io.BytesIO()
    torch.save({"x": Trap(sprung)}, pickled)

    def altered(change: Callable[[str, bytes], bytes]) -> Path:
        path = tmp_path / "bad" / "model.pt2"
        path.parent.mkdir(exist_ok=True)
        with zipfile.ZipFile(good) as source, zipfile.ZipFile(path, "w") as target:
            for name in source.namelist():
                target.writestr(name, change(name, source.read(name)))
        return path

    def use_pickle(name: str, data: bytes) -> bytes:
        if name.endswith("model_weights_config.json"):
            config = json.loads(data)
            next(iter(config["config"].values()))["use_pickle"] = True
            return json.dumps(config).encode()
        return pickled.getvalue() if name.endswith("weight_0") else data

    def operator(name: str, data: bytes) -> bytes:
        return data.replace(b"torch.ops.aten.embedding.default", b"torch.load") if name.endswith(".json") else data

    def expression(name: str, data: bytes) -> bytes:
        return re.sub(rb'"expr_str": "[^"]*"', b'"expr_str": "().__class__"', data) if "models/" in name else data

    def sample(name: str, data: bytes) -> bytes:
        return pickled.getvalue() if "sample_inputs" in name else data

    for change, message in [
        (use_pickle, "holds pickled data"),
        (operator, "holds the target 'torch.load'"),
        (expression, "holds the expr_str"),
        (sample, "pickled objects as sample inputs"),
    ]:
        with pytest.raises(ArtifactError, match=re.escape(message)):
            load_archive(altered(change))
    assert not sprung.exists()
    (tmp_path / "bad" / "model.pt2").write_bytes(b"nothing of the kind")
    with pytest.raises(ArtifactError, match=r"not a readable torch\.export archive"):
        load_archive(tmp_path / "bad" / "model.pt2")
