"""Least squares from sums: what ordinary least squares finds where there is enough data, and never much worse."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxopt.regression import Regression

SHIFT = 30.0  # means that are large beside the deviations


def drawn(rows: int, groups: int, length: int, outputs: int, noise: float, seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    weight, bias = normal(groups, length, outputs), normal(groups, outputs)
    inputs = normal(groups, rows, length) + SHIFT
    outputs_ = inputs @ weight + bias.unsqueeze(1) + noise * normal(groups, rows, outputs)
    return weight, bias, inputs, outputs_


def fitted(known: Tensor, inputs: Tensor, outputs: Tensor) -> Regression:
    regression = Regression(known)
    for number, (some, theirs) in enumerate(zip(inputs.split(50, 1), outputs.split(50, 1), strict=True)):
        regression.add(number % 2, some, theirs)
    return regression


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_linear_is_found(dtype: torch.dtype) -> None:
    weight, bias, inputs, outputs = drawn(2000, 2, 5, 3, 0.0, 0)
    found, offset, left, before = fitted(torch.zeros_like(weight), inputs.to(dtype), outputs.to(dtype)).solve()
    # the least ridge that is tried
    torch.testing.assert_close(found, weight, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        inputs.mean(1, keepdim=True) @ found + offset.unsqueeze(1), outputs.mean(1, keepdim=True)
    )
    assert left < 1e-7
    assert before == pytest.approx(1, abs=0.02)
    assert (bias - offset).abs().max() < 0.1


def test_it_agrees_with_least_squares_on_noisy_data() -> None:
    _, _, inputs, outputs = drawn(4000, 1, 6, 2, 0.5, 1)
    found, _, left, _ = fitted(torch.zeros(1, 6, 2, dtype=torch.float64), inputs, outputs).solve()
    centred = inputs[0] - inputs[0].mean(0)
    expected = torch.linalg.lstsq(centred, outputs[0] - outputs[0].mean(0)).solution
    torch.testing.assert_close(found[0], expected, atol=1e-3, rtol=0)
    residual = (outputs[0] - outputs[0].mean(0)) - centred @ expected
    share = residual.square().sum(0) / (outputs[0] - outputs[0].mean(0)).square().sum(0)
    assert left == pytest.approx(float(share.mean()), rel=0.05)


def test_a_few_samples_do_not_spoil_weights_that_are_right() -> None:
    weight, _, inputs, outputs = drawn(100, 1, 120, 3, 0.5, 2)
    found, _, left, before = fitted(weight, inputs, outputs).solve()
    free, _, _, _ = fitted(torch.zeros_like(weight), inputs, outputs).solve()
    assert left <= before
    assert (found - weight).norm() < 0.05 * weight.norm()
    # without knowing them they would not be found
    assert (free - weight).norm() > 0.3 * weight.norm()


def test_without_a_second_half_only_the_bias_is_fitted() -> None:
    weight, bias, inputs, outputs = drawn(40, 1, 5, 3, 0.0, 3)
    regression = Regression(weight + 1)
    regression.add(1, inputs, outputs)
    found, offset, left, _ = regression.solve()
    assert torch.equal(found, weight + 1)
    assert left != left
    assert not torch.allclose(offset, bias)
    torch.testing.assert_close((inputs @ found + offset).mean(1), outputs.mean(1))


def test_inputs_that_are_constant_are_no_trouble() -> None:
    inputs = torch.ones(1, 200, 4, dtype=torch.float64)
    outputs = torch.randn(1, 200, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    known = torch.ones(1, 4, 2, dtype=torch.float64)
    found, offset, _, _ = fitted(known, inputs, outputs).solve()
    assert torch.equal(found, known)
    torch.testing.assert_close((inputs @ found + offset).mean(1), outputs.mean(1))


def test_each_output_goes_as_far_as_its_own_data_do() -> None:
    weight, _, inputs, outputs = drawn(100, 1, 80, 2, 0.5, 4)
    clear = inputs @ torch.ones_like(weight)[..., :1] * 1e-3  # a thousandth of the other's size, and without noise
    both = torch.cat([clear, outputs[..., 1:]], 2)
    known = torch.cat([torch.zeros_like(weight[..., :1]), weight[..., 1:]], 2)
    found, _, _, _ = fitted(known, inputs, both).solve()
    assert (found[..., 0] - 1e-3).abs().max() < 1e-4
    assert (found[..., 1] - weight[..., 1]).norm() < 0.05 * weight[..., 1].norm()
