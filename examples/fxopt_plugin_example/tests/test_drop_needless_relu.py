"""What the pass removes, and what it leaves alone and why."""

from __future__ import annotations

import torch
from fxopt_plugin_example.drop_needless_relu import DropNeedlessRelu
from torch import nn

from fxopt.testing import assert_pass, assert_skips

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_drops_a_relu_behind_a_relu() -> None:
    model = nn.Sequential(nn.ReLU(), nn.ReLU()).eval()
    assert_pass(
        DropNeedlessRelu(),
        model,
        IMAGE,
        rewrites=1,
        skips=["its input may be negative: placeholder at input_1"],
        before="""
            %input_1 = input : f32[2, 3, 8, 8]
            %_0 = relu[0](%input_1) : f32[2, 3, 8, 8]
            %_1 = relu[1](%_0) : f32[2, 3, 8, 8]
            return (%_1,)
        """,
        after="""
            %input_1 = input : f32[2, 3, 8, 8]
            %_0 = relu[0](%input_1) : f32[2, 3, 8, 8]
            return (%_0,)
        """,
    )


def test_looks_through_what_keeps_the_sign() -> None:
    model = nn.Sequential(nn.Sigmoid(), nn.MaxPool2d(2), nn.Flatten(), nn.ReLU()).eval()
    assert_pass(DropNeedlessRelu(), model, IMAGE, rewrites=1, skips=[])


def test_looks_no_further_if_told_so() -> None:
    model = nn.Sequential(nn.Sigmoid(), nn.MaxPool2d(2), nn.ReLU()).eval()
    assert_skips(DropNeedlessRelu(look_through=False), model, IMAGE, ["its input may be negative: max_pool2d at _1"])


def test_leaves_a_relu_behind_a_convolution() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    assert_skips(DropNeedlessRelu(), model, IMAGE, ["its input may be negative: conv2d at _0"])
