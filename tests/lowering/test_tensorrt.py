from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from fxopt import artifact
from fxopt.analysis.shapes import TensorSpec
from fxopt.backend import Engine, check_inputs
from fxopt.compare import compare
from fxopt.errors import ArtifactError, BackendError, BackendUnavailable, InputError
from fxopt.integer_scheme import INT8
from fxopt.layer_times import LayerTimes
from fxopt.lowering import TensorrtBackend, TensorrtRtxBackend
from fxopt.lowering.onnx_lower import onnx_of
from fxopt.lowering.onnx_model import OnnxModel
from fxopt.lowering.tensorrt_device import no_gpu
from fxopt.lowering.tensorrt_layers import layers_in
from fxopt.passes import CastPrecision, PruneWeights, Quantize
from fxopt.program import Program
from fxopt.registry import make_backend
from fxopt.target import Target
from tests.lowering.engines import in_threads

BACKEND = TensorrtRtxBackend()
CUDA = torch.device("cuda", 0)
NO_GPU = no_gpu(CUDA)

pytestmark = pytest.mark.skipif(BACKEND.unavailable() is not None, reason=str(BACKEND.unavailable()))
without_gpu = pytest.mark.skipif(NO_GPU is None, reason="this machine has a GPU")


class Convolutional(nn.Module):
    """A convolution, a depthwise one, a residual sum, a concatenation, a pooling and linear layers with biases."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.point = nn.Conv2d(16, 16, 1)
        self.hidden = nn.Linear(32, 10)
        self.head = nn.Linear(10, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.first(x).relu()
        second = self.point(nn.functional.relu6(self.depthwise(first))) + first
        whole = torch.cat([first, second], 1)
        return self.head(self.hidden(nn.functional.max_pool2d(whole, 2).mean((2, 3))).relu())


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 12, batch_first=True, bidirectional=True)
        self.head = nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class Encoder(nn.Module):
    """Token numbers and a mask of booleans."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, ids: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        return self.encoder(self.embedding(ids), src_key_padding_mask=padding)


class Vision(nn.Module):
    """Patches, a class token, and a block of attention that is written out."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.norm, self.qkv, self.head = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(x.shape[0], -1, -1), tokens], 1)
        parts = self.qkv(self.norm(tokens)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(parts[0], parts[1], parts[2])
        return self.head((tokens + attended.transpose(1, 2).flatten(2))[:, 0])


def images(batch: int = 2, size: int = 16) -> tuple[torch.Tensor, ...]:
    return (torch.randn(batch, 3, size, size),)


def sentences(batch: int = 2) -> tuple[torch.Tensor, ...]:
    padding = torch.zeros(batch, 6, dtype=torch.bool)
    padding[:, 4:] = True
    return torch.randint(0, 50, (batch, 6)), padding


def program_of(model: nn.Module, inputs: tuple[torch.Tensor, ...], *passes: Any) -> Program:
    torch.manual_seed(0)
    return fxopt.optimize(
        model.eval(), inputs, [*passes], calibration=[inputs], backend=BACKEND, verify="structure", on_no_match="ignore"
    )


def lowered(model: nn.Module, inputs: tuple[torch.Tensor, ...], *passes: Any, backend: Any = BACKEND) -> Engine:
    return backend.lower(program_of(model, inputs, *passes), dynamic_batch=True)


def kinds(engine: Engine) -> Counter[tuple[str, str]]:
    return Counter((layer["type"], layer["precision"]) for layer in engine.info()["layers"])


INTEGERS = ("default", Quantize(round="nearest"))


@pytest.fixture(scope="module")
def integers() -> Program:
    torch.manual_seed(0)  # by as little as 8 bytes plans differ, and weights change their sizes
    return program_of(Convolutional(), images(), *INTEGERS)


@pytest.mark.parametrize(
    ("passes", "precision"),
    [
        ((), "float32"),
        ((CastPrecision(dtype="float16"),), "float16"),
        ((CastPrecision(dtype="bfloat16"),), "bfloat16"),
        (INTEGERS, "int8"),
    ],
)
def test_precision_is_that_of_the_program(passes: tuple[Any, ...], precision: str) -> None:
    engine = lowered(Convolutional(), images(), *passes)
    found = kinds(engine)
    assert found["convolution", precision] == 3
    assert found["matrix_multiply", precision] == 2
    info = engine.info()
    assert info["outputs"] == [{"name": "output", "dtype": "float32"}]
    assert info["ranges"] == {"batch": [1, 2, 32]}
    assert info["dynamic_batch"] is True
    assert {key: info[key] for key in ("backend", "device")} == {"backend": "tensorrt_rtx", "device": "cuda:0"}
    assert engine.device == CUDA
    assert engine.inputs[0].shape == (None, 3, 16, 16)


def test_integers_are_signed_symmetric_and_read_by_every_kernel(integers: Program) -> None:
    import tensorrt_rtx as trt

    from fxopt.runtime.tensorrt_plan import logger

    assert integers.scheme.activations == INT8
    builder = trt.Builder(logger(trt))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    model = onnx_of(integers, dynamic_batch=True, optimize=True).model
    assert trt.OnnxParser(network, logger(trt)).parse(model.as_one().SerializeToString())
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    held = {
        item.get_output(0).name: item.get_input(0).dtype for item in layers if item.type == trt.LayerType.DEQUANTIZE
    }
    kernels = [item for item in layers if item.type in (trt.LayerType.CONVOLUTION, trt.LayerType.MATRIX_MULTIPLY)]
    assert len(kernels) == 5
    for kernel in kernels:
        assert [held[kernel.get_input(index).name] for index in range(2)] == [trt.DataType.INT8] * 2
    # biases stay floating numbers: TensorRT dequantizes no 32-bit integers
    assert not any(tensor.dtype is torch.int32 for tensor in integers.module.buffers())


def test_the_scheme_is_that_of_a_gpu_whatever_the_target() -> None:
    for target in (Target(), Target(device="cuda"), Target(instruction_set="AVX2")):
        scheme = BACKEND.scheme(target)
        assert (scheme.activations, scheme.weights, scheme.pairs) == (INT8, INT8, None)
        assert not scheme.integer_biases
    assert TensorrtBackend().scheme(Target()) == BACKEND.scheme(Target())


@pytest.mark.parametrize(
    ("model", "inputs", "passes", "expected"),
    [
        (Recurrent(), (torch.randn(2, 5, 8),), (), ("recurrence", "float32")),
        (Recurrent(), (torch.randn(2, 5, 8),), (CastPrecision(dtype="float16"),), ("matrix_multiply", "float16")),
        (Encoder(), sentences(), INTEGERS, ("matrix_multiply", "int8")),
        (Encoder(), sentences(), (CastPrecision(dtype="float16"),), ("matrix_multiply", "float16")),
        (Vision(), images(), INTEGERS, ("matrix_multiply", "int8")),
    ],
    ids=["lstm", "lstm in float16", "encoder with integers", "encoder in float16", "attention with integers"],
)
def test_sequence_models(
    model: nn.Module, inputs: tuple[torch.Tensor, ...], passes: tuple[Any, ...], expected: tuple[str, str]
) -> None:
    engine = lowered(model, inputs, *passes)
    assert kinds(engine)[expected] >= 1
    assert [spec.dtype for spec in engine.inputs] == [tensor.dtype for tensor in inputs]
    assert engine.info()["dynamic_batch"] is True


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_alone_are_dequantized_in_convolutions_too(bits: int) -> None:
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 32))
    quantize = Quantize(mode="weight_only", weight_bits=bits, round="nearest")
    program = program_of(model, (torch.randn(2, 8, 6, 6),), quantize)
    engine = BACKEND.lower(program, dynamic_batch=True)
    assert kinds(engine)["dequantize", "float32"] == 2
    assert kinds(engine)["shuffle", f"int{bits}"] == 3  # two in a row for one of the weights


def test_mixed_inputs_and_outputs_and_an_input_that_nothing_reads() -> None:
    class Mixed(nn.Module):
        def forward(self, ids: torch.Tensor, flags: torch.Tensor, unused: torch.Tensor) -> dict[str, torch.Tensor]:
            values = ids.float() * flags
            return {"positive": values > 0, "largest": values.argmax(-1), "half": values.half(), "same": flags}

    inputs = torch.randint(0, 9, (2, 3)), torch.ones(2, 3, dtype=torch.bool), torch.randn(2, 5)
    engine = lowered(Mixed(), inputs)
    types = {item["name"]: item["dtype"] for item in engine.info()["outputs"]}
    assert types == {"positive": "bool", "largest": "int64", "half": "float16", "same": "bool"}


def test_types_that_tensorrt_would_convert_are_refused() -> None:
    class Wide(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2

    with pytest.raises(BackendError, match="input x is float64, which tensorrt_rtx does not take"):
        lowered(Wide(), (torch.randn(2, 3, dtype=torch.float64),))


def test_all_that_is_refused_is_named() -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)).eval()
    inputs = (torch.randn(2, 16),)
    program = fxopt.optimize(model, inputs, [Quantize(mode="dynamic")], verify="structure")
    with pytest.raises(BackendError, match="tensorrt_rtx does not take this program") as caught:
        BACKEND.lower(program, dynamic_batch=True)
    assert len(re.findall(r"\w+ \(DynamicQuantizeLinear\): ", str(caught.value))) == 2
    with pytest.raises(InputError, match="multiply signed ones"):
        program_of(model, inputs, Quantize(mode="dynamic"))
    hard = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Hardswish())
    with pytest.raises(BackendError, match=r"\(HardSwish\): .*Only FLOAT, HALF or INT8 input is supported"):
        lowered(hard, images(), CastPrecision(dtype="bfloat16"))


def test_what_cannot_be_built_says_why() -> None:
    small = TensorrtRtxBackend(workspace_bytes=10)
    with pytest.raises(BackendError, match=r"cannot build the engine: .*within workspace limit.*dynamic_batch=False"):
        lowered(Convolutional(), images(), backend=small)


def test_batch_sizes() -> None:
    model = nn.Linear(4, 2)
    engine = lowered(model, (torch.randn(3, 4),), backend=TensorrtRtxBackend(min_batch=2, opt_batch=4, max_batch=8))
    assert engine.info()["ranges"] == {"batch": [2, 4, 8]}
    assert engine.limits == {"batch": (2, 8)}
    for size in (0, 1, 9):
        with pytest.raises(InputError, match=f"input input: this engine takes a batch of 2 to 8, got {size}"):
            check_inputs(engine.inputs, torch.device("cpu"), [torch.randn(size, 4)], limits=engine.limits)
    large = lowered(model, (torch.randn(20, 4),))
    assert large.info()["ranges"] == {"batch": [1, 20, 40]}
    with pytest.raises(
        InputError, match="the example's batch of 20 must be one that the engine takes: it is for 1 to 8"
    ):
        lowered(model, (torch.randn(20, 4),), backend=TensorrtRtxBackend(opt_batch=4, max_batch=8))
    fixed = BACKEND.lower(program_of(model, (torch.randn(3, 4),)), dynamic_batch=False)
    assert fixed.limits == {}
    assert fixed.info()["ranges"] == {}
    assert fixed.inputs[0].shape == (3, 4)


def test_ranges_of_free_axes() -> None:
    class Joined(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return torch.relu(x) + y.mean((2, 3), keepdim=True)

    x = torch.randn(2, 3, 32, 48)
    axes = {"x": {2: "height", 3: "width"}, "y": {2: "height"}}
    ranges = (("height", 16, 32, 64), ("width", 48, 48, 480))
    backend = TensorrtRtxBackend(ranges=ranges, max_batch=4)
    assert make_backend(str(backend)) == backend

    def made(backend: TensorrtRtxBackend) -> Engine:
        return fxopt.compile(Joined().eval(), (x, x), backend=backend, dynamic_axes=axes).engine

    engine = made(backend)
    assert engine.info()["ranges"] == {"height": [16, 32, 64], "width": [48, 48, 480], "batch": [1, 2, 4]}
    assert engine.limits == {"height": (16, 64), "width": (48, 480), "batch": (1, 4)}
    cpu = torch.device("cpu")
    check_inputs(engine.inputs, cpu, [torch.randn(4, 3, 64, 480), torch.randn(4, 3, 64, 48)], limits=engine.limits)
    for shape, message in [
        ((1, 3, 8, 48), "input x: this engine takes a height of 16 to 64, got 8"),
        ((1, 3, 16, 40), "input x: this engine takes a width of 48 to 480, got 40"),
        ((5, 3, 16, 48), "input x: this engine takes a batch of 1 to 4, got 5"),
    ]:
        with pytest.raises(InputError, match=message):
            check_inputs(engine.inputs, cpu, [torch.randn(shape), torch.randn(1, 3, 32, 48)], limits=engine.limits)
    with pytest.raises(BackendError, match=r"none is given for width: write ranges=\(\('width', smallest, 48, largest"):
        made(TensorrtRtxBackend(ranges=ranges[:1]))
    with pytest.raises(InputError, match=r"the example's height of 32 must be one that the engine takes: .* 40 to 64"):
        made(TensorrtRtxBackend(ranges=(("height", 40, 40, 64), ranges[1])))
    with pytest.raises(InputError, match="ranges names depth, which dynamic_axes does not"):
        made(TensorrtRtxBackend(ranges=(*ranges, ("depth", 1, 2, 3))))


def test_options() -> None:
    assert str(BACKEND) == "tensorrt_rtx"
    rtx = TensorrtRtxBackend(max_batch=4, workspace_bytes=2**20, tf32=True, compute_capabilities=("8.6", "12.0"))
    assert make_backend(str(rtx)) == rtx
    assert rtx.tolerance > BACKEND.tolerance
    full = TensorrtBackend(timing_cache="t.cache", sparsity=False, version_compatible=True, optimization_level=5)
    assert make_backend(str(full)) == full
    bad: Any
    for bad, message in [
        ({"max_batch": 0}, "max_batch must be an integer of at least 1, not 0"),
        ({"min_batch": 8, "max_batch": 4}, r"must grow in this order, not \[8, 4\]"),
        ({"ranges": (("height", 64, 32, 128),)}, "ranges must be a tuple such as"),
        ({"ranges": ("height", 64, 32, 128)}, "ranges must be a tuple such as"),
        ({"tf32": 1}, "tf32 must be True or False, not 1"),
        ({"compute_capabilities": "8.6"}, r"must be a tuple such as \(\"8.6\", \"12.0\"\), or None, not '8.6'"),
        ({"compute_capabilities": ("sm86",)}, "must be a tuple such as"),
        ({"compute_capabilities": ("8.6", "8.6")}, "twice"),
    ]:
        with pytest.raises(ValueError, match=message):
            TensorrtRtxBackend(**bad)
    for bad, message in [
        ({"optimization_level": 6}, "optimization_level must be one of 0, 1, 2, 3, 4, 5, not 6"),
        ({"timing_cache": True}, "timing_cache must be the path of a file, or None, not True"),
        ({"hardware_compatible": "yes"}, "hardware_compatible must be True or False"),
    ]:
        with pytest.raises(ValueError, match=message):
            TensorrtBackend(**bad)


def test_kinds_of_gpus(integers: Program) -> None:
    kinds_of_gpus = ("8.6",), ("8.6", "12.0")
    engines = [
        TensorrtRtxBackend(compute_capabilities=each).lower(integers, dynamic_batch=True) for each in kinds_of_gpus
    ]
    one, two = (engine.info()["bytes"] for engine in engines)
    assert two > one
    with pytest.raises(InputError, match=r"has no compute capability 9\.9: it has 7\.5, 8\.0, 8\.6"):
        TensorrtRtxBackend(compute_capabilities=("9.9",)).lower(integers, dynamic_batch=True)


def test_sparse_layers_are_those_that_onnx_marks() -> None:
    inputs = (torch.randn(2, 16),)
    program = program_of(nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4)), inputs, PruneWeights(pattern="2:4"))
    model = onnx_of(program, dynamic_batch=True, optimize=True).model
    assert TensorrtBackend()._sparse_layers(model) == "0,1"
    assert TensorrtBackend(sparsity=False)._sparse_layers(model) == ""
    assert BACKEND._sparse_layers(model) == ""  # RTX has no such kernels: the flag leaves its plans as they are


def test_weights_beside_the_graph_give_the_same_plan(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = program_of(nn.Linear(64, 64), (torch.randn(2, 64),))
    BACKEND.lower(program, dynamic_batch=True).save(tmp_path)
    plan = (tmp_path / "engine.plan").read_bytes()
    save = OnnxModel.save
    monkeypatch.setattr(OnnxModel, "save", lambda model, folder: save(model, folder, one_file_below=1))
    BACKEND.lower(program, dynamic_batch=True).save(tmp_path)
    assert (tmp_path / "engine.plan").read_bytes() == plan


def test_lowering_is_silent_and_leaves_the_program_alone(integers: Program, capfd: pytest.CaptureFixture[str]) -> None:
    before = integers.text()
    BACKEND.lower(integers, dynamic_batch=True)
    assert capfd.readouterr() == ("", "")
    assert integers.text() == before


@without_gpu
def test_without_a_gpu_everything_but_running_works(tmp_path: Path, new_process: Any) -> None:
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU()), torch.randn(2, 4)
    compiled = fxopt.compile(model.eval(), x, passes=[], backend="tensorrt_rtx(max_batch=4)")
    assert f"the engine was not compared with the program: {NO_GPU}" in compiled.report.notes
    assert any(note.startswith("layers are those of the network that was parsed") for note in compiled.report.notes)
    assert compiled.engine.cannot_run() == NO_GPU
    with pytest.raises(BackendUnavailable, match=re.escape(f"tensorrt_rtx: the engine cannot run here: {NO_GPU}")):
        compiled(x)
    compiled.save(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["engine.plan", "manifest.json", "report.json"]
    loaded = json.loads(
        new_process.code(
            "import fxopt, json, torch\n"
            f"loaded = fxopt.load({str(tmp_path / 'out')!r})\n"
            "try:\n"
            "    loaded(torch.zeros(2, 4))\n"
            "except fxopt.BackendUnavailable as error:\n"
            "    said = str(error)\n"
            "engine = loaded.engine\n"
            "print(json.dumps([engine.info(), said, engine.limits, list(map(str, engine.inputs))]))\n"
        )
    )
    assert loaded[0] == compiled.engine.info()
    assert loaded[1] == f"tensorrt_rtx: the engine cannot run here: {NO_GPU}"
    assert loaded[2:] == [{"batch": [1, 4]}, ["input: float32[batch, 4]"]]
    again = fxopt.load(tmp_path / "out")
    again.save(tmp_path / "again")
    assert (tmp_path / "again/engine.plan").read_bytes() == (tmp_path / "out/engine.plan").read_bytes()


@without_gpu
def test_without_a_gpu_the_command_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fxopt.cli import main

    folder = str(tmp_path / "out")
    fxopt.compile(nn.Linear(4, 2).eval(), torch.randn(2, 4), passes=[], backend=BACKEND).save(folder)
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(["run", folder])
    assert caught.value.code == 2
    assert f"fxopt: error: the engine in {folder} cannot run here: {NO_GPU}" in capsys.readouterr().err


@without_gpu
def test_without_a_gpu_layers_are_not_measured() -> None:
    times = LayerTimes(BACKEND, Target())
    with pytest.raises(BackendUnavailable, match="tensorrt_rtx cannot measure layers here: it runs on an NVIDIA GPU"):
        times.ratio(nn.Linear(4, 4), nn.Linear(4, 4), TensorSpec((2, 4), torch.float32))
    with pytest.raises(BackendUnavailable, match=r"^tensorrt: "):
        LayerTimes(TensorrtBackend(), Target())


def test_auto_leaves_out_engines_for_another_device() -> None:
    compiled = fxopt.compile(
        nn.Linear(4, 2).eval(),
        torch.randn(2, 4),
        passes=[],
        backend="auto(candidates=('eager', 'tensorrt_rtx'), rounds=1)",
    )
    assert "auto: tensorrt_rtx is out: its engines run on cuda:0, and the target is cpu" in compiled.report.notes
    auto = make_backend("auto(candidates=('onnx', 'tensorrt_rtx'))")
    assert auto.scheme(Target()).integer_biases
    assert not auto.scheme(Target(device="cuda")).integer_biases


@without_gpu
def test_tensorrt_itself_needs_more_than_a_package() -> None:
    reason = TensorrtBackend().unavailable()
    assert reason is not None
    assert "pip install tensorrt" in reason or reason == NO_GPU
    with pytest.raises(BackendUnavailable, match=re.escape(f"tensorrt: {reason}")):
        fxopt.compile(nn.Linear(4, 2).eval(), torch.randn(2, 4), backend="tensorrt")


def test_a_manifest_that_lacks_something_is_refused(tmp_path: Path) -> None:
    program = program_of(nn.Linear(4, 2), (torch.randn(2, 4),))
    engine, target = BACKEND.lower(program, dynamic_batch=True), Target(device="cuda")
    artifact.write(
        tmp_path / "out",
        engine=engine,
        backend=BACKEND,
        signature=program.signature,
        report=program.report,
        target=target,
    )
    manifest = artifact.read(tmp_path / "out")
    assert BACKEND.load(tmp_path / "out", manifest).info() == engine.info()
    for wrong in (
        {"outputs": None},
        {"outputs": [{"name": "output", "dtype": "float33"}]},
        {"ranges": {"batch": [1, 2]}},
        {"ranges": None},
        {"backend": "tensorrt"},
    ):
        with pytest.raises(ArtifactError, match="does not describe an engine of tensorrt_rtx: save the engine again"):
            BACKEND.load(tmp_path / "out", replace(manifest, info={**manifest.info, **wrong}))
    with pytest.raises(ArtifactError, match="holds the engine and cannot be read"):
        BACKEND.load(tmp_path, manifest)


def test_the_inspector_is_understood() -> None:
    convolution = {
        "Name": "conv1 + relu1",
        "LayerType": "CaskConvolution",
        "Inputs": [{"Name": "x", "Format/Datatype": "Thirty-two wide channel vectorized row major Int8 format"}],
        "Outputs": [{"Name": "y", "Format/Datatype": "Row major linear FP32"}],
    }
    halved = {"Name": "gemm", "LayerType": "gemm", "Inputs": [{"Format/Datatype": "Half"}], "Outputs": []}
    unknown = {"Name": "shape", "LayerType": "NoOp", "Inputs": [{"Format/Datatype": "N/A due to dynamic shapes"}]}
    assert layers_in(json.dumps({"Layers": [convolution, halved, unknown, "only a name"]})) == [
        {"name": "conv1 + relu1", "type": "CaskConvolution", "precision": "int8"},
        {"name": "gemm", "type": "gemm", "precision": "float16"},
        {"name": "shape", "type": "NoOp", "precision": ""},
        {"name": "only a name", "type": "", "precision": ""},
    ]


# From here on what needs a GPU: none of it has run where there was none.


@pytest.fixture(params=[TensorrtBackend(), TensorrtRtxBackend()], ids=lambda backend: backend.name)
def running(request: pytest.FixtureRequest) -> Any:
    backend: Any = request.param
    reason = backend.unavailable() or NO_GPU
    if reason is not None:
        pytest.skip(reason)
    return backend


def on_gpu(tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.to(CUDA) for tensor in tensors)


def answers(engine: Engine, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(output.cpu() for output in engine(*on_gpu(inputs)))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("model", "inputs", "passes", "tolerance"),
    [
        (Convolutional(), images(), (), 1e-3),
        (Convolutional(), images(), (CastPrecision(dtype="float16"),), 1e-2),
        (Convolutional(), images(), INTEGERS, 0.2),
        (Recurrent(), (torch.randn(2, 5, 8),), (), 1e-3),
        (Encoder(), sentences(), (), 1e-3),
        (Vision(), images(), (), 1e-3),
    ],
    ids=["float32", "float16", "integers", "lstm", "encoder", "attention"],
)
def test_it_answers_like_the_program(
    running: Any,
    model: nn.Module,
    inputs: tuple[torch.Tensor, ...],
    passes: tuple[Any, ...],
    tolerance: float,
    tmp_path: Path,
) -> None:
    program = program_of(model, inputs, *passes)
    compiled = fxopt.compile(
        model.eval(), inputs, passes=list(passes), backend=running, calibration=[inputs], on_no_match="ignore"
    )
    assert compiled.engine.cannot_run() is None
    assert not any("not compared" in note or "parsed" in note for note in compiled.report.notes)
    compiled.save(tmp_path / "out")
    for engine in (compiled.engine, fxopt.load(tmp_path / "out").engine):
        for batch in (2, 5):
            given = program.inputs_with_batch(batch)
            assert compare(program.run(*given), answers(engine, given)).within(tolerance)


@pytest.mark.gpu
def test_free_axes_on_a_gpu(running: Any) -> None:
    backend = replace(running, ranges=(("height", 16, 32, 64),))
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), torch.randn(2, 3, 32, 24)
    engine = fxopt.compile(model, (x,), backend=backend, dynamic_axes={"input": {2: "height"}}).engine
    for shape in ((1, 3, 16, 24), (3, 3, 64, 24)):
        given = torch.randn(shape)
        with torch.no_grad():
            assert compare((model(given),), answers(engine, (given,))).within(1e-3)


@pytest.mark.gpu
def test_inputs_are_checked_and_need_not_be_contiguous(running: Any) -> None:
    program = program_of(nn.Linear(8, 4), (torch.randn(2, 8),))
    engine = running.lower(program, dynamic_batch=True)
    with pytest.raises(InputError, match="expected it on cuda:0, got cpu: move it first"):
        engine(torch.randn(2, 8))
    with pytest.raises(InputError, match="this engine takes a batch of 1 to 32, got 0"):
        engine(torch.randn(0, 8, device=CUDA))
    strided = torch.randn(8, 6).t()
    shifted = torch.randn(4, 8)[1:]  # its address is not one that TensorRT takes
    for x in (strided, shifted):
        on = x.to(CUDA) if x is strided else torch.randn(4, 8, device=CUDA)[1:]
        assert compare(program.run(on.cpu()), [output.cpu() for output in engine(on)]).within(1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_threads_and_streams_share_an_engine(running: Any, cuda_graph: bool) -> None:
    program = program_of(Convolutional(), images())
    engine = replace(running, cuda_graph=cuda_graph).lower(program, dynamic_batch=True)
    inputs = [images(size + 1) for size in range(4)]
    expected = [program.run(*given) for given in inputs]
    wrong: list[str] = []

    def work(index: int) -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(50):
                difference = compare(expected[index], answers(engine, inputs[index]))
                if not difference.within(1e-3):
                    wrong.append(str(difference))

    in_threads(work, 4)
    assert wrong == []


@pytest.mark.gpu
def test_results_of_a_replayed_graph_are_the_callers_own(running: Any) -> None:
    program = program_of(nn.Linear(8, 4), (torch.randn(2, 8),))
    engine = replace(running, cuda_graph=True).lower(program, dynamic_batch=True)
    first, second = torch.randn(2, 8), torch.randn(2, 8)
    (kept,) = engine(first.to(CUDA))
    engine(second.to(CUDA))
    assert compare(program.run(first), (kept.cpu(),)).within(1e-3)


@pytest.mark.gpu
def test_layers_are_those_that_run(running: Any) -> None:
    layers = running.lower(program_of(Convolutional(), images(), *INTEGERS), dynamic_batch=True).info()["layers"]
    assert any(layer["precision"] == "int8" for layer in layers)


@pytest.mark.gpu
def test_a_timing_cache_is_kept(tmp_path: Path) -> None:
    backend = TensorrtBackend(timing_cache=str(tmp_path / "timing.cache"), hardware_compatible=True)
    reason = backend.unavailable()
    if reason is not None:
        pytest.skip(reason)
    for _ in range(2):
        lowered(nn.Linear(8, 4), (torch.randn(2, 8),), backend=backend)
        assert (tmp_path / "timing.cache").stat().st_size > 0
