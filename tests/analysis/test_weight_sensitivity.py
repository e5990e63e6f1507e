"""Mean squared gradients of weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt.analysis.weight_sensitivity import squared_gradients
from fxopt.errors import InputError


def data(batch: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(12, 3, generator=generator), torch.randint(0, 2, (12,), generator=generator)
    return list(zip(x.split(batch), y.split(batch), strict=True))


def by_sample(model: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    total = torch.zeros_like(weight)
    for x, y in data(1):
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), y), [weight])
        total += gradient.square()
    return total / 12


@pytest.mark.parametrize("batch", [1, 5, 12])
def test_each_sample_has_a_gradient_of_its_own(batch: int) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    program = fxopt.optimize(model, (data(2)[0][0],), [], calibration=data(batch))
    found = squared_gradients(program)
    assert sorted(found) == ["0.weight", "2.weight"]
    torch.testing.assert_close(found["0.weight"], by_sample(model, model[0].weight))
    torch.testing.assert_close(found["2.weight"], by_sample(model, model[2].weight))


def test_frozen_weights_have_gradients_too_and_nothing_is_written() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    expected = by_sample(model, model[0].weight)
    model.requires_grad_(False)
    program = fxopt.optimize(model, (data(2)[0][0],), [], calibration=data(4))
    torch.testing.assert_close(squared_gradients(program)["0.weight"], expected)
    assert all(item.grad is None and not item.requires_grad for item in program.module.parameters())


def test_tied_weights_have_one_sensitivity_under_both_names() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)).eval()
    model[2].weight = model[0].weight
    program = fxopt.optimize(model, (data(2)[0][0],), [], calibration=data(4))
    found = squared_gradients(program)
    assert found["0.weight"] is not found["2.weight"]
    torch.testing.assert_close(found["0.weight"], by_sample(model, model[0].weight))
    assert torch.equal(found["0.weight"], found["2.weight"])


def test_targets_that_do_not_divide_give_one_gradient_a_batch() -> None:
    torch.manual_seed(1)
    model = nn.Linear(3, 2).eval()
    batches = [(x, {"class": y}) for x, y in data(4)]

    def loss(output: Any, target: Any) -> torch.Tensor:
        return F.cross_entropy(output, target["class"])

    program = fxopt.optimize(model, (data(2)[0][0],), [], calibration=batches)
    program.loss = loss
    total = torch.zeros(2, 3)
    for x, y in data(4):
        total += torch.autograd.grad(F.cross_entropy(model(x), y), [model.weight])[0].square()
    (found,) = squared_gradients(program).values()
    torch.testing.assert_close(found, total / 3)


def test_a_loss_that_is_not_finite_is_refused() -> None:
    program = fxopt.optimize(nn.Linear(3, 2).eval(), (data(2)[0][0],), [], calibration=data(4))
    program.loss = lambda outputs, _: outputs.sum() / 0
    with pytest.raises(InputError, match="the loss is not finite"):
        squared_gradients(program)


def test_batches_without_targets_are_refused() -> None:
    program = fxopt.optimize(nn.Linear(3, 2).eval(), (data(2)[0][0],), [], calibration=[x for x, _ in data(4)])
    with pytest.raises(InputError, match="needs targets"):
        squared_gradients(program)
