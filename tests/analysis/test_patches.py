"""The patches of a layer's input, times its weight, are what it gives: for every kind of layer and position."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fxopt.analysis.patches import PatchLayer

CASES = {
    "linear": (nn.Linear(6, 4), (5, 6)),
    "linear over tokens": (nn.Linear(6, 4, bias=False), (5, 3, 7, 6)),
    "conv1d": (nn.Conv1d(6, 4, 3, stride=2, padding=1), (5, 6, 11)),
    "conv2d": (nn.Conv2d(6, 4, (3, 2), stride=(2, 1), padding=(0, 1)), (5, 6, 9, 8)),
    "conv3d": (nn.Conv3d(2, 4, (1, 2, 3), padding=(0, 1, 1)), (3, 2, 4, 5, 6)),
    "dilated": (nn.Conv2d(6, 4, 3, dilation=(2, 1), padding=2), (5, 6, 9, 9)),
    "grouped": (nn.Conv2d(6, 4, 3, groups=2), (5, 6, 7, 7)),
    "depthwise": (nn.Conv2d(6, 12, 3, groups=6, padding=1, bias=False), (5, 6, 7, 7)),
    "same, even kernel": (nn.Conv2d(6, 4, (4, 3), padding="same", dilation=(1, 2)), (5, 6, 9, 9)),
    "valid": (nn.Conv2d(6, 4, 3, padding="valid"), (5, 6, 7, 7)),
    "reflect": (nn.Conv2d(6, 4, 3, padding=(2, 1), padding_mode="reflect"), (5, 6, 7, 7)),
    "circular": (nn.Conv1d(6, 4, 5, padding=2, padding_mode="circular"), (5, 6, 9)),
    "replicate, same": (nn.Conv2d(6, 4, 3, padding="same", padding_mode="replicate"), (5, 6, 7, 7)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("case", CASES)
def test_patches_times_the_weight_are_what_the_layer_gives(case: str) -> None:
    module, shape = CASES[case]
    module = module.double()
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = module(x)
    layer = PatchLayer(module)
    positions = layer.positions(output)
    assert positions * len(x) * output.shape[-1 if isinstance(module, nn.Linear) else 1] == output.numel()
    for picks in (torch.arange(positions), torch.randperm(positions, generator=torch.Generator().manual_seed(1))[:4]):
        patches = layer.patches(x, output, picks)
        assert patches.shape == (layer.groups, len(x) * len(picks), layer.length)
        found = patches @ layer.weight
        if module.bias is not None:
            found = found + module.bias.detach().reshape(layer.groups, 1, -1)
        torch.testing.assert_close(found, layer.rows(output, picks), atol=1e-12, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_a_weight_comes_back_in_its_own_shape(case: str) -> None:
    module = CASES[case][0].float()
    layer = PatchLayer(module)
    found = layer.as_weight(layer.weight)
    assert found.dtype == torch.float32
    assert torch.equal(found, module.weight)
