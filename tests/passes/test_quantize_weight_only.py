"""quantize(mode="weight_only"): which weights become integers, what is lost, and what engines make of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt import Program
from fxopt.errors import InputError
from fxopt.packed_weight import PackedWeight
from fxopt.passes import Quantize
from fxopt.testing import assert_pass, assert_untouched, model_state
from tests.conftest import NewProcess
from tests.passes.test_quantize import kernels_of, sqnr


class Encoder(nn.Module):
    """A layer of an encoder, as in BERT, and a classifier without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(32, 4, 72, batch_first=True, dropout=0.0, activation="gelu")
        self.head = nn.Linear(32, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.layer(x))
        return out


class Rows(nn.Module):
    """Linear layers of rows, with activations between."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return out


class Convolutions(nn.Module):
    """With groups, a padding that repeats what is there, an axis less, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect")
        self.groups = nn.Conv2d(8, 8, 3, stride=2, groups=4)
        self.line = nn.Conv1d(8, 7, 3, bias=False)
        self.head = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.groups(torch.relu(self.first(x))))
        out: Tensor = self.head(self.line(x.flatten(2)).mean(2))
        return out


def encoder() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Encoder().eval(), torch.randn(2, 6, 32)


def convolutions() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Convolutions().eval(), torch.randn(2, 3, 9, 9)


def quantized(model: nn.Module, inputs: Tensor, **options: Any) -> Program:
    return fxopt.optimize(model, (inputs,), [Quantize(mode="weight_only", **options)])


def four_bit_sizes(path: Path) -> list[list[int]]:
    return [list(item.dims) for item in onnx.load(path).graph.initializer if item.data_type == onnx.TensorProto.INT4]


@pytest.mark.parametrize(("bits", "floor"), [(8, 38), (4, 17)])
def test_linear_layers_of_any_rank(bits: int, floor: float, tmp_path: Path, new_process: NewProcess) -> None:
    model, x = encoder()
    state = model_state(model)
    compiled = fxopt.compile(model, (x,), passes=[Quantize(mode="weight_only", weight_bits=bits)])  # type: ignore[arg-type]
    program = quantized(model, x, weight_bits=bits)
    assert_untouched(model, state)
    fresh = torch.randn(5, 6, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert sqnr(model(fresh), program.module(fresh)) > floor
        # the engine's kernel makes 8 bits, block by block, of what it reads
        assert sqnr(program.module(fresh), compiled(fresh)) > 36
    compiled.save(tmp_path / "engine")
    kinds = kernels_of(tmp_path / "engine" / "model.onnx")
    assert kinds.count("MatMulNBits") == 5
    assert "DequantizeLinear" not in kinds
    assert compiled.report.notes == []
    sizes = [[32, 96], [32, 32], [32, 72], [72, 32], [32, 3]] if bits == 4 else []
    assert sorted(four_bit_sizes(tmp_path / "engine" / "model.onnx")) == sorted(sizes)
    torch.save((fresh, compiled(fresh)), tmp_path / "answer.pt")
    code = "import fxopt, torch; x, y = torch.load({!r}); print(torch.equal(fxopt.load({!r})(x), y))"
    assert new_process.code(code.format(str(tmp_path / "answer.pt"), str(tmp_path / "engine"))) == "True\n"


@pytest.mark.parametrize("dynamic_batch", [True, False])
def test_rows_with_a_relu_between(dynamic_batch: bool, tmp_path: Path) -> None:
    model, x = Rows().eval(), torch.randn(2, 32)
    pass_ = Quantize(mode="weight_only", weight_bits=4)
    compiled = fxopt.compile(model, (x,), passes=[pass_], dynamic_batch=dynamic_batch)
    compiled.save(tmp_path / "engine")
    kinds = kernels_of(tmp_path / "engine" / "model.onnx")
    assert kinds.count("MatMulNBits") == 3
    assert not {"DequantizeLinear", "MatMul", "Gemm", "FusedGemm"} & set(kinds)
    with torch.no_grad():
        assert sqnr(quantized(model, x, weight_bits=4).module(x), compiled(x)) > 36


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_of_convolutions_are_computed_once(bits: Any, tmp_path: Path) -> None:
    model, x = convolutions()
    compiled = fxopt.compile(model, (x,), passes=[Quantize(mode="weight_only", weight_bits=bits)])
    program = quantized(model, x, weight_bits=bits)
    fresh = torch.randn(5, 3, 9, 9, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert sqnr(model(fresh), program.module(fresh)) > (15 if bits == 4 else 38)
        assert sqnr(program.module(fresh), compiled(fresh)) > 40
    compiled.save(tmp_path / "engine")
    kinds = kernels_of(tmp_path / "engine" / "model.onnx")
    # nothing is left of what made the weights, and kernels of the fast layout take them
    assert not {"DequantizeLinear", "Cast", "Mul"} & set(kinds)
    assert sum(kind in ("Conv", "FusedConv") for kind in kinds) == 3
    assert kinds.count("MatMulNBits") == 1
    sizes = [[7, 5], [18, 8], [24, 7], [27, 8]] if bits == 4 else []
    assert sorted(four_bit_sizes(tmp_path / "engine" / "model.onnx")) == sizes


def test_it_saves_and_loads_by_torch(tmp_path: Path, new_process: NewProcess) -> None:
    model, x = encoder()
    compiled = fxopt.compile(model, (x,), passes=[Quantize(mode="weight_only", weight_bits=4)], backend="eager")
    compiled.save(tmp_path / "engine")
    torch.save((x, compiled(x)), tmp_path / "answer.pt")
    code = "import fxopt, torch; x, y = torch.load({!r}); print(torch.equal(fxopt.load({!r})(x), y))"
    assert new_process.code(code.format(str(tmp_path / "answer.pt"), str(tmp_path / "engine"))) == "True\n"
    held = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() > 1)
    assert compiled.engine.info()["bytes"] < 0.75 * held + 4 * 500  # half a byte, a scale for 32 or less; norms, biases


def test_golden() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5, bias=False)).eval()
    result = assert_pass(
        Quantize(mode="weight_only", weight_bits=4, group_size=16),
        model,
        (torch.randn(2, 3, 4, 4),),
        rewrites=2,
        after="""
            %input_1 = input : f32[2, 3, 4, 4]
            %_0_bias = get_attr[0.bias] : f32[4]
            %_0 = packed_weight[0]() {[4, 3, 3, 3], bits=4} : f32[4, 3, 3, 3]
            %conv2d = conv2d(%input_1, %_0, %_0_bias, (1, 1), (0, 0), (1, 1), 1) : f32[2, 4, 2, 2]
            %_1 = relu[1](%conv2d) : f32[2, 4, 2, 2]
            %_2 = flatten[2](%_1) {start_dim=1, end_dim=-1} : f32[2, 16]
            %_3 = packed_weight[3]() {[5, 16], bits=4} : f32[5, 16]
            %linear = linear(%_2, %_3, None) : f32[2, 5]
            return (%linear,)
        """,
    )
    assert [rewrite.what for rewrite in result.report.passes[-1].rewrites] == [
        "4-bit weights of 0",
        "4-bit weights of 3",
    ]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("block", [None, 16])
def test_a_weight_is_off_by_half_a_step_at_most(bits: int, block: int | None) -> None:
    limit = 2 ** (bits - 1) - 1
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))  # the last block is shorter
    parts = weight.split(block or 40, 1)
    scale = torch.stack([part.abs().amax(1) for part in parts], 1) / limit
    places = scale.repeat_interleave(block or 40, 1)[:, :40]
    held = PackedWeight((weight / places).round().to(torch.int8), scale.squeeze(1), bits, block)
    assert bool(((held() - weight).abs() <= places / 2 * 1.0001).all())
    assert held.codes.nbytes == 6 * 40 * bits // 8
    assert held.scale.shape == (1 if block is None else 3, 6)


@pytest.mark.parametrize("shape", [(5, 7), (3, 3, 3), (1, 1)])
def test_four_bits_are_packed_and_unpacked(shape: tuple[int, ...]) -> None:
    codes = torch.randint(-8, 8, shape, generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    held = PackedWeight(codes, torch.ones(shape[0]), 4)
    assert torch.equal(held(), codes.float())
    assert held.codes.nbytes == -(-codes.numel() // 2)


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_of_so_few_values_lose_nothing(bits: Any) -> None:
    limit = 2 ** (bits - 1) - 1
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    for name in ("0", "2"):
        layer: Any = model.get_submodule(name)
        codes = torch.randint(-limit, limit + 1, layer.weight.shape)
        codes[:, ::16] = limit
        layer.weight.data = codes * 0.125
    x = torch.randn(3, 64)
    program = quantized(model, x, weight_bits=bits)
    held = {name: module() for name, module in program.module.named_children() if isinstance(module, PackedWeight)}
    assert {name: torch.equal(weight, model.get_submodule(name).weight) for name, weight in held.items()} == {
        "0": True,
        "2": True,
    }
    with torch.no_grad():
        assert sqnr(model(x), program.module(x)) > 110


def test_blocks_and_data_lose_less() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16)).eval()
    model[0].weight.data *= torch.logspace(-1, 0, 64)  # type: ignore[operator]
    rows = [torch.randn(256, 64) @ torch.randn(64, 64).triu() / 8 for _ in range(2)]
    found = {}
    for name, data, options in (
        ("whole", None, {"group_size": None}),
        ("blocks", None, {}),
        ("data", rows, {}),
        ("nearest", rows, {"round": "nearest"}),
    ):
        pass_ = Quantize(mode="weight_only", weight_bits=4, **options)  # type: ignore[arg-type]
        program = fxopt.optimize(model, (rows[0],), [pass_], calibration=data)
        with torch.no_grad():
            found[name] = sqnr(model(rows[0]), program.module(rows[0]))
    assert found["blocks"] > found["whole"] + 1
    assert found["data"] > found["nearest"] + 0.5
    assert found["data"] > found["blocks"] + 1


def test_layers_that_share_a_weight_go_on_sharing_it() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.one, self.two = nn.Linear(16, 16), nn.Linear(16, 16, bias=False)
            self.two.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.two(torch.relu(self.one(torch.relu(self.one(x)))))
            return out

    model, x = Tied().eval(), torch.randn(2, 16)
    program = quantized(model, x)
    assert sum(program.op(node) == "packed_weight" for node in program.nodes) == 1
    compiled = fxopt.compile(model, (x,), passes=[Quantize(mode="weight_only")])
    with torch.no_grad():
        assert sqnr(model(x), program.module(x)) > 35
        assert sqnr(model(x), compiled(x)) > 30


def test_what_is_left_alone() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.tied = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
            self.tied.weight = self.words.weight
            self.up, self.states = nn.ConvTranspose1d(4, 4, 3), nn.LSTM(4, 4, batch_first=True)
            self.ignored, self.head = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
            x = self.states(self.up(self.words(ids).transpose(1, 2)).transpose(1, 2))[0]
            return self.tied(x), self.head(self.ignored(x))

    torch.manual_seed(0)
    program = fxopt.optimize(
        Mixed().eval(), (torch.randint(0, 9, (2, 5)),), [Quantize(mode="weight_only", ignore=("ig*",))]
    )
    (report,) = program.report.passes
    assert [rewrite.node for rewrite in report.rewrites] == ["head"]
    assert {skip.node: skip.why for skip in report.skips} == {
        "words": "embedding holds its weights in float32 only",
        "tied": "embedding holds its weights in float32 only",
        "up": "conv_transpose1d holds its weights in float32 only",
        "states": "lstm holds its weights in float32 only",
        "ignored": "ignored",
    }


def test_no_layer_and_no_data_are_errors() -> None:
    with pytest.raises(InputError, match="finds no layer that could compute with integers: it has no convolution"):
        quantized(nn.Sequential(nn.ReLU()), torch.randn(2, 3))
    with pytest.raises(InputError, match=r"quantize\(round='gptq'\) looks at what layers read: pass calibration="):
        quantized(*encoder(), round="gptq")


def test_costs_and_what_may_follow() -> None:
    model, x = encoder()
    before, program = fxopt.capture(model, (x,)).cost(), quantized(model, x, weight_bits=4)
    after = program.cost()
    assert (after.params, after.macs) == (before.params, before.macs)
    assert after.bytes < 0.3 * before.bytes
    (report,) = fxopt.explain(program, passes=["cast_precision"])
    reasons = {skip.why for skip in report.skips if "linear" in skip.node}
    assert reasons == {"its weight is held as integers"}


def test_weights_and_biases_of_static_quantization_count_as_parameters() -> None:
    model, x = Rows().eval(), torch.randn(8, 32)
    program = fxopt.optimize(model, (x,), ["fold_batch_norm", "quantize"], calibration=[x], on_no_match="ignore")
    assert any(node.op == "call_module" and program.op(node) == "quantized_tensor" for node in program.nodes)
    assert program.cost().params == sum(parameter.numel() for parameter in model.parameters())


def test_only_static_quantization_asks_for_folded_norms() -> None:
    assert Quantize().requires == {"batch_norm_folded"}
    assert Quantize(mode="weight_only").requires == frozenset()
    assert Quantize.requires == {"batch_norm_folded"}


def test_a_plan_replays_on_another_checkpoint() -> None:
    model, x = encoder()
    (plan,) = fxopt.explain(model, (x,), [Quantize(mode="weight_only", weight_bits=4)])
    torch.manual_seed(5)
    other = fxopt.capture(Encoder().eval(), (x,))
    for rewrite in plan.rewrites:
        Quantize(mode="weight_only", weight_bits=4).apply(other, rewrite)
    assert sum(other.op(node) == "packed_weight" for node in other.nodes) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "half"}, "mode must be one of"),
        ({"group_size": 32}, "group_size is for mode='weight_only', and mode is 'static'"),
        ({"mode": "weight_only", "group_size": 24}, "group_size must be a power of two, 16 or more, None or 'auto'"),
        ({"mode": "weight_only", "group_size": True}, "group_size must be a power of two"),
        (
            {"mode": "weight_only", "observer": "mse"},
            "observer is for mode='static' and 'qat', and mode is 'weight_only'",
        ),
        (
            {"mode": "weight_only", "per_channel": False},
            "per_channel is for mode='static' and 'dynamic' and 'qat', and mode is 'weight_only'",
        ),
        ({"mode": "dynamic", "weight_bits": 4}, "weight_bits is for mode='static' and 'weight_only'"),
    ],
)
def test_options_that_the_mode_has_not_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Quantize(**options)
