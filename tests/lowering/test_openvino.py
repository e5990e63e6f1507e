from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models import resnet18

import fxopt
from fxopt.backend import Engine
from fxopt.compare import compare
from fxopt.errors import ArtifactError, BackendError, BackendUnavailable, InputError
from fxopt.integer_scheme import Scheme
from fxopt.lowering import OpenVinoBackend
from fxopt.program import Program
from fxopt.registry import make_backend
from fxopt.target import Target
from tests.lowering.engines import saved
from tests.lowering.networks import Recurrent, TokenEncoder

BACKEND = OpenVinoBackend(num_threads=1)
REASON = BACKEND.unavailable()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


class Tiny(nn.Module):
    """Gives the input back too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.second(self.first(x).relu()), x


def lowered(
    model: nn.Module, inputs: object, *, dynamic_batch: bool = True, backend: OpenVinoBackend = BACKEND
) -> tuple[Program, Engine]:
    program = fxopt.capture(model.eval(), inputs)
    return program, backend.lower(program, dynamic_batch=dynamic_batch)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return resnet18().eval()


def test_a_real_network_at_several_batch_sizes(network: nn.Module) -> None:
    program, engine = lowered(network, torch.randn(1, 3, 64, 64))
    for size in (1, 2, 5):
        x = torch.randn(size, 3, 64, 64)
        assert compare(program.run(x), engine(x)).within(1e-5)
    info = engine.info()
    assert info["dynamic_batch"] is True
    assert info["threads"] == 1
    assert info["notes"] == []
    assert info["bytes"] == pytest.approx(4 * sum(item.numel() for item in network.parameters()), rel=0.01)
    convolutions = [layer for layer in info["layers"] if layer["type"] == "Convolution"]
    assert len(convolutions) == 20
    assert {layer["precision"] for layer in convolutions} == {"f32"}


@pytest.mark.slow
def test_integers_are_multiplied_as_integers(network: nn.Module, tmp_path: Path) -> None:
    batches = [torch.randn(3, 3, 32, 32) for _ in range(2)]
    passes = ["fold_batch_norm", "quantize(round='nearest', observer='minmax', equalize='off', bias_correction=False)"]
    program = fxopt.optimize(network, batches[0][:1], passes, calibration=batches, backend=BACKEND, verify="structure")
    engine = BACKEND.lower(program, dynamic_batch=True)
    kernels = [layer for layer in engine.info()["layers"] if layer["type"] in ("Convolution", "FullyConnected")]
    assert len(kernels) == 21
    assert {layer["precision"] for layer in kernels} == {"u8"}
    assert engine.info()["bytes"] < 1.1 * sum(item.numel() for item in network.parameters())
    for size in (1, 3):
        x = batches[1][:size]
        assert compare(program.run(x), engine(x)).within(0.05)
    manifest = saved(program, engine, BACKEND, tmp_path / "out")
    loaded = BACKEND.load(tmp_path / "out", manifest)
    assert torch.equal(loaded(batches[1])[0], engine(batches[1])[0])
    assert loaded.info()["layers"] == engine.info()["layers"]


class ClassToken(nn.Module):
    """A patch embedding as vision transformers have it, and a token for each image."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        nn.init.normal_(self.patches.bias)
        self.token = nn.Parameter(torch.randn(1, 1, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        return torch.cat([self.token.expand(x.shape[0], -1, -1), tokens], 1)


def test_integers_keep_the_bias_where_the_batch_is_read_from_the_input() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, 16)
    program = fxopt.optimize(ClassToken().eval(), x, ["default", "quantize"], calibration=[(x,)], backend=BACKEND)
    engine = BACKEND.lower(program, dynamic_batch=True)
    for size in (2, 5):
        x = torch.randn(size, 3, 16, 16)
        assert compare(program.run(x), engine(x)).within(1e-2)


def test_integers_that_it_does_not_compile_may_be_left_in_floating_point() -> None:
    class Head(ClassToken):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(16, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(super().forward(x))

    torch.manual_seed(0)
    x, model = torch.randn(2, 3, 16, 16), Head().eval()
    with pytest.raises(BackendError, match="or ignore= of quantize, which leaves layers in floating point"):
        fxopt.compile(model, (x,), passes=["default", "quantize"], calibration=[(x,)], backend=BACKEND)
    engine = fxopt.compile(
        model, (x,), passes=["default", "quantize(ignore=('head',))"], calibration=[(x,)], backend=BACKEND
    )
    with torch.no_grad():
        assert compare([model(x)], [engine(x)]).sqnr_db > 30


def test_the_scheme_is_that_of_its_kernels() -> None:
    assert BACKEND.scheme(Target(instruction_set="AVX2")).pairs == "within_places"
    assert BACKEND.scheme(Target(instruction_set="AVX512 VNNI")).pairs is None
    assert Scheme.of(Target(instruction_set="AVX2")).pairs == "across_places"


def test_tokens_and_a_mask() -> None:
    torch.manual_seed(0)
    program, engine = lowered(TokenEncoder(), TokenEncoder.sample(2))
    for size in (1, 2, 5):
        inputs = TokenEncoder.sample(size)
        assert compare(program.run(*inputs), engine(*inputs)).within(1e-5)


@pytest.mark.parametrize("passes", [[], ["quantize(mode='dynamic')"]], ids=["float32", "dynamic"])
def test_a_sequence(passes: list[str]) -> None:
    torch.manual_seed(0)
    program = fxopt.optimize(Recurrent().eval(), torch.randn(2, 7, 8), passes)
    engine = BACKEND.lower(program, dynamic_batch=True)
    for size in (1, 2, 5):
        x = torch.randn(size, 7, 8)
        # integers that engines compute with as floating numbers are not rounded again on the way
        assert compare(program.run(x), engine(x)).within(0.05 if passes else 1e-5)
    notes = " ".join(engine.info()["notes"])
    assert ("quantized dynamically compute in floating point" in notes) == bool(passes)


@pytest.mark.parametrize("weight_bits", [8, 4])
def test_packed_weights_stay_packed(weight_bits: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()
    program = fxopt.optimize(model, torch.randn(2, 64), [f"quantize(mode='weight_only', weight_bits={weight_bits})"])
    engine = BACKEND.lower(program, dynamic_batch=True)
    x = torch.randn(3, 64)
    assert compare(program.run(x), engine(x)).within(1e-5)
    assert engine.info()["bytes"] < 2 * 64 * 64 * weight_bits / 8 + 4000
    layers = [layer for layer in engine.info()["layers"] if layer["type"] == "FullyConnected"]
    assert {layer["precision"] for layer in layers} == {f"i{weight_bits}"}


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_codes_in_parts_of_a_byte(bits: int) -> None:
    torch.manual_seed(0)
    program = fxopt.optimize(nn.Linear(64, 64).eval(), torch.randn(2, 64), [f"cluster_weights(bits={bits})"])
    engine = BACKEND.lower(program, dynamic_batch=True)
    x = torch.randn(3, 64)
    assert compare(program.run(x), engine(x)).within(1e-5)


@pytest.mark.parametrize(("dtype", "bar"), [(torch.float16, 3e-3), (torch.bfloat16, 3e-2), (torch.float64, 1e-6)])
def test_other_float_types_are_taken_and_given(dtype: torch.dtype, bar: float) -> None:
    program, engine = lowered(Tiny().to(dtype), torch.randn(2, 8).to(dtype))
    for size in (1, 3):
        x = torch.randn(size, 8).to(dtype)
        result, same = engine(x)
        assert result.dtype is dtype
        assert torch.equal(same, x)
        assert compare(program.run(x), (result, same)).within(bar)
    name = str(dtype).removeprefix("torch.")
    assert engine.info()["notes"] == [
        f"what is {name} in the program is computed in float32: OpenVINO's kernels go by the option precision"
    ]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_mixed_precision(dtype: str) -> None:
    torch.manual_seed(0)
    program = fxopt.optimize(TokenEncoder().eval(), TokenEncoder.sample(2), [f"cast_precision(dtype={dtype!r})"])
    engine = BACKEND.lower(program, dynamic_batch=True)
    inputs = TokenEncoder.sample(3)
    assert compare(program.run(*inputs), engine(*inputs)).within(0.05)


def test_a_precision_that_the_processor_has_not_is_refused() -> None:
    from fxopt.lowering.openvino_session import capabilities

    program = fxopt.capture(Tiny().eval(), torch.randn(2, 8))
    for precision, name in (("float32", "FP32"), ("bfloat16", "BF16"), ("float16", "FP16")):
        backend = OpenVinoBackend(precision=precision, num_threads=1)  # type: ignore[arg-type]
        if name in capabilities():
            assert compare(
                program.run(torch.ones(1, 8)), backend.lower(program, dynamic_batch=True)(torch.ones(1, 8))
            ).within(0.03)
        else:
            with pytest.raises(BackendUnavailable, match=f"this processor does not compute in {precision}"):
                backend.lower(program, dynamic_batch=True)


def test_integers_and_flags() -> None:
    class Counts(nn.Module):
        def forward(
            self, numbers: torch.Tensor, flags: torch.Tensor, unused: torch.Tensor, factor: torch.Tensor
        ) -> tuple[torch.Tensor, ...]:
            return numbers + 1, flags.logical_not(), numbers.to(torch.int32), factor * 2, flags

    numbers, flags = torch.tensor([[2**31 - 2, 3], [5, -(2**31)]]), torch.tensor([True, False])
    inputs = (numbers, flags, torch.randn(2, 3), torch.tensor(1.5))
    program, engine = lowered(Counts(), inputs)
    for expected, actual in zip(program.run(*inputs), engine(*inputs), strict=True):
        assert actual.dtype is expected.dtype
        assert torch.equal(actual, expected)
    for wrong in (2**31, -(2**31) - 1):
        with pytest.raises(InputError, match=f"input numbers: OpenVINO computes int64 in 32 bits, which {wrong} does"):
            engine(torch.full((2, 2), wrong), *inputs[1:])


def test_a_fixed_batch() -> None:
    program, engine = lowered(Tiny(), torch.randn(2, 8), dynamic_batch=False)
    assert engine.info()["dynamic_batch"] is False
    assert compare(program.run(*program.example_inputs), engine(*program.example_inputs)).within(1e-6)
    with pytest.raises(InputError, match=re.escape("expected shape [2, 8], got [3, 8]")):
        engine(torch.randn(3, 8))


def test_loaded_in_a_new_process(tmp_path: Path, new_process) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    inputs = TokenEncoder.sample(3)
    compiled = fxopt.compile(TokenEncoder().eval(), TokenEncoder.sample(2), passes=[], backend=BACKEND)
    compiled.save(tmp_path / "out")
    torch.save((inputs, compiled(*inputs)), tmp_path / "expected.pt")
    source = f"""
import sys, torch, fxopt
inputs, expected = torch.load({str(tmp_path / "expected.pt")!r})
loaded = fxopt.load({str(tmp_path / "out")!r})
print([torch.equal(a, b) for a, b in zip(loaded(*inputs), expected, strict=True)], "onnx" in sys.modules)
loaded.save({str(tmp_path / "again")!r})
"""
    assert new_process.code(source).strip() == "[True, True] False"
    again = fxopt.load(tmp_path / "again")
    assert torch.equal(again(*inputs)[0], compiled(*inputs)[0])


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    manifest = saved(*lowered(Tiny(), torch.randn(2, 8)), BACKEND, tmp_path / "out")
    (tmp_path / "model.xml").write_text("<net>")
    with pytest.raises(ArtifactError, match="not a readable OpenVINO model: OpenVINO cannot read the model"):
        BACKEND.load(tmp_path, manifest)


def test_options() -> None:
    everything = OpenVinoBackend(hint="throughput", num_threads=2, precision="bfloat16")
    assert str(everything) == "openvino(hint='throughput', num_threads=2, precision='bfloat16')"
    assert make_backend(str(everything)) == everything
    for options, message in [
        ({"hint": "speed"}, "hint"),
        ({"num_threads": 0}, "num_threads must be an integer of at least 1, or None, not 0"),
        ({"precision": "int8"}, "precision"),
    ]:
        with pytest.raises(ValueError, match=message):
            OpenVinoBackend(**options)  # type: ignore[arg-type]
    program = fxopt.capture(Tiny().eval(), torch.randn(2, 8))
    program.target = Target(device="cuda")
    with pytest.raises(BackendError, match="runs on the CPU, and the target is 'cuda'"):
        BACKEND.lower(program, dynamic_batch=True)


def test_an_operator_that_it_does_not_know_is_named() -> None:
    class Determinant(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.det(x)

    program = fxopt.capture(Determinant(), torch.randn(2, 3, 3))
    with pytest.raises(BackendError, match=r"OpenVINO cannot read the model: .*Det.*\. backend='onnx' may run it"):
        BACKEND.lower(program, dynamic_batch=False)


def test_blocks_that_do_not_fill_a_row_are_refused_with_what_does() -> None:
    model, x = nn.Sequential(nn.Linear(100, 8)).eval(), torch.randn(2, 100)
    advice = "0 has 100 inputs in blocks of 32, and OpenVINO takes whole blocks only: pass group_size=None to quantize"
    with pytest.raises(BackendError, match=advice):
        fxopt.compile(model, (x,), passes=["quantize(mode='weight_only', weight_bits=4)"], backend="openvino")
    options = "mode='weight_only', weight_bits=4, group_size=None"
    compiled = fxopt.compile(model, (x,), passes=[f"quantize({options})"], backend="openvino")
    assert compiled(x).shape == (2, 8)
