"""Transformers through capture, passes and ONNX Runtime: masks that are inputs, tokens, and whole networks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torchvision.models import VisionTransformer

import fxopt
from fxopt.frontends.attention import plain_attention

BACKEND = "onnx(num_threads=1)"


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor, padding: torch.Tensor) -> tuple[torch.Tensor, ...]:
        attended, weights = self.attention(x, x, x, attn_mask=attn_mask, key_padding_mask=padding)
        return attended, weights


class Translator(nn.Module):
    """An encoder and a decoder, of two kinds of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(20, 16), nn.Embedding(30, 16)
        self.transformer = nn.Transformer(16, 2, 1, 1, 32, batch_first=True)

    def forward(self, source: torch.Tensor, target: torch.Tensor, padding: torch.Tensor) -> dict[str, torch.Tensor]:
        causal = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        given = self.transformer(
            self.source(source), self.target(target), tgt_mask=causal, src_key_padding_mask=padding, tgt_is_causal=True
        )
        return {"states": given, "scores": given @ self.target.weight.t()}


def assert_same(model: nn.Module, inputs: Any, others: Any, axes: Any = None) -> fxopt.Compiled:
    compiled = fxopt.compile(model.eval(), inputs, backend=BACKEND, dynamic_axes=axes)
    for given in (inputs, others):
        with torch.no_grad(), plain_attention():
            torch.testing.assert_close(compiled(*given), model(*given), rtol=1e-3, atol=1e-4)
    return compiled


@pytest.mark.parametrize("boolean", [True, False], ids=["bool", "float"])
def test_masks_that_are_inputs(boolean: bool) -> None:
    def inputs(batch: int, length: int) -> tuple[torch.Tensor, ...]:
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        padding = (torch.arange(length) >= length - 2).repeat(batch, 1)
        masks = (later, padding)
        if not boolean:
            masks = tuple(torch.zeros(mask.shape).masked_fill(mask, -math.inf) for mask in masks)
        return torch.randn(batch, length, 16), *masks

    axes = {"x": {1: "length"}, "attn_mask": {0: "length", 1: "length"}, "padding": {1: "length"}}
    assert_same(Attending(), inputs(3, 8), inputs(2, 11), axes)


def test_an_encoder_and_a_decoder() -> None:
    def inputs(batch: int, source: int, target: int) -> tuple[torch.Tensor, ...]:
        padding = (torch.arange(source) >= source - 2).repeat(batch, 1)
        return torch.randint(0, 20, (batch, source)), torch.randint(0, 30, (batch, target)), padding

    axes = {"source": {1: "source_length"}, "target": {1: "target_length"}, "padding": {1: "source_length"}}
    assert_same(Translator(), inputs(2, 9, 6), inputs(3, 5, 8), axes)


def test_what_is_padding_is_computed_where_torch_leaves_it_out() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1)

        def forward(self, x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
            return self.encoder(x, src_key_padding_mask=padding)

    def inputs(batch: int, length: int) -> tuple[torch.Tensor, ...]:
        return torch.randn(batch, length, 16), (torch.arange(length) >= length - 2).repeat(batch, 1)

    compiled = assert_same(Encoder(), inputs(2, 9), inputs(3, 6), {"x": {1: "length"}, "padding": {1: "length"}})
    assert "what is padding is computed like the rest; torch's fast path gives zeros for it, or leaves it out" in (
        compiled.report.notes
    )


def test_a_vision_transformer() -> None:
    torch.manual_seed(0)
    model = VisionTransformer(32, 8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=5)
    nn.init.normal_(model.heads.head.weight)  # it starts as zeros
    assert_same(model, (torch.randn(1, 3, 32, 32),), (torch.randn(3, 3, 32, 32),))


def test_a_vision_transformer_of_another_library() -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5, dynamic_img_size=True)
    others = (torch.randn(2, 3, 48, 64),)
    assert_same(model, (torch.randn(1, 3, 32, 32),), others, {"x": {2: "height", 3: "width"}})
