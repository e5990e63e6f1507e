from __future__ import annotations

import torch
from torch import nn

import fxopt
from fxopt.analysis.sparsity import two_of_four


def test_two_of_four_is_read_from_the_weights() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 4, 1))
    for layer in model[:2]:
        layer.weight.data[:, 1::2] = 0
    # as many zeros, but three weights of the first four are left
    model[2].weight.data[:, 3:7] = 0
    nn.init.zeros_(model[3].weight)  # six inputs are no multiple of four
    x = torch.randn(1, 8, 5, 5)
    assert two_of_four(fxopt.capture(model, x)) == ["0", "1"]
