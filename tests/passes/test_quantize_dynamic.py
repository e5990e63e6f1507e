"""quantize(mode="dynamic"): layers that find the range of what they read, simulated to the last digit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

import fxopt
from fxopt import Program
from fxopt.errors import InputError
from fxopt.integer_operators import DYNAMIC_LINEAR
from fxopt.passes import Quantize
from fxopt.target import Target
from fxopt.testing import assert_pass, assert_untouched, model_state
from tests.conftest import NewProcess
from tests.passes.test_quantize import kernels_of, sqnr
from tests.passes.test_quantize_weight_only import Encoder

DYNAMIC = Quantize(mode="dynamic")


class Sequence(nn.Module):
    """Two layers of an LSTM in both directions, and a linear layer of all that they give."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lstm = nn.LSTM(6, 8, 2, batch_first=True, bidirectional=True, **options)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        given, last = self.lstm(x, (hidden.transpose(0, 1), cell.transpose(0, 1)))
        return self.head(given), last[0].transpose(0, 1), last[1].transpose(0, 1)


class Gated(nn.Module):
    """A GRU of so many states that it gains, and a linear layer of all that it gives."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gru = nn.GRU(6, 256, batch_first=True, **options)
        self.head = nn.Linear(256 * (2 if self.gru.bidirectional else 1), 3)

    def forward(self, x: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        given, last = self.gru(x, None if hidden is None else hidden.transpose(0, 1))
        return self.head(given), last.transpose(0, 1)


def quantized(model: nn.Module, inputs: Any, **options: Any) -> Program:
    return fxopt.optimize(model, inputs, [Quantize(mode="dynamic")], **options)


def states(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    shapes = (batch, 5, 6), (batch, 4, 8), (batch, 4, 8)
    hidden = [torch.randn(shape, generator=generator) for shape in shapes]
    return hidden[0], hidden[1].tanh(), hidden[2]


def in_onnx(x: Tensor, codes: Tensor) -> Tensor:
    """What ONNX's operators give for the same integers, by its own evaluator."""
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        helper.make_node("MatMulInteger", ["q", "w", "z"], ["sums"]),
        helper.make_node("Cast", ["sums"], ["floats"], to=1),
        helper.make_node("Mul", ["floats", "s"], ["y"]),
    ]
    weight = onnx.numpy_helper.from_array(codes.numpy(), "w")
    inputs = [helper.make_tensor_value_info("x", 1, list(x.shape))]
    graph = helper.make_graph(nodes, "g", inputs, [helper.make_tensor_value_info("y", 1, None)], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    (found,) = ReferenceEvaluator(model).run(None, {"x": x.numpy()})
    return torch.from_numpy(np.asarray(found))


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(4, 20, generator=torch.Generator().manual_seed(0)),
        torch.rand(2, 3, 20, generator=torch.Generator().manual_seed(1)) + 5,
        -torch.rand(4, 20, generator=torch.Generator().manual_seed(2)),
        torch.linspace(-127.5, 127.5, 20).repeat(2, 1),  # halves
        torch.zeros(4, 20),
        torch.full((1, 20), 1e-3),
    ],
    ids=["both signs", "far from zero", "negative", "halves", "zeros", "one value"],
)
def test_it_quantizes_as_onnx_says(x: Tensor) -> None:
    codes = torch.randint(-127, 128, (20, 6), generator=torch.Generator().manual_seed(3), dtype=torch.int8)
    found = DYNAMIC_LINEAR(x, codes, torch.ones(6), None)
    torch.testing.assert_close(found, in_onnx(x, codes), rtol=1e-6, atol=1e-6)


def test_whole_numbers_lose_nothing() -> None:
    model = nn.Linear(12, 4)
    generator = torch.Generator().manual_seed(0)
    model.weight.data = torch.randint(-127, 128, (4, 12), generator=generator).float() / 8
    model.weight.data[:, 0] = 127 / 8
    x = torch.randint(0, 256, (3, 12), generator=generator).float()
    x[0, :2] = torch.tensor([0.0, 255.0])
    program = quantized(model, (x,), target=Target(device="cpu", instruction_set="AVX512 VNNI"))
    torch.testing.assert_close(program.module(x), model(x), rtol=1e-6, atol=1e-4)


def test_golden() -> None:
    torch.manual_seed(0)

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(6, 8, 2, batch_first=True)
            self.head = nn.Linear(8, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.lstm(x)[0])
            return out

    result = assert_pass(
        DYNAMIC,
        Small().eval(),
        (torch.randn(2, 5, 6),),
        rewrites=2,
        after="""
            %x = input : f32[2, 5, 6]
            %lstm = dynamic_lstm[lstm](%x) {6, 8, int8, num_layers=2, batch_first=True} : (f32[2, 5, 8], (f32[2, 2, 8], f32[2, 2, 8]))
            %getitem = getitem(%lstm, 0) : f32[2, 5, 8]
            %head = dynamic_linear[head](%getitem) {8, 3, int8, bias=False} : f32[2, 5, 3]
            return (%head,)
        """,  # noqa: E501 (the program's own line)
    )
    bits = result.scheme.weight_bits
    assert [rewrite.what for rewrite in result.report.passes[-1].rewrites] == [
        f"{bits}-bit weights of lstm, ranges as it runs",
        "8-bit weights of head, ranges as it runs",
    ]


def test_linear_layers_of_an_encoder(tmp_path: Path, new_process: NewProcess) -> None:
    torch.manual_seed(0)
    model, x = Encoder().eval(), torch.randn(2, 6, 32)
    state = model_state(model)
    compiled = fxopt.compile(model, (x,), passes=[DYNAMIC])
    program = quantized(model, (x,))
    assert_untouched(model, state)
    fresh = torch.randn(5, 6, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert sqnr(model(fresh), program.module(fresh)) > 30
        assert sqnr(program.module(fresh), compiled(fresh)) > 45
    compiled.save(tmp_path / "engine")
    kinds = kernels_of(tmp_path / "engine" / "model.onnx")
    # three linear layers read one value, which is quantized once
    fused = kinds.count("DynamicQuantizeMatMul") + kinds.count("MatMulIntegerToFloat")
    assert fused == sum(program.op(node) == "dynamic_linear" for node in program.nodes)
    assert "MatMulInteger" not in kinds
    assert "Gemm" not in kinds
    torch.save((fresh, compiled(fresh)), tmp_path / "answer.pt")
    code = "import fxopt, torch; x, y = torch.load({!r}); print(torch.equal(fxopt.load({!r})(x), y))"
    assert new_process.code(code.format(str(tmp_path / "answer.pt"), str(tmp_path / "engine"))) == "True\n"


@pytest.mark.parametrize("bias", [True, False])
def test_an_lstm_is_computed_as_simulated(bias: bool, tmp_path: Path) -> None:
    model = Sequence(bias=bias).eval()
    # threads share a batch, and each finds a range of its own
    compiled = fxopt.compile(model, states(2), passes=[DYNAMIC], backend="onnx(num_threads=1)")
    program = quantized(model, states(2))
    for batch in (1, 3):
        with torch.no_grad():
            wanted, simulated = model(*states(batch)), program.module(*states(batch))
        for one, two, three in zip(wanted, simulated, compiled(*states(batch)), strict=True):
            assert sqnr(one, two) > 30
            assert sqnr(two, three) > 90
    compiled.save(tmp_path / "engine")
    kinds = kernels_of(tmp_path / "engine" / "model.onnx")
    assert kinds.count("DynamicQuantizeLSTM") == 2
    assert "LSTM" not in kinds


def nodes_of(graph: onnx.GraphProto) -> list[str]:
    """The operators of a graph, those of a loop's body behind the loop."""
    found = []
    for node in graph.node:
        found.append(node.op_type)
        for attribute in node.attribute:
            found += nodes_of(attribute.g)
    return found


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"num_layers": 2, "bidirectional": True}])
def test_a_gru_is_computed_as_simulated(options: dict[str, Any], tmp_path: Path) -> None:
    model = Gated(**options).eval()
    loops = model.gru.num_layers * (1 + model.gru.bidirectional)
    generator = torch.Generator().manual_seed(0)

    def inputs(batch: int) -> tuple[Tensor, Tensor]:
        hidden = torch.randn(batch, loops, 256, generator=generator).tanh()
        return torch.randn(batch, 5, 6, generator=generator), hidden

    compiled = fxopt.compile(model, inputs(2), passes=[DYNAMIC])
    assert not compiled.report.notes
    program = quantized(model, inputs(2))
    for batch in (1, 3):
        given = inputs(batch)
        with torch.no_grad():
            wanted, simulated = model(*given), program.module(*given)
        for one, two, three in zip(wanted, simulated, compiled(*given), strict=True):
            assert sqnr(one, two) > 30
            # of so many states one may be rounded to the other integer
            assert sqnr(two, three) > 40
    compiled.save(tmp_path / "engine")
    kernels_of(tmp_path / "engine" / "model.onnx")
    kinds = nodes_of(onnx.load(tmp_path / "engine" / "optimized.onnx").graph)
    # each loop's product, and the linear layer behind all
    assert kinds.count("Scan") == loops
    assert kinds.count("DynamicQuantizeMatMul") + kinds.count("MatMulIntegerToFloat") == 2 * loops + 1
    assert not {"GRU", "MatMul", "Gemm", "MatMulInteger"} & set(kinds)


def test_a_gru_takes_any_length_and_states_of_zero() -> None:
    model = Gated().eval()
    x = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))
    compiled = fxopt.compile(model, (x,), passes=[DYNAMIC], dynamic_axes={"x": {1: "length"}})
    longer = torch.randn(3, 9, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for wanted, found in zip(model(longer), compiled(longer), strict=True):
            assert sqnr(wanted, found) > 30


@pytest.mark.parametrize("model", [Sequence(), Gated()])
def test_it_saves_and_loads_by_torch(model: nn.Module, tmp_path: Path, new_process: NewProcess) -> None:
    few, more = ((states(batch) if isinstance(model, Sequence) else states(batch)[:1]) for batch in (2, 3))
    compiled = fxopt.compile(model.eval(), few, passes=[DYNAMIC], backend="eager")
    compiled.save(tmp_path / "engine")
    torch.save((more, compiled(*more)), tmp_path / "answer.pt")
    code = (
        "import fxopt, torch; x, y = torch.load({!r}); "
        "print(all(torch.equal(*pair) for pair in zip(fxopt.load({!r})(*x), y, strict=True)))"
    )
    answer = new_process.code(code.format(str(tmp_path / "answer.pt"), str(tmp_path / "engine")))
    assert answer == "True\n"


def test_layers_that_share_a_weight_and_calls_of_one_layer() -> None:
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
    program = quantized(model, (x,))
    assert [program.op(node) for node in program.nodes].count("dynamic_linear") == 3
    assert program.cost().params == fxopt.capture(model, (x,)).cost().params
    compiled = fxopt.compile(model, (x,), passes=[DYNAMIC])
    with torch.no_grad():
        assert sqnr(model(x), program.module(x)) > 30
        assert sqnr(program.module(x), compiled(x)) > 60


def test_data_make_a_difference_and_are_not_needed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16)).eval()
    rows = torch.randn(256, 64) @ torch.randn(64, 64).triu() / 8
    found = {}
    for name, data in (("nearest", None), ("gptq", [rows])):
        pass_ = Quantize(mode="dynamic", per_channel=False)
        program = fxopt.optimize(
            model, (rows,), [pass_], calibration=data, target=Target(device="cpu", instruction_set="AVX2")
        )
        assert program.module.get_submodule("0").codes.abs().max() > 63
        with torch.no_grad():
            found[name] = sqnr(model(rows), program.module(rows))
    assert found["gptq"] > found["nearest"] + 0.5


@pytest.mark.parametrize(("instructions", "largest"), [("AVX2", 63), ("AVX512 VNNI", 127)])
def test_bits_are_those_of_the_target(instructions: str, largest: int) -> None:
    torch.manual_seed(0)
    program = quantized(Sequence().eval(), states(2), target=Target(device="cpu", instruction_set=instructions))
    codes = [buffer for name, buffer in program.module.named_buffers() if "codes" in name and "head" not in name]
    assert len(codes) == 4
    assert max(int(item.abs().max()) for item in codes) == largest


def test_what_is_left_alone() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.gru = nn.Conv1d(4, 4, 3), nn.GRU(4, 4, batch_first=True)
            self.rnn = nn.RNN(4, 4, batch_first=True)
            self.ignored, self.head = nn.LSTM(4, 4, batch_first=True), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.rnn(self.gru(self.conv(x).transpose(1, 2))[0])[0]
            out: Tensor = self.head(self.ignored(x)[0])
            return out

    program = fxopt.optimize(Mixed().eval(), (torch.randn(2, 4, 8),), [Quantize(mode="dynamic", ignore=("ig*",))])
    (report,) = program.report.passes
    assert [rewrite.node for rewrite in report.rewrites] == ["head"]
    assert {skip.node: skip.why for skip in report.skips} == {
        "conv": "conv1d has no fast integer kernel for ranges that are found as it runs",
        "gru": "it has 4 states, and with fewer than 256 integers are no faster",
        "rnn": "rnn has no fast integer kernel for ranges that are found as it runs",
        "ignored": "ignored",
    }


class Only(nn.Module):
    """What one LSTM gives."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lstm = nn.LSTM(4, 4, **options)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.lstm(x)[0]
        return out


@pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")
@pytest.mark.parametrize(
    ("model", "inputs", "why"),
    [
        (Only(), torch.randn(5, 4), "lstm: its input has no batch axis"),
        (Only(proj_size=2), torch.randn(5, 2, 4), "lstm: lstm with a projection has no integer kernel"),
        (Only().double(), torch.randn(5, 2, 4).double(), "lstm: it does not compute in float32"),
        (nn.Sequential(nn.ReLU()), torch.randn(2, 3), "it has no convolution or linear layer"),
    ],
)
def test_no_layer_is_an_error(model: nn.Module, inputs: Tensor, why: str) -> None:
    with pytest.raises(InputError, match=f"finds no layer that could compute with integers: {why}"):
        quantized(model.eval(), (inputs,))


def test_a_target_that_multiplies_signed_integers_is_refused() -> None:
    with pytest.raises(InputError, match="multiply signed ones: use mode='static' or mode='weight_only'"):
        quantized(nn.Linear(4, 4), (torch.randn(2, 4),), target=Target(device="cuda", instruction_set="SM 9.0"))


def test_costs_and_what_may_follow() -> None:
    model = Sequence().eval()
    before, program = fxopt.capture(model, states(2)).cost(), quantized(model, states(2))
    after = program.cost()
    assert after.macs == before.macs == 10 * (2 * 32 * (6 + 8) + 2 * 32 * (16 + 8) + 16 * 3)
    assert before.params - after.params == 4 * 32  # of the two biases of a gate one is left
    assert after.bytes < 0.5 * before.bytes
    (report,) = fxopt.explain(program, passes=["cast_precision"])
    assert {skip.node: skip.why for skip in report.skips} == {
        "lstm": "it computes with integers",
        "head": "it computes with integers",
    }


def test_masked_weights_stay_zero() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    program = fxopt.optimize(model, (torch.randn(2, 16),), ["prune_weights", DYNAMIC], on_no_match="ignore")
    codes: Any = program.module.get_submodule("0").codes
    assert float((codes == 0).float().mean()) >= 0.5
