"""Weights held as codebooks: packing, values, gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fxopt.codebook import CodebookWeight, packed_bytes


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", [(1,), (3, 5), (4, 2, 3, 3)])
def test_codes_survive_packing(bits: int, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, shape, generator=generator)
    codes.view(-1)[0] = 2**bits - 1
    book = torch.randn(1, 2**bits, generator=generator)
    held = CodebookWeight(codes, nn.Parameter(book), shape, bits)
    assert torch.equal(held(), book[0][codes])
    assert held.codes.dtype is torch.uint8
    assert held.codes.nbytes == packed_bytes(codes.numel(), bits)


@pytest.mark.parametrize(("bits", "expected"), [(1, 125), (2, 250), (3, 375), (4, 500), (7, 875), (8, 1000)])
def test_codes_take_no_more_than_their_bits(bits: int, expected: int) -> None:
    assert packed_bytes(1000, bits) == expected


def test_the_gradient_of_a_centroid_is_the_sum_over_its_weights() -> None:
    codes = torch.tensor([[0, 1, 1], [2, 0, 2]])
    held = CodebookWeight(codes, nn.Parameter(torch.zeros(1, 4)), (2, 3), 2)
    (held() * torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])).sum().backward()
    assert held.codebook.grad is not None
    assert held.codebook.grad.tolist() == [[17.0, 6.0, 40.0, 0.0]]


def test_a_codebook_for_each_row() -> None:
    book = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    held = CodebookWeight(torch.tensor([[0, 1, 1], [1, 0, 1]]), nn.Parameter(book), (2, 3), 1)
    assert held().tolist() == [[1.0, 2.0, 2.0], [4.0, 3.0, 4.0]]
    assert str(held) == "CodebookWeight([2, 3], bits=1, clusters=2 in 2 rows)"


def test_code_zero_may_stand_for_zero() -> None:
    book = torch.tensor([[1.5, -2.0]], requires_grad=True)
    held = CodebookWeight(torch.tensor([[0, 1, 2], [2, 0, 0]]), nn.Parameter(book), (2, 3), 2, zero=True)
    assert held().tolist() == [[0.0, 1.5, -2.0], [-2.0, 0.0, 0.0]]
    (held() * torch.arange(6.0).reshape(2, 3)).sum().backward()
    assert held.codebook.grad is not None
    assert held.codebook.grad.tolist() == [[1.0, 5.0]]
    assert str(held) == "CodebookWeight([2, 3], bits=2, clusters=2 and zero)"
