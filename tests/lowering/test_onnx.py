from __future__ import annotations

import gc
import re
from pathlib import Path
from typing import Any, cast

import onnx
import onnxoptimizer
import onnxruntime
import pytest
import torch
from torch import nn
from torchvision.models import mobilenet_v3_small

import fxopt
from fxopt.backend import Engine, FixedBatchWarning
from fxopt.compare import compare
from fxopt.errors import BackendError, BackendUnavailable, InputError
from fxopt.lowering import OnnxBackend
from fxopt.lowering.onnx_model import MODEL_FILE
from fxopt.lowering.onnx_optimize import SAFE_PASSES
from fxopt.lowering.onnx_session import choose_providers
from fxopt.program import BatchAxis, Program
from fxopt.registry import make_backend

BACKEND = OnnxBackend(num_threads=1)


class Tiny(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.linear = nn.Linear(8, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


class Mixed(nn.Module):
    """Integers, booleans, an input that is returned, an output used twice, and an input that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)

    def forward(
        self, ids: torch.Tensor, mask: torch.Tensor, unused: torch.Tensor, *, scale: torch.Tensor
    ) -> dict[str, object]:
        values = self.embedding(ids) * mask.unsqueeze(-1) * scale.reshape(-1, 1, 1)
        return {"mask": mask, "output": values, "pair": (values.argmax(-1), values > 0)}


def lowered(model: nn.Module, inputs: object, *, dynamic_batch: bool = True) -> tuple[Program, Engine]:
    program = fxopt.capture(model.eval(), inputs)
    return program, BACKEND.lower(program, dynamic_batch=dynamic_batch)


def saved_graph(engine: Engine, folder: Path) -> onnx.ModelProto:
    engine.save(folder)
    return onnx.load_model(folder / MODEL_FILE)


def test_a_real_network_at_several_batch_sizes() -> None:
    torch.manual_seed(0)
    program, engine = lowered(mobilenet_v3_small(), torch.randn(1, 3, 64, 64))
    for size in (1, 2, 5):
        x = torch.randn(size, 3, 64, 64)
        assert compare(program.run(x), engine(x)).within(1e-5)
    info = engine.info()
    assert info["dynamic_batch"] is True
    assert info["notes"] == []
    assert info["threads"] == 1
    # the exporter folds batch norms, which takes a few thousand parameters away
    assert info["bytes"] > 3.9 * sum(parameter.numel() for parameter in program.module.parameters())


def test_an_example_batch_of_one_is_not_specialised() -> None:
    _, engine = lowered(Tiny(), torch.randn(1, 8))
    assert engine(torch.randn(7, 8))[0].shape == (7, 8)


def test_mixed_inputs_and_outputs(tmp_path: Path) -> None:
    ids, mask = torch.randint(0, 10, (2, 3)), torch.tensor([[True, False, True], [False, True, True]])
    inputs = {"ids": ids, "mask": mask, "unused": torch.randn(2, 5), "scale": torch.randn(2)}
    program, engine = lowered(Mixed(), inputs)
    for size in (2, 3):
        flat = program.inputs_with_batch(size)
        expected, actual = program.run(*flat), engine(*flat)
        assert [tensor.dtype for tensor in actual] == [torch.bool, torch.float32, torch.int64, torch.bool]
        assert compare(expected, actual).within(1e-6)
    graph = saved_graph(engine, tmp_path).graph
    assert [item.name for item in graph.input] == ["ids", "mask", "unused", "scale"]
    assert [item.name for item in graph.output] == ["mask_1", "output", "pair_0", "pair_1"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_float_types(dtype: torch.dtype) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5000).to(dtype))  # large enough to be kept outside the graph

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([x, self.weight.unsqueeze(0)], 0)

    program = fxopt.capture(Scaled(), torch.randn(2, 5000).to(dtype))
    engine = BACKEND.lower(program, dynamic_batch=False)
    (expected,), (actual,) = program.run(*program.example_inputs), engine(*program.example_inputs)
    assert actual.dtype is dtype
    assert torch.equal(actual, expected)


def test_scalars_and_no_elements() -> None:
    class Scale(nn.Module):
        def forward(self, x: torch.Tensor, factor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x * factor, factor + 1

    _, engine = lowered(Scale(), (torch.randn(2, 3), torch.tensor(2.5)))
    x = torch.randn(2, 3)
    product, scalar = engine(x, torch.tensor(4.0))
    assert torch.equal(product, x * 4)
    assert scalar.shape == ()
    assert scalar.item() == 5.0


def test_batches_that_differ_are_refused() -> None:
    class Add(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x + y

    _, engine = lowered(Add(), (torch.randn(2, 3), torch.randn(2, 3)))
    with pytest.raises(InputError, match="input y: expected batch 4 as the inputs before it, got 5"):
        engine(torch.randn(4, 3), torch.randn(5, 3))


def test_a_batch_that_cannot_be_dynamic_becomes_fixed_with_a_warning() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("offset", torch.randn(2, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.offset

    program = fxopt.capture(Fixed(), torch.randn(2, 3))
    program.batch = BatchAxis((0,), 2)  # capture sees that it is fixed; the backend must find out by itself
    with pytest.warns(FixedBatchWarning, match="fixed batch of 2: the exporter failed: .*static shape of 2"):
        engine = BACKEND.lower(program, dynamic_batch=True)
    assert engine.info()["dynamic_batch"] is False
    assert "fixed batch of 2" in engine.info()["notes"][0]
    assert compare(program.run(*program.example_inputs), engine(*program.example_inputs)).within(1e-6)
    with pytest.raises(InputError, match=re.escape("expected shape [2, 3], got [4, 3]")):
        engine(torch.randn(4, 3))


def test_a_fixed_batch_that_was_asked_for_does_not_warn() -> None:
    _, engine = lowered(Tiny(), torch.randn(2, 8), dynamic_batch=False)
    assert engine.info()["dynamic_batch"] is False
    assert engine.info()["notes"] == []
    with pytest.raises(InputError):
        engine(torch.randn(3, 8))


def test_each_call_has_outputs_of_its_own_that_outlive_the_engine() -> None:
    class Constant(nn.Module):
        """Returns a weight: a caller who writes into the output must not reach it."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.arange(3000.0))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.weight, x * 2

    program = fxopt.capture(Constant(), torch.randn(2, 3))
    engine = BACKEND.lower(program, dynamic_batch=False)
    x = torch.randn(2, 3)
    before = x.clone()
    weight, doubled = engine(x)
    weight.zero_()
    doubled.zero_()
    assert torch.equal(x, before)
    second = engine(x)
    del engine
    gc.collect()
    assert torch.equal(second[0], torch.arange(3000.0))
    assert torch.equal(second[1], x * 2)
    assert not doubled.any()


def test_training_the_program_does_not_change_the_engine(tmp_path: Path) -> None:
    program, engine = lowered(Tiny(width=600), torch.randn(2, 8))
    x = torch.randn(2, 8)
    (before,) = engine(x)
    with torch.no_grad():
        for parameter in program.module.parameters():
            parameter.zero_()
    assert torch.equal(engine(x)[0], before)
    session = onnxruntime.InferenceSession(saved_graph(engine, tmp_path).SerializeToString())
    assert compare((before,), (torch.from_numpy(session.run(None, {"x": x.numpy()})[0]),)).within(1e-6)


def test_the_optimizer_shortens_the_graph_and_keeps_the_answer() -> None:
    class Detour(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x.permute(0, 2, 1).permute(0, 2, 1) * 2).reshape(-1, 3, 4).transpose(1, 2).transpose(1, 2)

    program = fxopt.capture(Detour(), torch.randn(2, 3, 4))
    plain = OnnxBackend(num_threads=1, optimize=False).lower(program, dynamic_batch=True)
    optimized = BACKEND.lower(program, dynamic_batch=True)
    assert optimized.info()["nodes"] < plain.info()["nodes"]
    x = torch.randn(3, 3, 4)
    assert torch.equal(plain(x)[0], optimized(x)[0])


def test_every_optimizer_pass_that_we_name_exists() -> None:
    assert set(SAFE_PASSES) <= set(onnxoptimizer.get_available_passes())


def test_lowering_is_silent_and_leaves_no_paths(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    _, engine = lowered(Tiny(), torch.randn(2, 8))
    assert capfd.readouterr() == ("", "")
    engine.save(tmp_path)
    assert str(Path(__file__).parent).encode() not in (tmp_path / MODEL_FILE).read_bytes()


def test_what_cannot_be_exported_says_so() -> None:
    class Eigenvalues(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.eigvals(x)

    program = fxopt.capture(Eigenvalues(), torch.randn(2, 3, 3))
    with pytest.raises(BackendError, match="backend='eager' runs it without that") as caught:
        BACKEND.lower(program, dynamic_batch=False)
    assert caught.value.__cause__ is not None


def test_options() -> None:
    assert str(OnnxBackend(num_threads=2)) == "onnx(num_threads=2)"
    everything = OnnxBackend(num_threads=2, providers=("CPUExecutionProvider",), optimize=False)
    assert make_backend(str(everything)) == everything
    assert OnnxBackend().unavailable() is None
    with pytest.raises(ValueError, match="num_threads must be an integer of at least 1, or None, not 0"):
        OnnxBackend(num_threads=0)
    program = fxopt.capture(Tiny().eval(), torch.randn(2, 8))
    with pytest.raises(BackendUnavailable, match=r"has no QuantumExecutionProvider; it has .*CPUExecutionProvider"):
        OnnxBackend(providers=("QuantumExecutionProvider",)).lower(program, dynamic_batch=True)


def test_providers_have_options() -> None:
    backend = OnnxBackend(providers=(("CPUExecutionProvider", {"b": 1, "a": "x"}), "AzureExecutionProvider"))
    assert str(backend) == (
        "onnx(providers=(('CPUExecutionProvider', (('a', 'x'), ('b', 1))), 'AzureExecutionProvider'))"
    )
    assert make_backend(str(backend)) == backend
    assert make_backend("onnx(providers=[('CPUExecutionProvider', {'a': 'x', 'b': 1}), 'AzureExecutionProvider'])") == (
        backend
    )
    assert hash(backend) == hash(make_backend(str(backend)))
    cpu = torch.device("cpu")
    assert choose_providers((("CPUExecutionProvider", (("a", 1),)),), cpu) == [("CPUExecutionProvider", {"a": 1})]
    assert choose_providers(None, cpu) == ["CPUExecutionProvider"]
    for wrong, message in [
        ("CPUExecutionProvider", "write ('CPUExecutionProvider',) for this one alone"),
        (3, "providers must be a tuple of names, or None, not 3"),
        (("a", 3), "a provider is a name, or a pair of a name and its options, not 3"),
        ((("a", 3),), "the options of a must be plain values by name, not 3"),
        ((("a", {"b": [1]}),), "the options of a must be plain values by name"),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            OnnxBackend(providers=cast("Any", wrong))


def test_the_opset_is_what_was_asked_for() -> None:
    program = fxopt.capture(Tiny().eval(), torch.randn(2, 8))
    for opset in (18, 20, 24):
        engine = OnnxBackend(num_threads=1, opset=opset).lower(program, dynamic_batch=True)
        assert engine.info()["opset"] == {"ai.onnx": opset}
    with pytest.raises(ValueError, match="opset must be an integer of at least 18, or None, not 17"):
        OnnxBackend(opset=17)
    with pytest.raises(BackendError, match="opset 99 is newer than the installed onnx, which knows"):
        OnnxBackend(opset=99).lower(program, dynamic_batch=True)


def test_an_opset_that_cannot_say_the_program_is_refused() -> None:
    with pytest.raises(
        BackendError, match=r"opset 20 has no scales for blocks of a weight, .*: ask for 21, or for none"
    ):
        fxopt.compile(
            nn.Linear(64, 64).eval(),
            torch.randn(2, 64),
            passes="quantize(mode='weight_only', weight_bits=4)",
            backend=OnnxBackend(num_threads=1, opset=20),
        )


def test_the_layers_are_those_that_run() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 4))
    _, engine = lowered(model, torch.randn(2, 3, 8, 8))
    layers = engine.layers()
    assert all(set(layer) == {"name", "type", "precision"} for layer in layers)
    # the activation is part of the convolution
    assert not any("Relu" in layer["type"] for layer in layers)
    assert sum(layer["type"].endswith("Conv") for layer in layers) == 1
    assert layers[-1]["type"].endswith("Gemm")
    assert layers[-1]["precision"] == "float32"
    assert "layers" not in engine.info()  # they cost a session


@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 4, 6), (2, 3, 5, 4, 6)])
def test_attention_over_any_number_of_axes(shape: tuple[int, ...]) -> None:
    class Attention(nn.Module):
        def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(query, key, value, scale=0.3)

    inputs = tuple(torch.randn(2, *shape) for _ in range(3))
    compiled = fxopt.compile(Attention().eval(), inputs, passes=[])
    others = tuple(torch.randn(5, *shape) for _ in range(3))
    torch.testing.assert_close(compiled(*others), Attention()(*others), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("leading", [False, True], ids=["tokens only", "leading axes too"])
@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 5, 4, 6)])
def test_attention_over_any_number_of_axes_with_a_mask(shape: tuple[int, ...], leading: bool) -> None:
    class Masked(nn.Module):
        def forward(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            mask = query @ key.transpose(-2, -1) if leading else torch.eye(query.shape[-2])
            return nn.functional.scaled_dot_product_attention(query, key, key, attn_mask=mask)

    def inputs(batch: int) -> tuple[torch.Tensor, ...]:
        return tuple(torch.randn(batch, *shape) for _ in range(2))

    compiled = fxopt.compile(Masked().eval(), inputs(2), passes=[])
    others = inputs(5)
    torch.testing.assert_close(compiled(*others), Masked()(*others), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "pool",
    [
        nn.AvgPool1d(2, ceil_mode=True),
        nn.AvgPool1d(4, 3, 1, ceil_mode=True),
        nn.AvgPool2d(2, ceil_mode=True),
        nn.AvgPool2d((3, 2), 2, (1, 0)),
        nn.AvgPool2d(2, divisor_override=3),
        nn.AvgPool2d((3, 2), 2, (1, 0), divisor_override=5),
        nn.AvgPool3d(2, divisor_override=3),
    ],
    ids=str,
)
def test_averages_in_floating_point_and_of_integers(pool: nn.Module) -> None:
    axes = int(type(pool).__name__[-2])
    torch.manual_seed(0)
    convolution = getattr(nn, f"Conv{axes}d")
    model = nn.Sequential(convolution(8, 8, 3, padding=1), nn.ReLU(), pool, convolution(8, 4, 1)).eval()
    batches = [torch.randn(4, 8, *[7] * axes, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    with torch.no_grad():
        expected = model(batches[0])
    exact = fxopt.compile(model, (batches[0],), passes=[], backend=BACKEND)
    torch.testing.assert_close(exact(batches[0]), expected, rtol=1e-4, atol=1e-5)
    if getattr(pool, "ceil_mode", False) and pool.padding not in (0, (0,)):
        return  # ONNX Runtime's integer kernel divides otherwise, which parity finds
    integers = fxopt.compile(model, (batches[0],), passes=["default", "quantize"], backend=BACKEND, calibration=batches)
    assert compare((expected,), (integers(batches[0]),)).sqnr_db > 30


def test_an_average_that_onnx_does_not_have_is_refused() -> None:
    model = nn.Sequential(nn.AvgPool2d(2, ceil_mode=True, divisor_override=3))
    with pytest.raises(BackendError, match="no average pooling with divisor_override and ceil_mode"):
        fxopt.compile(model, (torch.randn(2, 3, 7, 7),), passes=[], backend=BACKEND)


def test_bounds_of_a_clamp_may_be_a_whole_number_and_one_that_is_not() -> None:
    class Clamped(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.clamp(0, 0.3)

    x = torch.randn(3, 8)
    assert torch.equal(fxopt.compile(Clamped(), (x,), passes=[])(x), x.clamp(0, 0.3))


@pytest.mark.parametrize("pass_", ["quantize", "quantize(mode='weight_only')", "cluster_weights"])
def test_an_input_that_is_handed_out_beside_integers(pass_: str) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Conv2d(8, 8, 3)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x, self.layer(x)

    x = torch.randn(2, 8, 6, 6)
    given, _ = fxopt.compile(Both().eval(), (x,), passes=["default", pass_], calibration=[x])(x)
    assert torch.equal(given, x)


def test_bounds_that_are_buffers_survive_two_clamps_in_a_row() -> None:
    class Clamped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, value in {"low": -1.0, "high": 1.0, "lower": -0.5, "higher": 0.7}.items():
                self.register_buffer(name, torch.tensor(value))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = torch.clamp(x, self.low, self.high)
            return torch.clamp(y, self.lower, self.higher), torch.clamp(y, self.low, self.higher)

    compiled = fxopt.compile(Clamped().eval(), torch.randn(2, 8), passes=[])
    x = torch.randn(3, 8)
    torch.testing.assert_close(compiled(x), Clamped()(x))


def test_numbers_that_numpy_does_not_have_are_bound_by_address() -> None:
    class Small(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return (x.float() * 2 + y).to(torch.bfloat16), y.t() + 1

    x, y = torch.randn(3, 4).to(torch.bfloat16), torch.randn(3, 4)
    program = fxopt.capture(Small(), (x, y))
    engine: Any = OnnxBackend().lower(program, dynamic_batch=False)
    assert not engine._in_arrays
    for given in ((x, y), (x.t().contiguous().t(), y.t().contiguous().t())):
        for expected, found in zip(Small()(*given), engine(*given), strict=True):
            assert found.dtype is expected.dtype
            torch.testing.assert_close(found, expected)
