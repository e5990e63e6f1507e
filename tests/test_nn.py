"""The building blocks: shapes, what they compute, checks, and that passes and engines see through them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt.nn import DepthwiseSeparableConv2d, InvertedResidual
from fxopt.passes import PruneChannels

SETTINGS: list[dict[str, Any]] = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (3, 5), "stride": (2, 1), "padding": (1, 0), "dilation": (1, 2), "multiplier": 2},
    {"kernel_size": 3, "padding": "same", "padding_mode": "reflect", "norm": nn.BatchNorm2d, "activation": nn.ReLU},
    {"kernel_size": 3, "padding": 1, "activation": nn.ReLU6, "bias": False},
]


def settled(model: nn.Module, x: Tensor) -> nn.Module:
    """With the running statistics of an input, in evaluation mode."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    model.train()(x)
    return model.eval()


@pytest.mark.parametrize("order", ["depthwise_first", "pointwise_first"])
@pytest.mark.parametrize("options", SETTINGS)
def test_a_separable_convolution_has_the_shape_of_the_dense_one(options: dict[str, Any], order: Any) -> None:
    layer = DepthwiseSeparableConv2d(4, 6, **options, order=order)
    names = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
    dense = nn.Conv2d(4, 6, **{name: value for name, value in options.items() if name in names})
    x = torch.randn(2, 4, 9, 10)
    assert layer(x).shape == dense(x).shape
    assert layer.depthwise.groups == (4 if order == "depthwise_first" else 6)
    middle = options.get("multiplier", 1) * layer.depthwise.groups
    assert layer.pointwise.in_channels == (middle if order == "depthwise_first" else 4)
    last = layer.pointwise if order == "depthwise_first" else layer.depthwise
    first = layer.depthwise if order == "depthwise_first" else layer.pointwise
    assert (last.bias is not None) == options.get("bias", True)
    assert (first.bias is not None) == ("activation" in options and "norm" not in options)
    assert f"order='{order}', multiplier={options.get('multiplier', 1)}" in repr(layer)


@pytest.mark.parametrize("order", ["depthwise_first", "pointwise_first"])
def test_with_a_multiplier_of_all_taps_it_is_any_dense_convolution(order: Any) -> None:
    torch.manual_seed(0)
    dense = nn.Conv2d(3, 5, 2, bias=False).double()
    layer = DepthwiseSeparableConv2d(3, 5, 2, multiplier=4, order=order, bias=False).double()
    unit = torch.eye(4, dtype=torch.float64).reshape(4, 1, 2, 2)
    taps = dense.weight.detach().flatten(2)
    with torch.no_grad():
        if order == "depthwise_first":
            layer.depthwise.weight.copy_(unit.repeat(3, 1, 1, 1))
            layer.pointwise.weight.copy_(taps.reshape(5, 12, 1, 1))
        else:
            layer.depthwise.weight.copy_(unit.reshape(1, 4, 2, 2).repeat(5, 1, 1, 1))
            layer.pointwise.weight.copy_(taps.transpose(1, 2).reshape(20, 3, 1, 1))
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x), dense(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "shape", "skip"),
    [
        ({"out_channels": 4}, (2, 4, 9, 10), True),
        ({"out_channels": 6}, (2, 6, 9, 10), False),
        ({"out_channels": 4, "stride": 2}, (2, 4, 5, 5), False),
        ({"out_channels": 4, "stride": (1, 2), "kernel_size": (5, 3), "dilation": (2, 1)}, (2, 4, 9, 5), False),
        ({"out_channels": 4, "expansion": 2.5, "kernel_size": 5, "activation": nn.Hardswish}, (2, 4, 9, 10), True),
    ],
)
def test_an_inverted_residual_adds_its_input_where_it_can(
    arguments: dict[str, Any], shape: tuple[int, ...], skip: bool
) -> None:
    block = InvertedResidual(4, **arguments)
    x = torch.randn(2, 4, 9, 10)
    assert block(x).shape == shape
    assert block.skip is skip
    assert block.hidden_channels == round(4 * arguments.get("expansion", 6)) == block.depthwise.groups
    with torch.no_grad():
        block.project_norm.weight.zero_()  # type: ignore[union-attr, operator]
        assert torch.equal(block(x), x if skip else torch.zeros(shape))


def test_without_expansion_there_is_no_expanding_layer() -> None:
    block = InvertedResidual(4, 4, expansion=1)
    assert (block.expand, block.expand_norm, block.expand_activation) == (None, None, None)
    assert [name for name, _ in block.named_parameters()] == [
        "depthwise.weight",
        "depthwise_norm.weight",
        "depthwise_norm.bias",
        "project.weight",
        "project_norm.weight",
        "project_norm.bias",
    ]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DepthwiseSeparableConv2d(0, 4, 3), "in_channels must be an integer of at least 1, not 0"),
        (lambda: DepthwiseSeparableConv2d(4, 4, 3, multiplier=1.5), "multiplier must be an integer of at least 1"),
        (lambda: DepthwiseSeparableConv2d(4, 4, (3, 0)), "kernel_size must be an integer of at least 1, or a tuple"),
        (lambda: DepthwiseSeparableConv2d(4, 4, 3, order="first"), "order must be 'depthwise_first' or"),
        (lambda: InvertedResidual(4, True), "out_channels must be an integer of at least 1, not True"),
        (lambda: InvertedResidual(4, 4, 4), "kernel_size must be odd"),
        (lambda: InvertedResidual(4, 4, stride=0), "stride must be an integer of at least 1"),
        (lambda: InvertedResidual(4, 4, expansion=0), "expansion must be a number above 0, not 0"),
        (lambda: InvertedResidual(4, 4, expansion=0.1), "leaves no hidden channel: give more"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        InvertedResidual(3, 8, stride=2, expansion=4),
        InvertedResidual(8, 8, expansion=4),
        InvertedResidual(8, 8, expansion=1),
        DepthwiseSeparableConv2d(8, 16, 3, padding=1, norm=nn.BatchNorm2d, activation=nn.ReLU),
        nn.ReLU(),
        DepthwiseSeparableConv2d(16, 16, 3, order="pointwise_first", norm=nn.BatchNorm2d),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    )


def test_they_fold_prune_and_run_in_onnx() -> None:
    x = torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    model = settled(network(), x)
    program = fxopt.optimize(model, x[:2], ["fold_batch_norm"], on_failure="raise")
    assert not any(program.op(node) == "batch_norm" for node in program.nodes)
    torch.testing.assert_close(program.module(x), model(x), rtol=1e-4, atol=1e-5)
    pruned = fxopt.optimize(model, x[:2], [PruneChannels(ratio=0.5)], on_failure="raise")
    assert pruned.cost().macs < 0.5 * program.cost().macs
    # depthwise layers shrink with the channels of theirs
    assert pruned.module.get_parameter("1.depthwise.weight").shape == (16, 1, 3, 3)
    compiled = fxopt.compile(model, x[:2], backend="onnx")
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


def test_they_train() -> None:
    model = network()
    model(torch.randn(4, 3, 12, 12)).square().sum().backward()
    assert all(item.grad is not None for item in model.parameters())
