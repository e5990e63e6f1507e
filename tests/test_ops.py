"""Every spelling of an operator gives one canonical name and the same named arguments."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from fxopt.ops import DROPOUTS, MODE_DEPENDENT, is_known_module, operators, resolve

aten = torch.ops.aten


def node_of(target: Any, *args: Any, **kwargs: Any) -> tuple[fx.Node, nn.Module | None]:
    """A node that calls `target` with a placeholder first, and the module it calls."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    if isinstance(target, nn.Module):
        return graph.call_module("layer", (x, *args), kwargs), target
    if isinstance(target, str):
        return graph.call_method(target, (x, *args), kwargs), None
    return graph.call_function(target, (x, *args), kwargs), None


SPELLINGS: dict[str, list[Any]] = {
    "relu": [nn.ReLU(), F.relu, torch.relu, "relu", aten.relu.default],
    "sigmoid": [nn.Sigmoid(), F.sigmoid, torch.sigmoid, "sigmoid", aten.sigmoid.default],
    "silu": [nn.SiLU(), F.silu, aten.silu.default],
    "gelu": [nn.GELU(), F.gelu, aten.gelu.default],
    "identity": [nn.Identity(), aten.alias.default],
    "dropout": [nn.Dropout(), F.dropout, aten.dropout.default],
    "batch_norm": [nn.BatchNorm1d(4), nn.BatchNorm2d(4), nn.BatchNorm3d(4), F.batch_norm],
    "conv2d": [nn.Conv2d(1, 1, 1), F.conv2d, torch.conv2d, aten.conv2d.default],
    "conv_transpose2d": [nn.ConvTranspose2d(1, 1, 1), F.conv_transpose2d, aten.conv_transpose2d.input],
    "linear": [nn.Linear(1, 1), F.linear, aten.linear.default],
    "embedding": [nn.Embedding(2, 2)],
    "layer_norm": [nn.LayerNorm(4), F.layer_norm, aten.layer_norm.default],
    "flatten": [nn.Flatten(), torch.flatten, "flatten", aten.flatten.using_ints],
    "softmax": [nn.Softmax(1), F.softmax, torch.softmax, "softmax", aten.softmax.int],
    "max_pool2d": [nn.MaxPool2d(2), F.max_pool2d, aten.max_pool2d.default],
    "adaptive_avg_pool2d": [nn.AdaptiveAvgPool2d(1), F.adaptive_avg_pool2d, aten.adaptive_avg_pool2d.default],
    "add": [operator.add, torch.add, "add", aten.add.Tensor],
    "mul": [operator.mul, torch.mul, "mul", aten.mul.Tensor],
    "matmul": [operator.matmul, torch.matmul, "matmul", aten.matmul.default],
    "reshape": [torch.reshape, "reshape", aten.reshape.default],
    "view": ["view", aten.view.default],
    "permute": [torch.permute, "permute", aten.permute.default],
    "transpose": [torch.transpose, "transpose", aten.transpose.int],
    "getitem": [operator.getitem],
    "mean": [torch.mean, "mean", aten.mean.dim],
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name: str) -> None:
    for target in SPELLINGS[name]:
        assert resolve(*node_of(target)).op == name, target


@pytest.mark.parametrize(
    ("target", "args", "kwargs", "inplace"),
    [
        (nn.ReLU(), (), {}, False),
        (nn.ReLU(inplace=True), (), {}, True),
        (F.relu, (), {"inplace": True}, True),
        (F.relu, (True,), {}, True),
        (F.relu, (False,), {}, False),
        (F.relu_, (), {}, True),
        (torch.relu_, (), {}, True),
        ("relu_", (), {}, True),
        ("relu", (), {}, False),
        (aten.relu_.default, (), {}, True),
        (aten.relu.default, (), {}, False),
        (operator.iadd, (1,), {}, True),
        (operator.add, (1,), {}, False),
        (operator.setitem, (0, 1), {}, True),
        ("__getitem__", (0,), {}, False),
        ("zero_", (), {}, True),
    ],
)
def test_writing_in_place_is_known(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], inplace: bool) -> None:
    assert resolve(*node_of(target, *args, **kwargs)).inplace is inplace


@pytest.mark.parametrize(
    ("target", "args", "kwargs", "expected"),
    [
        ("view", (2, -1), {}, {"shape": (2, -1)}),
        ("view", ((2, -1),), {}, {"shape": (2, -1)}),
        ("reshape", ([2, -1],), {}, {"shape": [2, -1]}),
        ("reshape", (-1,), {}, {"shape": (-1,)}),
        ("permute", (0, 2, 1), {}, {"dims": (0, 2, 1)}),
        (torch.permute, ((0, 2, 1),), {}, {"dims": (0, 2, 1)}),
        (torch.permute, (), {"dims": (0, 2, 1)}, {"dims": (0, 2, 1)}),
        ("flatten", (1,), {}, {"start_dim": 1}),
        (torch.flatten, (), {"start_dim": 1}, {"start_dim": 1}),
        (torch.add, (3,), {"alpha": 2}, {"other": 3, "alpha": 2}),
        (aten.add.Tensor, (3,), {"alpha": 2}, {"other": 3, "alpha": 2}),
        (F.dropout, (0.3, False), {}, {"p": 0.3, "training": False}),
        (F.softmax, (1,), {}, {"dim": 1}),
        ("transpose", (1, 2), {}, {"dim0": 1, "dim1": 2}),
        (nn.Conv2d(1, 1, 1), (), {}, {}),
    ],
)
def test_arguments_have_one_name(
    target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], expected: dict[str, Any]
) -> None:
    node, module = node_of(target, *args, **kwargs)
    arguments = dict(resolve(node, module).arguments)
    assert arguments.pop("input") is node.args[0]
    assert arguments == expected


def test_the_first_argument_may_be_given_by_name() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    for node in (graph.call_function(F.relu, (), {"input": x}), graph.call_module("layer", (), {"x": x})):
        module = nn.ReLU() if node.op == "call_module" else None
        assert resolve(node, module).arguments["input"] is x


class Own(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class OwnRelu(nn.ReLU):
    """A subclass may do anything: it is not a ReLU to the table."""


def own(x: torch.Tensor) -> torch.Tensor:
    return x


@pytest.mark.parametrize(
    ("target", "spelling"),
    [
        (Own(), f"{Own.__module__}.Own"),
        (OwnRelu(), f"{OwnRelu.__module__}.OwnRelu"),
        (own, f"{own.__module__}.own"),
        ("no_such_method", "no_such_method"),
        (aten.cumsum.default, "aten.cumsum.default"),
        (torch.cumsum, "torch.cumsum"),
    ],
)
def test_what_is_not_in_the_table_is_unknown_by_its_own_name(target: Any, spelling: str) -> None:
    call = resolve(*node_of(target, 5))
    assert call.op.startswith("unknown:")
    assert call.op.endswith(spelling.rpartition(".")[2])
    assert call.arguments["arg1"] == 5


def test_modules_of_other_libraries_are_known_by_qualified_name() -> None:
    ops = pytest.importorskip("torchvision.ops")
    assert is_known_module(ops.StochasticDepth(0.1, "row"))
    assert is_known_module(nn.Conv2d(1, 1, 1))
    assert not is_known_module(Own())
    assert not is_known_module(nn.Sequential())


def test_every_operator_has_a_spelling_and_no_spelling_has_two_operators() -> None:
    seen: dict[Any, str] = {}
    for name, item in operators().items():
        assert item.name == name
        spellings: list[Any] = [*item.functions, *item.modules]
        spellings += [f"method {method}" for method in item.methods] + [f"aten {overload}" for overload in item.aten]
        assert spellings or name == "slice"
        for spelling in spellings:
            assert seen.setdefault(spelling, name) == name, spelling


ELEMENTWISE: list[tuple[str, Callable[[torch.Tensor], torch.Tensor]]] = [
    ("relu", F.relu),
    ("relu6", F.relu6),
    ("gelu", F.gelu),
    ("hardswish", F.hardswish),
    ("softplus", F.softplus),
    ("erf", torch.erf),
    ("clone", torch.clone),
]


@pytest.mark.parametrize(("name", "function"), ELEMENTWISE)
def test_operators_marked_elementwise_are(name: str, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    assert operators()[name].elementwise
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(function(x).transpose(0, 2), function(x.transpose(0, 2)))


def test_operators_that_mix_positions_are_not_marked_elementwise() -> None:
    for name in ("softmax", "log_softmax", "mean", "batch_norm", "layer_norm", "conv2d", "matmul", "cat", "reshape"):
        assert not operators()[name].elementwise


def test_operators_that_depend_on_the_mode_are_in_the_table() -> None:
    assert DROPOUTS < MODE_DEPENDENT <= operators().keys()
