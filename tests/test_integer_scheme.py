"""Which layers become integers on which target."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxopt
from fxopt import Target
from fxopt.passes import Quantize
from fxopt.registry import make_backend


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, groups=16),
        nn.Conv2d(16, 8, 1),
        nn.ReLU(),
        nn.Conv2d(8, 4, 3),
        nn.ReLU(),
        nn.Conv2d(4, 16, 1),
        nn.Conv2d(16, 8, 3, groups=8),
    ).eval()


@pytest.mark.parametrize(
    ("instructions", "small"),
    [("AVX2", {"_0": 27, "_8": 18}), ("AVX512", {"_0": 27, "_8": 18}), ("AVX512 VNNI", {}), ("DEFAULT", {})],
)
def test_small_convolutions_stay_where_integers_gain_nothing(instructions: str, small: dict[str, int]) -> None:
    x = torch.randn(2, 3, 12, 12)
    program = fxopt.optimize(
        network(),
        x,
        ["fold_batch_norm", Quantize(round="nearest")],
        calibration=[x],
        on_no_match="ignore",
        target=Target(instruction_set=instructions),
    )
    skips = {skip.node: skip.why for skip in program.report.passes[-1].skips}
    text = "it adds up {} products, no faster with integers on this target"
    assert skips == {name: text.format(terms) for name, terms in small.items()}
    # a depthwise layer has a kernel of its own, and one place alone needs none
    held = sum(program.op(node) == "quantized_tensor" for node in program.nodes)
    assert held == 6 - len(small)


def test_of_a_small_convolution_alone_the_reason_is_told() -> None:
    x = torch.randn(2, 3, 8, 8)
    with pytest.raises(fxopt.errors.InputError, match="it adds up 27 products, no faster with integers"):
        fxopt.optimize(
            nn.Conv2d(3, 4, 3).eval(),
            x,
            ["fold_batch_norm", "quantize"],
            calibration=[x],
            on_no_match="ignore",
            target=Target(instruction_set="AVX2"),
        )


def test_openvino_gains_by_small_ones_too() -> None:
    assert make_backend("openvino").scheme(Target(instruction_set="AVX2")).fewest_terms == 0
    assert make_backend("onnx").scheme(Target(instruction_set="AVX2")).fewest_terms > 27
