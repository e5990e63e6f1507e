from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt.backend import Engine, FixedBatchWarning
from fxopt.compare import compare
from fxopt.errors import ArtifactError, BackendUnavailable, InputError
from fxopt.lowering import InductorBackend
from fxopt.lowering.inductor_legalize import legalize
from fxopt.program import BatchAxis, Program
from fxopt.registry import make_backend
from fxopt.target import Target
from tests.lowering.engines import saved
from tests.lowering.networks import Recurrent, TokenEncoder

# Each engine takes a C++ compiler a quarter of a minute: tests share them.

BACKEND = InductorBackend()
REASON = BACKEND.unavailable()
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
    pytest.mark.usefixtures("integers_everywhere"),
]


class Residual(nn.Module):
    """Convolutions around a sum, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        out: Tensor = self.head((self.second(self.first(x).relu()) + x).relu().mean((2, 3)))
        return out


class Everything(nn.Module):
    """Tokens with a mask, a sequence, and results that are inputs or weights."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.recurrent = TokenEncoder(), Recurrent()
        self.weight = nn.Parameter(torch.arange(1.0, 7.0).reshape(1, 6))

    def forward(self, tokens: Tensor, padding: Tensor, x: Tensor, unused: Tensor) -> dict[str, Tensor]:
        values, mean = self.encoder(tokens, padding)
        last, steps = self.recurrent(x)
        shared = {"input": x, "part": x[:, 0], "weight": self.weight, "rows": self.weight.expand(x.shape[0], 6)}
        return {"values": values, "mean": mean, "last": last, "steps": steps, **shared}

    @staticmethod
    def sample(batch: int) -> tuple[Tensor, ...]:
        x = torch.randn(batch, 7, 8, generator=torch.Generator().manual_seed(batch))
        return (*TokenEncoder.sample(batch), x, torch.zeros(batch))


@pytest.fixture(scope="module")
def network() -> tuple[Program, Engine]:
    torch.manual_seed(0)
    program = fxopt.capture(Residual().eval(), torch.randn(1, 3, 12, 12))
    return program, BACKEND.lower(program, dynamic_batch=True)


@pytest.fixture(scope="module")
def everything() -> tuple[Program, Engine]:
    torch.manual_seed(0)
    program = fxopt.capture(Everything().eval(), Everything.sample(2))
    return program, BACKEND.lower(program, dynamic_batch=True)


@pytest.mark.parametrize("size", [0, 1, 2, 5])
def test_one_engine_for_every_batch(network: tuple[Program, Engine], size: int) -> None:
    program, engine = network
    x = torch.randn(size, 3, 12, 12)
    (expected,), (actual,) = program.run(x), engine(x)
    assert actual.shape == (size, 10)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    info = engine.info()
    assert info["dynamic_batch"] is True
    assert info["notes"] == []
    assert info["bytes"] > 4 * sum(item.numel() for item in program.module.parameters())
    assert any("convolution" in layer["type"] for layer in info["layers"])
    assert {layer["precision"] for layer in info["layers"]} == {"floating"}


def test_tokens_masks_and_sequences(everything: tuple[Program, Engine]) -> None:
    program, engine = everything
    for size in (1, 2, 5):
        inputs = Everything.sample(size)
        assert compare(program.run(*inputs), engine(*inputs)).within(1e-5)


@pytest.mark.slow
def test_loaded_in_a_new_process_without_a_compiler(
    everything: tuple[Program, Engine],
    tmp_path: Path,
    new_process,  # type: ignore[no-untyped-def]
) -> None:
    program, engine = everything
    with torch.no_grad():
        for parameter in program.module.parameters():
            parameter.add_(1)  # which the engine does not see
    saved(program, engine, BACKEND, tmp_path / "out")
    examples = [Everything.sample(size) for size in (1, 4)]
    torch.save([(inputs, engine(*inputs)) for inputs in examples], tmp_path / "expected.pt")
    assert not compare(program.run(*examples[0]), engine(*examples[0])).within(0.01)
    with torch.no_grad():
        for parameter in program.module.parameters():
            parameter.sub_(1)
    source = f"""
import torch, fxopt
from fxopt.lowering import InductorBackend
from fxopt.lowering.inductor_legalize import legalize
print(InductorBackend().unavailable())
loaded = fxopt.load({str(tmp_path / "out")!r})
for inputs, expected in torch.load({str(tmp_path / "expected.pt")!r}):
    print(all(torch.equal(a, b) for a, b in zip(loaded.engine(*inputs), expected, strict=True)))
loaded.save({str(tmp_path / "again")!r})
print(loaded(*inputs).keys() == {{*"values mean last steps input part weight rows".split()}})
"""
    result = new_process.run(["-c", source], environment={"PATH": "", "CXX": ""})
    assert result.returncode == 0, result.stderr
    reason, *answers = result.stdout.splitlines()
    assert reason == "no C++ compiler: g++ not found; install it, or name another in CXX"
    assert answers == ["True"] * 3
    again = fxopt.load(tmp_path / "again")
    assert compare(engine(*examples[1]), again.engine(*examples[1])).within(0)


def test_a_package_for_another_processor_or_a_damaged_one_is_refused(
    network: tuple[Program, Engine], tmp_path: Path
) -> None:
    manifest = saved(*network, BACKEND, tmp_path / "out")
    facts = tmp_path / "out" / "engine.json"
    facts.write_text(json.dumps(json.loads(facts.read_text()) | {"instruction_set": "AVX1024"}))
    with pytest.raises(BackendUnavailable, match="the engine is for AVX1024, and this processor has"):
        BACKEND.load(tmp_path / "out", manifest)
    facts.write_text("{}")
    with pytest.raises(ArtifactError, match=r"engine\.json was not written by fxopt"):
        BACKEND.load(tmp_path / "out", manifest)
    facts.unlink()
    with pytest.raises(ArtifactError, match=r"engine\.json cannot be read"):
        BACKEND.load(tmp_path / "out", manifest)


@pytest.mark.slow
def test_integers_are_multiplied_as_integers(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    batches = [torch.randn(4, 3, 12, 12) for _ in range(2)]
    passes = ["fold_batch_norm", "quantize(round='nearest')"]
    program = fxopt.optimize(
        Residual().eval(), batches[0], passes, calibration=batches, backend=BACKEND, on_no_match="ignore"
    )
    capfd.readouterr()
    engine = BACKEND.lower(program, dynamic_batch=True)
    assert capfd.readouterr() == ("", "")
    layers = engine.info()["layers"]
    integers = [layer["type"] for layer in layers if layer["precision"] == "u8"]
    assert [name.split("_pointwise")[0] for name in integers] == ["_qconv", "_qconv", "_qconv", "_qlinear"]
    assert not [layer for layer in layers if re.search("convolution|addmm|mm_out", layer["type"])]
    assert engine.info()["notes"] == []
    for size in (1, 3):
        x = batches[1][:size]
        assert compare(program.run(x), engine(x)).within(0.05)
    loaded = BACKEND.load(tmp_path / "out", saved(program, engine, BACKEND, tmp_path / "out"))
    assert torch.equal(loaded(batches[1])[0], engine(batches[1])[0])
    assert loaded.info()["layers"] == layers


@pytest.mark.slow
def test_integers_of_one_channel() -> None:
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 1, 3), nn.ReLU(), nn.Conv2d(1, 4, 3))
    x = torch.randn(2, 1, 12, 12)
    program = fxopt.optimize(
        nn.Sequential(*layers).eval(), x, ["fold_batch_norm", "quantize"], calibration=[x], on_no_match="ignore"
    )
    engine = BACKEND.lower(program, dynamic_batch=True)
    assert [layer["precision"] for layer in engine.info()["layers"]].count("u8") == 3
    for size in (1, 2):
        assert compare(program.run(x[:size]), engine(x[:size])).within(0.02)
    legal = legalize(program)
    assert str(legal) != str(program)
    assert torch.equal(legal.run(x)[0], program.run(x)[0])


def test_what_stays_floating_is_noted() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 12, 12)
    passes = ["fold_batch_norm", "quantize(round='nearest')"]
    program = fxopt.optimize(Residual().eval(), x, passes, calibration=[x], on_no_match="ignore")
    notes = InductorBackend(freezing=False)._notes(program)
    assert notes == ["integers are computed with as floating numbers: freezing is off"]
    assert BACKEND.scheme(Target(instruction_set="AVX2")).pairs == "within_places"
    assert BACKEND.scheme(Target(instruction_set="AVX512 VNNI")).pairs is None


@pytest.mark.slow
def test_layers_that_quantize_as_they_run(tmp_path: Path, new_process) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    program = fxopt.optimize(Recurrent().eval(), torch.randn(2, 7, 8), ["quantize(mode='dynamic')"])
    engine = BACKEND.lower(program, dynamic_batch=True)
    x = torch.randn(3, 7, 8)
    assert compare(program.run(x), engine(x)).within(1e-6)
    assert "simulated by torch" in engine.info()["notes"][0]
    saved(program, engine, BACKEND, tmp_path / "out")
    torch.save((x, engine(x)[0]), tmp_path / "expected.pt")
    source = f"""
import torch, fxopt
x, expected = torch.load({str(tmp_path / "expected.pt")!r})
print(torch.equal(fxopt.load({str(tmp_path / "out")!r})(x)[0], expected))
"""
    assert new_process.code(source).strip() == "True"


@pytest.mark.parametrize("spec", ["quantize(mode='weight_only', weight_bits=4)", "cluster_weights(bits=4)"])
def test_weights_that_are_held_as_codes_become_plain(spec: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()
    program = fxopt.optimize(model, torch.randn(2, 64), [spec])
    legal = legalize(program)
    assert "they save no bytes" in BACKEND._notes(program)[0]
    assert not {"codebook_weight", "packed_weight"} & {legal.op(node) for node in legal.nodes}
    x = torch.randn(3, 64)
    assert torch.equal(legal.run(x)[0], program.run(x)[0])
    plain = fxopt.capture(model, torch.randn(2, 64))
    assert legalize(plain) is plain


@pytest.mark.slow
def test_bfloat16() -> None:
    torch.manual_seed(0)
    program = fxopt.optimize(Residual().eval(), torch.randn(2, 3, 12, 12), ["cast_precision(dtype='bfloat16')"])
    engine = BACKEND.lower(program, dynamic_batch=True)
    for size in (1, 3):
        x = torch.randn(size, 3, 12, 12)
        assert compare(program.run(x), engine(x)).within(0.03)


@pytest.mark.slow
def test_a_batch_that_cannot_be_dynamic_becomes_fixed_with_a_warning() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.ones(2, 3)

    program = fxopt.capture(Fixed().eval(), torch.randn(2, 3))
    program.batch = BatchAxis((0,), 2)  # capture sees that it is fixed; the backend must find out by itself
    with pytest.warns(FixedBatchWarning, match="the engine takes a fixed batch of 2: "):
        engine = BACKEND.lower(program, dynamic_batch=True)
    assert engine.info()["dynamic_batch"] is False
    assert "fixed batch of 2" in engine.info()["notes"][0]
    x = torch.randn(2, 3)
    assert torch.equal(engine(x)[0], x + 1)
    with pytest.raises(InputError, match=re.escape("expected shape [2, 3], got [3, 3]")):
        engine(torch.randn(3, 3))


@pytest.mark.parametrize("passes", [["default"], ["default", "quantize(round='nearest')"]])
def test_weights_of_linear_layers_are_frozen_for_integers_alone(passes: list[str]) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 9, 16)
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)).eval()
    program = fxopt.optimize(model, x, passes, calibration=[x], on_no_match="ignore")
    assert BACKEND._options(program)["freezing"] is (len(passes) == 2)
    engine = BACKEND.lower(program, dynamic_batch=True)
    assert compare(program.run(x), engine(x)).within(1e-3 if len(passes) == 1 else 0.02)


def test_options() -> None:
    everything = InductorBackend(mode="max-autotune", freezing=False)
    assert str(everything) == "inductor(mode='max-autotune', freezing=False)"
    assert make_backend(str(everything)) == everything
    program = fxopt.capture(Residual().eval(), torch.randn(2, 3, 12, 12))
    assert everything._options(program) == {
        "max_autotune": True,
        "coordinate_descent_tuning": True,
        "freezing": False,
        "cpp.dynamic_threads": True,
    }
    assert BACKEND._options(program)["freezing"] is True
    assert (
        InductorBackend(freezing=True)._options(fxopt.capture(nn.Linear(4, 4), torch.randn(2, 4)))["freezing"] is True
    )
    for options, name in [({"mode": "reduce-overhead"}, "mode"), ({"freezing": "yes"}, "freezing")]:
        with pytest.raises(ValueError, match=name):
            InductorBackend(**options)  # type: ignore[arg-type]
