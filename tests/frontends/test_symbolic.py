"""The symbolic frontend: flat placeholders, leaf modules, hooks, opaque functions, and the reasons of its refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn

from fxopt.errors import CaptureError
from fxopt.frontends.captured import Captured
from fxopt.frontends.symbolic import opaque_calls, trace_symbolic
from fxopt.signature import Signature

X = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))


def trace(model: nn.Module, inputs: Any = X) -> Captured:
    signature, _ = Signature.of(model, inputs)
    return trace_symbolic(model, signature)


def targets(captured: Captured) -> list[str]:
    return [str(node.target) for node in captured.module.graph.nodes if node.op in ("call_module", "get_attr")]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.act = nn.Sequential(nn.ReLU(), nn.Dropout())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.linear(x))


def test_placeholders_are_the_flat_inputs_and_the_output_is_a_tuple() -> None:
    class Nested(nn.Module):
        def forward(self, x: dict[str, Any], *more: torch.Tensor) -> Any:
            return {"out": x["a"] + x["b"][0], "more": [more[0]]}

    captured = trace(Nested(), ({"a": X, "b": [X]}, X))
    nodes = list(captured.module.graph.nodes)
    assert [str(node.target) for node in nodes if node.op == "placeholder"] == ["x_a", "x_b_0", "more_0"]
    assert isinstance(nodes[-1].args[0], tuple)
    assert captured.outputs.paths() == ["out", "more[0]"]
    assert captured.dynamic_batch
    first, second = captured.module(X, X * 2, X * 3)
    assert torch.equal(first, X * 3)
    assert torch.equal(second, X * 3)


def test_torch_modules_are_leaves_and_containers_are_looked_into() -> None:
    assert targets(trace(nn.Sequential(Block(), Block()))) == [
        "0.linear", "0.act.0", "0.act.1", "1.linear", "1.act.0", "1.act.1",
    ]  # fmt: skip


def test_a_module_that_is_a_leaf_itself() -> None:
    captured = trace(nn.Linear(6, 3))
    assert captured.module(X)[0].shape == (2, 3)


def test_known_modules_of_other_libraries_are_leaves() -> None:
    ops = pytest.importorskip("torchvision.ops")
    captured = trace(nn.Sequential(nn.Linear(6, 6), ops.StochasticDepth(0.5, "row")))
    assert targets(captured) == ["0", "1"]


def test_a_leaf_with_hooks_is_looked_into_so_that_they_take_part() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
    model[0].register_forward_hook(lambda module, args, output: output * 2)
    model[1].register_forward_pre_hook(lambda module, args: (args[0] - 1,))
    captured = trace(model)
    assert torch.equal(captured.module(X)[0], model(X))


def test_a_parametrized_leaf_is_looked_into() -> None:
    model = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)))
    captured = trace(model)
    assert torch.equal(captured.module(X)[0], model(X))


def test_free_parameters_are_read_under_their_names() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(6))
            self.register_buffer("shift", torch.ones(6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.scale + self.shift

    assert targets(trace(Scaled())) == ["scale", "shift"]


class ByValue(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


class ByLength(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x[i] for i in range(len(x))])


class Raises(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError("by zero\nand more")


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (ByValue(), "TraceError: symbolically traced variables cannot be used as inputs to control flow"),
        (ByLength(), "RuntimeError: 'len' is not supported in symbolic tracing"),
        (Raises(), "ZeroDivisionError: by zero$"),
    ],
)
def test_what_cannot_be_traced_is_a_capture_error_with_its_cause(model: nn.Module, reason: str) -> None:
    with pytest.raises(CaptureError, match=reason) as caught:
        trace(model)
    assert caught.value.__cause__ is not None


def test_shapes_of_parameters_are_constants() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(6, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x @ self.weight).reshape(-1, self.weight.shape[1] if self.weight.shape[0] == 6 else 1)

    assert trace(Reads()).module(X)[0].shape == (2, 3)


def test_assertions_are_not_part_of_the_program() -> None:
    class Asserts(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            torch._assert(x.shape[1] == 6, "six columns")
            return x * 2

    captured = trace(Asserts())
    assert [node.op for node in captured.module.graph.nodes] == ["placeholder", "call_function", "output"]


@fx.wrap
def opaque(x: torch.Tensor) -> torch.Tensor:
    return x * 2 if x.sum() > 0 else x * 3


def test_functions_that_libraries_wrap_are_opaque() -> None:
    class Calls(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return opaque(torch.relu(x) + abs(x) @ x.T)

    captured = trace(Calls())
    assert opaque_calls(captured.module) == [f"{__name__}.opaque"]


def test_torch_operator_and_known_functions_are_not_opaque() -> None:
    import math

    stochastic_depth = pytest.importorskip("torchvision.ops").stochastic_depth
    graph = fx.Graph()
    x = graph.placeholder("x")
    for function in (
        torch.relu,
        torch.nn.functional.gelu,
        abs,
        math.sqrt,
        stochastic_depth,
        torch.ops.aten.relu.default,
    ):
        graph.call_function(function, (x,))
    graph.output((x,))
    assert opaque_calls(fx.GraphModule(nn.Module(), graph)) == []


def test_opaque_functions_of_swin() -> None:
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.SwinTransformer(
        patch_size=[4, 4], embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=[2, 2], num_classes=3
    ).eval()
    captured = trace(model, torch.randn(1, 3, 32, 32))
    names = [name.rpartition(".")[2] for name in opaque_calls(captured.module)]
    assert "shifted_window_attention" in names
    assert "stochastic_depth" not in names
