"""Functions of integers and shuffles as ONNX Runtime computes them: its kernels, and what is simulated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxopt
from fxopt import Program
from fxopt.lowering.onnx_functions import spell_functions

pytestmark = pytest.mark.usefixtures("integers_everywhere")

Function = Callable[[Tensor], Tensor]


class Between(nn.Module):
    """A function between two convolutions."""

    def __init__(self, function: Function, *, channels: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before, self.after = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(channels, 6, 1)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.after(self.function(self.before(x)))
        return y


class Gated(nn.Module):
    """Squeeze and excitation: channels times what is made of their means."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = F.hardsigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))
        return x * gate


def batches() -> list[Tensor]:
    return [torch.randn(8, 3, 10, 10, generator=torch.Generator().manual_seed(seed)) * 3 for seed in range(2)]


def quantized(model: nn.Module) -> Program:
    return fxopt.optimize(
        model.eval(),
        (batches()[0][:2],),
        ["fold_batch_norm", "quantize(round='nearest', observer='minmax')"],
        calibration=batches(),
        on_no_match="ignore",
    )


def operators(engine: Any, folder: Path) -> list[str]:
    """What ONNX Runtime runs."""
    from fxopt.lowering.onnx_session import open_session

    path = folder / "optimized.onnx"
    open_session(engine._model, providers=["CPUExecutionProvider"], threads=1, optimized=path)
    return [node.op_type for node in onnx.load(path, load_external_data=False).graph.node]


def scales(program: Program) -> dict[str, float]:
    """How far the integers of each value stand apart."""
    rewrites = program.report.passes[-1].rewrites
    return {item.node: item.params["affine"]["scale"] for item in rewrites if "affine" in item.params}


FUNCTIONS: dict[str, tuple[Function, set[str]]] = {
    "hardswish": (F.hardswish, {"QLinearAdd", "QLinearMul"}),
    "hardsigmoid": (F.hardsigmoid, {"QLinearAdd"}),
    "sigmoid": (torch.sigmoid, {"QLinearSigmoid"}),
    "silu": (F.silu, {"QLinearSigmoid", "QLinearMul"}),
    "product": (lambda y: y * y.roll(1, 1), {"QLinearMul"}),
    "squeeze and excitation": (Gated(), {"QLinearGlobalAveragePool", "QLinearMul", "QLinearAdd"}),
    "average": (lambda y: F.avg_pool2d(y, 2), {"QLinearAveragePool"}),
    "mean": (lambda y: y.mean((-2, -1), keepdim=True), {"QLinearGlobalAveragePool"}),
    "flat mean": (lambda y: y.mean((2, 3))[:, :, None, None], {"QLinearGlobalAveragePool"}),
    "module": (nn.AdaptiveAvgPool2d(1), {"QLinearGlobalAveragePool"}),
}


@pytest.mark.parametrize("dynamic_batch", [True, False])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_between_integers(name: str, dynamic_batch: bool, tmp_path: Path) -> None:
    function, expected = FUNCTIONS[name]
    program = quantized(Between(function))
    before = str(program)
    engine = fxopt.lower(program, dynamic_batch=dynamic_batch).engine
    assert str(program) == before
    found = operators(engine, tmp_path)
    assert expected <= set(found)
    # nothing in floating point but what is quantized first, and given last
    assert found.count("QuantizeLinear") == found.count("DequantizeLinear") == 1
    assert not {"HardSigmoid", "Sigmoid", "Mul", "Add", "ReduceMean", "GlobalAveragePool", "Conv"} & set(found)
    fresh = batches()[0][2:4]
    with torch.no_grad():
        simulated, given = program.module(fresh), engine(fresh)[0]
    # one integer more or less of what is read by the last layer
    step = max(scales(program).values())
    weight = program.module.get_submodule("after")()
    assert float((simulated - given).abs().max()) <= step * float(weight.abs().sum((1, 2, 3)).max())
    assert float((simulated - given).square().mean().sqrt()) < 0.02 * float(simulated.std())


@pytest.mark.parametrize("low", [-20.0, -13.5, -10.0, -3.0, 0.0, 2.0])
@pytest.mark.parametrize("function", [F.hardswish, F.silu])
def test_products_lose_what_the_rounding_of_a_factor_does(function: Function, low: float) -> None:
    model = Between(function, channels=1).eval()
    model.before, model.after = nn.Conv2d(1, 1, 1, bias=False), nn.Conv2d(1, 1, 1, bias=False)
    with torch.no_grad():
        model.before.weight.fill_(1.0)
        model.after.weight.fill_(1.0)
    x = torch.linspace(low, low + 20, 4000).reshape(2, 1, 40, 50)
    program = fxopt.optimize(
        model,
        x,
        ["fold_batch_norm", "quantize(round='nearest', observer='minmax', bias_correction=False)"],
        calibration=[x],
        on_no_match="ignore",
    )
    engine = fxopt.lower(program).engine
    with torch.no_grad():
        off = float((program.module(x) - engine(x)[0]).abs().max())
    gate = float((F.hardsigmoid if function is F.hardswish else torch.sigmoid)(torch.tensor(low + 20)))
    far = 3.0 if function is F.hardswish else 7.0  # from zero, where the factor has come to 0 or 1 within its rounding
    step = scales(program)["hardswish" if function is F.hardswish else "silu"]
    # the product is rounded, and what the last layer makes of it
    assert off <= 2.01 * step + far * gate / 510


def test_a_function_that_nobody_reads_as_integers_stays_floating() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            return torch.sigmoid(y) * y + y.mean((2, 3), keepdim=True)

    program = quantized(Last())
    assert sum(program.op(node) == "quantize" for node in program.nodes) == 2
    assert spell_functions(program) is program


class Shuffled(nn.Module):
    """Channels in groups that are mixed, in one of the forms in which models write it."""

    def __init__(self, form: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.form = form
        self.before, self.after = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 6, 3, groups=2)
        self.shuffle = nn.ChannelShuffle(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(x)
        batch, channels, height, width = y.shape
        if self.form == "views":
            y = y.view(batch, 3, channels // 3, height, width).transpose(1, 2).contiguous().view(y.shape)
        elif self.form == "permute":
            y = y.reshape(batch, 3, 4, height, width).permute(0, 2, 1, 3, 4).reshape(batch, channels, height, width)
        elif self.form == "function":
            y = F.channel_shuffle(y, 3)
        elif self.form == "module":
            y = self.shuffle(y)
        elif self.form == "other axes":
            y = y.view(batch, 3, channels // 3, height, width).transpose(1, 3).reshape(y.shape)
        elif self.form == "across images":
            y = y.view(1, batch, channels, height, width).transpose(1, 2).reshape(y.shape)
        else:
            y = y.view(batch, 3, channels // 3, height, width).transpose(1, 2).reshape(batch, -1, width, height)
        found: Tensor = self.after(y)
        return found


@pytest.mark.parametrize("integers", [False, True])
@pytest.mark.parametrize("form", ["views", "permute", "function", "module"])
def test_shuffled_channels_are_gathered(form: str, integers: bool, tmp_path: Path) -> None:
    model = Shuffled(form).eval()
    program = quantized(model) if integers else fxopt.optimize(model, batches()[0][:2], ["default"])
    engine = fxopt.lower(program).engine
    found = operators(engine, tmp_path)
    assert found.count("Gather") == 1
    assert "Reshape" not in found
    x = batches()[1][:3]
    with torch.no_grad():
        expected = program.module(x)
        torch.testing.assert_close(engine(x)[0], expected, rtol=0, atol=0.05 if integers else 1e-5)


@pytest.mark.parametrize("form", ["other axes", "other sizes", "across images"])
def test_what_only_looks_like_a_shuffle_stays(form: str) -> None:
    x = batches()[0][:2, :, :, :8]
    program = fxopt.optimize(Shuffled(form).eval(), x, ["default"], on_no_match="ignore")
    assert spell_functions(program) is program


@pytest.mark.parametrize("pool", [nn.MaxPool2d(2), nn.MaxPool2d(3, stride=2, padding=1)])
def test_maxima_ahead_of_integers_are_floating(pool: nn.Module, tmp_path: Path) -> None:
    class Stem(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.pool, self.second = nn.Conv2d(3, 8, 3, padding=1), pool, nn.Conv2d(8, 6, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.second(self.pool(torch.relu(self.first(x))))
            return y

    program = fxopt.optimize(
        Stem().eval(),
        batches()[0][:2],
        ["fold_batch_norm", "quantize(round='nearest', ignore=['first'])"],
        calibration=batches(),
        on_no_match="ignore",
    )
    engine = fxopt.lower(program).engine
    found = operators(engine, tmp_path)
    assert found.index("MaxPool") < found.index("QuantizeLinear")
    assert "Relu" not in found
    x = batches()[1][:3]
    with torch.no_grad():
        torch.testing.assert_close(engine(x)[0], program.module(x), rtol=0, atol=1e-4)
