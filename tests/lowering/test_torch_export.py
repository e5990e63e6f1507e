from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fxopt.errors import BackendError
from fxopt.free_axes import BATCH
from fxopt.lowering.torch_export import export

X = torch.randn(2, 3)
FREE = {(0, 0): BATCH}


def test_a_free_batch() -> None:
    exported, reason = export(nn.Linear(3, 2), (X,), FREE)
    assert reason == ""
    assert exported.module(check_guards=False)(torch.randn(5, 3)).shape == (5, 2)


def test_a_batch_that_cannot_be_free_is_fixed_with_the_reason() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.ones(2, 3)

    exported, reason = export(Fixed(), (X,), FREE)
    assert reason
    assert torch.equal(exported.module()(X), X + 1)


def test_what_cannot_be_exported_says_so() -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if bool(x.sum() > 0) else x

    with pytest.raises(BackendError, match=r"torch\.export cannot export this program: ") as caught:
        export(Branches(), (X,), FREE)
    assert caught.value.__cause__ is not None
