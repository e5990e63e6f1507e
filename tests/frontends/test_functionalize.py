"""Writing in place: every write becomes a value, or is refused because something else looks at the memory."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from fxopt.errors import CaptureError
from fxopt.frontends.capture import capture
from fxopt.frontends.functionalize import functionalize
from fxopt.ops import resolve

X = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))

Body = Callable[[torch.Tensor], Any]


class Model(nn.Module):
    def __init__(self, body: Body) -> None:
        super().__init__()
        self.body = body
        self.register_buffer("state", torch.zeros(1))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> Any:
        return self.body(x)


def traced(body: Body) -> fx.GraphModule:
    return fx.symbolic_trace(Model(body))


def writes(module: fx.GraphModule) -> list[str]:
    def owner(node: fx.Node) -> nn.Module | None:
        return module.get_submodule(str(node.target)) if node.op == "call_module" else None

    return [node.name for node in module.graph.nodes if resolve(node, owner(node)).inplace]


def iadd(x: torch.Tensor) -> torch.Tensor:
    # written out: tracing takes `y += 1` for y = y + 1
    y = operator.iadd(x * 1, 1)
    return operator.itruediv(operator.isub(operator.imul(y, 2), x), 3)


def used_before_and_after(x: torch.Tensor) -> torch.Tensor:
    y = x + 1
    z = y * 2
    y.add_(1)
    return y * z


def twice(x: torch.Tensor) -> torch.Tensor:
    y = x + 1
    y.mul_(2)
    y.mul_(y)
    return y + x


def through_chain(x: torch.Tensor) -> torch.Tensor:
    return (x + 0).add_(1).mul_(2).relu_().clamp_(max=2.0)


def view_made_after(x: torch.Tensor) -> torch.Tensor:
    y = x + 1
    y.add_(1)
    return y.view(2, 24) * 2


def view_of_result(x: torch.Tensor) -> torch.Tensor:
    y = (x + 1).view(2, 24)
    y.add_(1)
    return y * 2


def view_read_before(x: torch.Tensor) -> torch.Tensor:
    y = x + 1
    total = y.view(2, 24).sum()
    y.add_(1)
    return y * total


def input_written(x: torch.Tensor) -> torch.Tensor:
    x.add_(1)
    return x * 2


def functions(x: torch.Tensor) -> torch.Tensor:
    y = F.relu(x + 0, inplace=True)
    y = F.relu(y, True)
    y = F.relu_(y - 0.5)
    y = torch.relu_(y)
    return F.leaky_relu_(F.elu(y - 1, inplace=True), 0.3)


def dropout_with_flag(x: torch.Tensor) -> torch.Tensor:
    return F.dropout(x + 0, 0.5, False, True) + F.hardtanh(x + 0, -0.5, 0.5, True)


PURE: list[Body] = [
    iadd,
    used_before_and_after,
    twice,
    through_chain,
    view_made_after,
    view_of_result,
    view_read_before,
    input_written,
    functions,
    dropout_with_flag,
]


@pytest.mark.parametrize("body", PURE)
def test_writes_become_values(body: Body) -> None:
    module = traced(body)
    assert writes(module) or body is iadd
    functionalize(module)
    assert writes(module) == []
    x = X.clone()
    torch.testing.assert_close(module(x), body(X.clone()))
    assert torch.equal(x, X), "the input was written into"


def test_a_module_that_works_in_place() -> None:
    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.relu = nn.Linear(6, 6), nn.ReLU(inplace=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.linear(x)
            z = self.relu(y)
            return y + z  # y was overwritten: 2 relu(y)

    model = Layers()
    module = fx.symbolic_trace(model)
    functionalize(module)
    assert writes(module) == []
    with torch.no_grad():
        torch.testing.assert_close(module(X), 2 * F.relu(model.linear(X)))


def view_read_later(x: torch.Tensor) -> torch.Tensor:
    y = x + 1
    v = y.view(2, 24)
    y.add_(1)
    return v * 2


def base_read_later(x: torch.Tensor) -> torch.Tensor:
    y = x + 1
    y[:, 0].add_(1)
    return y * 2


def sibling_read_later(x: torch.Tensor) -> torch.Tensor:
    y = x + 1
    a, b = y.view(8, 6), y.transpose(0, 1)
    a.mul_(2)
    return b * 2


def through_module_view(x: torch.Tensor) -> torch.Tensor:
    y = x + 1
    v = torch.flatten(y, 1)
    y.mul_(3)
    return v.sum() + y


def chunks(x: torch.Tensor) -> torch.Tensor:
    left, right = (x + 1).chunk(2, dim=1)[0], (x + 2).chunk(2, dim=1)[1]
    base = x + 1
    part = base.chunk(2, dim=1)[0]
    part.add_(1)
    return base.sum() + left + right


def base_is_the_output(x: torch.Tensor) -> torch.Tensor:
    y = x + 1
    y[0].zero_()
    return y


@pytest.mark.parametrize(
    "body", [view_read_later, base_read_later, sibling_read_later, through_module_view, chunks, base_is_the_output]
)
def test_memory_that_is_seen_elsewhere_is_refused_or_right(body: Body) -> None:
    module = traced(body)
    try:
        functionalize(module)
    except CaptureError as error:
        assert "writes into" in str(error)  # noqa: PT017 (a right answer is as good)
    else:
        torch.testing.assert_close(module(X.clone()), body(X.clone()))


def test_the_refusal_names_the_write_the_value_and_the_reader() -> None:
    with pytest.raises(CaptureError, match="add_ writes into add, whose memory view reads later"):
        functionalize(traced(view_read_later))


def setitem(x: torch.Tensor) -> torch.Tensor:
    y = x + 1
    y[:, 0] = 0
    return y * 2


def test_setitem_cannot_be_traced_or_is_refused() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(torch.add, (x, 1))
    graph.call_function(operator.setitem, (y, 0, 0.0))
    graph.output((y,))
    module = fx.GraphModule(nn.Module(), graph)
    expected = X + 1
    expected[0] = 0.0
    try:
        functionalize(module)
    except CaptureError:
        return
    torch.testing.assert_close(module(X.clone())[0], expected)


def test_aten_writes_become_values() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(torch.ops.aten.add.Tensor, (x, 1))
    graph.call_function(torch.ops.aten.mul_.Tensor, (y, 3))
    graph.output((graph.call_function(torch.ops.aten.relu_.default, (y,)), y))
    module = fx.GraphModule(nn.Module(), graph)
    functionalize(module)
    assert writes(module) == []
    first, second = module(X)
    torch.testing.assert_close(first, F.relu((X + 1) * 3))
    torch.testing.assert_close(second, F.relu((X + 1) * 3))


def test_a_write_without_a_pure_counterpart_is_refused() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(torch.add, (x, 1))
    graph.output((graph.call_method("no_such_thing_", (y,)),))
    with pytest.raises(CaptureError, match="no_such_thing_ has no counterpart that does not write"):
        functionalize(fx.GraphModule(nn.Module(), graph))


def test_state_of_the_model_is_still_written() -> None:
    root = nn.Module()
    root.register_buffer("count", torch.zeros(1))
    graph = fx.Graph()
    x = graph.placeholder("x")
    count = graph.create_node("get_attr", "count")
    graph.call_method("add_", (count, 1))
    graph.output((x,))
    module = fx.GraphModule(root, graph)
    functionalize(module)
    module(X)
    module(X)
    assert module.get_buffer("count").item() == 2.0


SHARED = [view_read_later, base_read_later, sibling_read_later, setitem]


@pytest.mark.parametrize("body", [*PURE, *SHARED])
def test_a_model_that_writes_in_place_is_captured_without(body: Body) -> None:
    program = capture(Model(body).eval(), X)
    torch.testing.assert_close(program.module(X.clone()), body(X.clone()))
    assert writes(program.module) == []
    assert program.frontend == ("export" if body in SHARED else "symbolic"), program.report.notes


@pytest.mark.parametrize("body", SHARED)
def test_in_training_mode_shared_memory_is_refused_with_the_reason(body: Body) -> None:
    with pytest.raises(CaptureError, match=r"writes into .*, whose memory .* reads later"):
        capture(Model(body).train(), X)
