"""Masked layers: they compute with the mask, whatever is in the weight, and are modules like others."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from fxopt.masking import mask_of, with_mask, without_mask, without_masks
from fxopt.registry import make_backend

LAYERS = [
    (nn.Linear(4, 6), (2, 4)),
    (nn.Conv1d(4, 6, 3), (2, 4, 7)),
    (nn.Conv2d(4, 6, 3, groups=2, padding_mode="reflect", padding=1), (2, 4, 7, 7)),
    (nn.Conv3d(4, 6, 1, bias=False), (2, 4, 3, 3, 3)),
    (nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1), (2, 4, 5)),
    (nn.ConvTranspose2d(4, 6, 3, groups=2, dilation=2), (2, 4, 5, 5)),
    (nn.ConvTranspose3d(4, 6, 2), (2, 4, 3, 3, 3)),
]


def drawn(layer: nn.Module) -> tuple[nn.Module, torch.Tensor]:
    """The layer in float64, and a mask for it."""
    generator = torch.Generator().manual_seed(0)
    layer = copy.deepcopy(layer).double()
    return layer, torch.rand(layer.get_parameter("weight").shape, generator=generator) < 0.5


@pytest.mark.parametrize(("layer", "shape"), LAYERS)
def test_a_masked_layer_is_the_layer_with_zeros(layer: nn.Module, shape: tuple[int, ...]) -> None:
    layer, mask = drawn(layer)
    x = torch.randn(*shape, dtype=torch.float64)
    masked = with_mask(layer, mask)
    zeroed = copy.deepcopy(layer)
    zeroed.get_parameter("weight").data.mul_(mask)
    assert torch.equal(masked(x), zeroed(x))
    assert mask_of(layer) is None
    assert mask_of(masked) is mask
    dense = copy.deepcopy(masked)
    dense.load_state_dict(layer.state_dict() | {"mask": mask})  # a dense checkpoint does not get around the mask
    assert torch.equal(dense(x), zeroed(x))
    plain = without_mask(dense)
    assert type(plain) is type(layer)
    assert plain.state_dict().keys() == layer.state_dict().keys()
    assert torch.equal(plain(x), zeroed(x))
    assert not torch.signbit(plain.get_parameter("weight")[~mask]).any()
    assert mask_of(with_mask(masked, ~mask)) is not mask


def test_gradients_of_masked_weights_are_zero() -> None:
    layer, mask = drawn(nn.Conv2d(4, 6, 3))
    masked = with_mask(layer, mask)
    masked(torch.randn(2, 4, 5, 5, dtype=torch.float64)).sum().backward()
    gradient: Any = masked.get_parameter("weight").grad
    assert torch.equal(gradient != 0, mask)


def test_sizes_asked_of_a_transposed_convolution_are_heeded() -> None:
    layer, mask = drawn(nn.ConvTranspose2d(4, 6, 3, stride=2))
    assert with_mask(layer, mask)(torch.randn(1, 4, 5, 5, dtype=torch.float64), [12, 11]).shape[2:] == (12, 11)


def test_weights_that_are_zero_already_are_shared() -> None:
    layer, mask = drawn(nn.Linear(4, 6))
    masked = with_mask(layer, mask)
    assert masked.get_parameter("weight") is not layer.get_parameter("weight")
    assert without_mask(masked).get_parameter("weight") is masked.get_parameter("weight")


def test_a_program_without_masks_is_itself() -> None:
    x = torch.randn(2, 4)
    program = fxopt.capture(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), x)
    assert without_masks(program) is program
    masked = fxopt.optimize(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), x, ["prune_weights"])
    plain = without_masks(masked)
    assert "masked" in masked.text()
    assert "masked" not in plain.text()
    assert torch.equal(plain.module(x), masked.module(x))


def test_an_eager_engine_without_masks_still_follows_the_training_of_its_program() -> None:
    x = torch.randn(2, 4)
    program = fxopt.optimize(nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval(), x, ["prune_weights"])
    engine = make_backend("eager").lower(program, dynamic_batch=True)
    before = engine(x)[0]
    module = program.module
    module(x).sum().backward()
    torch.optim.SGD(module.parameters(), 0.1).step()
    assert not torch.equal(engine(x)[0], before)
    assert torch.equal(engine(x)[0], module(x))
