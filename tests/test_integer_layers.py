"""Layer by layer, an ONNX engine gives the very integers that eager execution simulates, or their neighbours.

Each part of a program between two quantized values is compiled by itself and fed with the integers that it reads in the
whole: so nothing but what this part computes can differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import onnxruntime
import pytest
import torch
from torch import Tensor, fx, nn

import fxopt
from benchmarks.fashion_mnist import trained
from fxopt import Program
from fxopt.passes import Quantize
from fxopt.registry import make_backend

pytestmark = pytest.mark.usefixtures("integers_everywhere")


class Part(NamedTuple):
    """What lies between quantized values.

    Attributes:
        module: takes dequantized values, gives a dequantized one or floating numbers.
        inputs: values of one run.
        expected: what it gives for them in the whole program.
        step: between two integers of what it gives; None for floating numbers.
    """

    module: fx.GraphModule
    inputs: tuple[Tensor, ...]
    expected: Tensor
    step: float | None


def parts(program: Program, values: dict[str, Any]) -> Iterator[tuple[str, Part]]:
    """All parts that hold a layer or a sum, by the name of what ends them."""
    ends = [node for node in program.nodes if program.op(node) == "quantize"]
    ends += [node for node in program.nodes if program.op(node) == "linear"]
    for end in ends:
        inside, borders = set(), []
        reached = list(end.all_input_nodes)
        while reached:
            node = reached.pop()
            if node in inside or node in borders:
                continue
            if program.op(node) in ("dequantize", "placeholder"):
                borders.append(node)
                continue
            inside.add(node)
            reached += node.all_input_nodes
        computing = [program.op(node) for node in [*inside, end] if program.op(node) in ("conv2d", "linear", "add")]
        if not computing or any(program.op(node) == "placeholder" for node in borders):
            continue
        graph, copies = fx.Graph(), {}
        borders.sort(key=program.nodes.index)
        for border in borders:
            value = graph.placeholder(border.name)
            codes = graph.call_function(border.all_input_nodes[0].target, (value, *border.args[1:]))  # type: ignore[arg-type]
            copies[border] = graph.call_function(border.target, (codes, *border.args[1:]))  # type: ignore[arg-type]
        for node in program.nodes:
            if node in inside:
                copies[node] = graph.node_copy(node, copies.__getitem__)
        last = graph.node_copy(end, copies.__getitem__)
        expected, step = values[end.name], None
        if program.op(end) == "quantize":
            (back,) = end.users
            step = float(back.args[1])  # type: ignore[arg-type]
            expected = values[back.name]
            copies[end] = last
            last = graph.node_copy(back, copies.__getitem__)
        graph.output(last)
        module = fx.GraphModule(program.module, graph).eval()
        yield end.name, Part(module, tuple(values[border.name] for border in borders), expected, step)


class Mixed(nn.Module):
    """Layers of other kinds than the ResNet has."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(1, 12, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(12, 12, 5, padding=2, groups=12)
        self.grouped = nn.Conv2d(12, 9, 3, groups=3)
        self.one = nn.Conv2d(9, 16, 1, bias=False)
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = nn.functional.relu6(self.depthwise(x)) + x
        x = torch.relu(self.one(self.grouped(x))).mean((2, 3))
        out: Tensor = self.second(nn.functional.gelu(self.first(x)))
        return out


@pytest.mark.parametrize(
    ("name", "rounding"), [pytest.param("resnet14", "nearest", marks=pytest.mark.slow), ("mixed", "gptq")]
)
def test_engines_give_the_integers_that_are_simulated(name: str, rounding: Any) -> None:
    model = trained() if name == "resnet14" else Mixed().eval()
    data = [torch.rand(16, 1, 28, 28, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    pass_ = Quantize(round=rounding)
    program = fxopt.optimize(model, (data[0][:2],), ["default", pass_], calibration=data, on_no_match="ignore")
    values: dict[str, Any] = {}
    program.run(data[1], watch=lambda node, value: values.setdefault(node.name, value))
    found = dict(parts(program, values))
    layers = [node for node in program.nodes if program.op(node) in ("conv2d", "linear")]
    sums = [node for node in program.nodes if program.op(node) == "add"]
    # the first layer reads the floating input, and no part ends in a layer twice
    assert len(found) >= len(layers) + len(sums) - 2
    for end, part in found.items():
        with torch.no_grad():
            assert torch.equal(part.module(*part.inputs), part.expected), end
        engine = make_backend("onnx").lower(fxopt.capture(part.module, part.inputs), dynamic_batch=False)
        (given,) = engine(*part.inputs)
        if part.step is None:
            torch.testing.assert_close(given, part.expected, rtol=1e-4, atol=1e-5)
            continue
        steps = (given - part.expected).abs() / part.step
        assert float(steps.max()) <= 1.001, f"{end}: {float(steps.max())} steps"
        assert float((steps > 0.5).float().mean()) < 0.01, end


def test_the_runtime_computes_these_parts_with_integers(tmp_path: Any) -> None:
    """Otherwise the test above would compare floating kernels."""
    import onnx

    data = [torch.rand(16, 1, 28, 28, generator=torch.Generator().manual_seed(0))]
    program = fxopt.optimize(
        Mixed().eval(), (data[0],), ["default", "quantize"], calibration=data, on_no_match="ignore"
    )
    values: dict[str, Any] = {}
    program.run(data[0], watch=lambda node, value: values.setdefault(node.name, value))
    kinds = set()
    for end, part in parts(program, values):
        engine = make_backend("onnx").lower(fxopt.capture(part.module, part.inputs), dynamic_batch=False)
        folder = tmp_path / end
        folder.mkdir()
        engine.save(folder)
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(folder / "optimized.onnx")
        onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
        kinds |= {node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node}
    assert {"QLinearConv", "QGemm", "QLinearAdd"} <= kinds
    assert not kinds & {"Conv", "Gemm", "MatMul", "Add"}
