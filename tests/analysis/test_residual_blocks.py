"""Residual blocks: their operands and the receptive field of their branch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxopt.analysis.residual_blocks import Field, ResidualBlock, residual_block
from fxopt.frontends.capture import capture


class Sum(nn.Module):
    """A branch and a shortcut."""

    def __init__(self, *branch: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.branch, self.shortcut = nn.Sequential(*branch), shortcut or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.branch(x)


def conv(kernel: Any, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(4, 4, kernel, **options)


CASES: dict[str, tuple[Sum, tuple[Field, Field]]] = {
    "two 3 x 3": (Sum(conv(3, padding=1), nn.ReLU(), conv(3, padding=1)), (Field(5, -2, 1, 1),) * 2),
    "stride": (
        Sum(conv(3, stride=2, padding=1), nn.ReLU(), conv(3, padding="same"), shortcut=conv(1, stride=2)),
        (Field(7, -3, 2, 1),) * 2,
    ),
    "dilated bottleneck": (
        Sum(conv(1), nn.ReLU(), conv(3, padding=(2, 3), dilation=(2, 3)), nn.ReLU(), conv(1)),
        (Field(5, -2, 1, 2), Field(7, -3, 1, 3)),
    ),
    "oblong": (Sum(conv((1, 3), padding=(0, 1))), (Field(1, 0, 1, 1), Field(3, -1, 1, 1))),
}


@pytest.mark.parametrize("name", CASES)
def test_the_receptive_field_is_where_an_output_depends_on_the_input(name: str) -> None:
    model, fields = CASES[name]
    model = model.eval()
    program = capture(model, torch.randn(2, 4, 16, 17))
    block = residual_block(program, next(node for node in program.nodes if program.op(node) == "add"))
    assert isinstance(block, ResidualBlock)
    assert block.fields == fields
    assert block.macs == program.cost().macs
    assert [program.op(node) for node in block.shortcut if program.op(node) == "conv2d"] == (
        ["conv2d"] if name == "stride" else []
    )
    # by the gradient of one output in the middle, which no ReLU may cut off
    for layer in model.branch:
        if isinstance(layer, nn.Conv2d):
            nn.init.uniform_(layer.weight, 0.1, 1)
    x = torch.rand(1, 4, 16, 17, requires_grad=True)
    model.branch(x)[0, :, 3, 4].sum().backward()
    assert x.grad is not None
    for axis, (field, place) in enumerate(zip(fields, (3, 4), strict=True)):
        touched = x.grad.abs().sum(1).squeeze(0).amax(1 - axis).nonzero().flatten().tolist()
        start = field.start + place * field.stride
        assert touched == list(range(start, start + field.size, field.step))
