"""Axes beside the batch that are free, through passes, engines, saving and loading."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional
from torchvision.models import resnet18

import fxopt
from fxopt.compare import compare
from fxopt.errors import InputError

Inputs = tuple[torch.Tensor, ...]
HEIGHT_AND_WIDTH = {"x": {2: "height", 3: "width"}}
LENGTH = {"tokens": {1: "length"}, "mask": {1: "length"}}


class UNet(nn.Module):
    """Goes down, and up again to the size of what it came from."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.down = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.last = nn.Conv2d(24, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        whole = self.first(x)
        half = self.down(whole).relu()
        up = functional.interpolate(half, size=whole.shape[-2:], mode="bilinear", align_corners=False)
        return self.last(torch.cat([whole, up], 1))


class Sequences(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.layer = kind(8, 16, batch_first=True, **options)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        given, _ = self.layer(x)
        # the shape of what the layer gives is read
        return given, x.mean(-1, keepdim=True).expand_as(given)


class Encoder(nn.Module):
    """Tokens, positions, and a mask of what is padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(60, 32)
        self.positions = nn.Embedding(64, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 3)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.embedding(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        x = self.encoder(x, src_key_padding_mask=mask)
        return {"hidden": x, "scores": self.head(x[:, 0])}


class Attention(nn.Module):
    """Attention written by hand, with a mask of numbers or, without one, causal."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(60, 32)
        self.project = nn.Linear(32, 96)
        self.out = nn.Linear(32, 32)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        x = self.embedding(tokens)
        batch, length, width = x.shape
        query, key, value = self.project(x).view(batch, length, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
        added = None if mask is None else (1 - mask)[:, None, None, :] * -1e4
        attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=added, is_causal=mask is None)
        return x + self.out(attended.transpose(1, 2).reshape(batch, length, width))


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, 60, (batch, length))


def padding(batch: int, length: int) -> torch.Tensor:
    return (torch.arange(length) >= length - 2).repeat(batch, 1)


class Subject(NamedTuple):
    model: nn.Module
    inputs: Inputs
    axes: dict[str, dict[int, str]]
    others: list[Inputs]


def subject(name: str) -> Subject:
    torch.manual_seed(0)
    if name == "convolutions":
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, stride=2))
        axes = {"input": {2: "height", 3: "width"}}
        return Subject(model, (torch.randn(1, 3, 32, 32),), axes, [(torch.randn(2, 3, 17, 40),)])
    if name == "resnet18":
        return Subject(
            resnet18(num_classes=10), (torch.randn(1, 3, 64, 64),), HEIGHT_AND_WIDTH, [(torch.randn(2, 3, 96, 41),)]
        )
    if name == "unet":
        return Subject(UNet(), (torch.randn(1, 3, 32, 32),), HEIGHT_AND_WIDTH, [(torch.randn(2, 3, 17, 40),)])
    if name in ("lstm", "gru", "rnn"):
        kind, options = {
            "lstm": (nn.LSTM, {"num_layers": 2}),
            "gru": (nn.GRU, {"bidirectional": True}),
            "rnn": (nn.RNN, {"nonlinearity": "relu", "bias": False}),
        }[name]
        model = Sequences(kind, **options)
        return Subject(model, (torch.randn(1, 10, 8),), {"x": {1: "length"}}, [(torch.randn(3, 17, 8),)])
    if name == "encoder":
        others = [(tokens(3, 19), padding(3, 19)), (tokens(2, 5), padding(2, 5))]
        return Subject(Encoder(), (tokens(1, 12), padding(1, 12)), LENGTH, others)
    if name == "masked":
        others = [(tokens(3, 19), 1.0 - padding(3, 19).float())]
        return Subject(Attention(), (tokens(2, 12), 1.0 - padding(2, 12).float()), LENGTH, others)
    return Subject(Attention(), (tokens(2, 12),), {"tokens": {1: "length"}}, [(tokens(3, 19),)])


@pytest.mark.parametrize("backend", ["eager", "onnx(num_threads=1)"])
@pytest.mark.parametrize(
    "name", ["convolutions", "resnet18", "unet", "lstm", "gru", "rnn", "encoder", "masked", "causal"]
)
def test_any_size_before_and_after_loading(name: str, backend: str, tmp_path: Path) -> None:
    model, inputs, axes, others = subject(name)
    compiled = fxopt.compile(model.eval(), inputs, backend=backend, dynamic_axes=axes)
    compiled.save(tmp_path / "out")
    loaded = fxopt.load(tmp_path / "out")
    assert loaded.engine.inputs == compiled.engine.inputs
    for given in (inputs, *others):
        with torch.no_grad():
            expected = model(*given)
        for engine in (compiled, loaded):
            torch.testing.assert_close(engine(*given), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("backend", ["eager", "onnx(num_threads=1)"])
@pytest.mark.parametrize("name", ["unet", "masked", "causal"])
def test_any_size_with_integers(name: str, backend: str, tmp_path: Path) -> None:
    model, inputs, axes, others = subject(name)
    calibration = [inputs, *[tuple(resized[: len(inputs[0])] for resized in given) for given in others]]
    compiled = fxopt.compile(
        model.eval(),
        inputs,
        passes=["default", "quantize"],
        backend=backend,
        dynamic_axes=axes,
        calibration=calibration,
    )
    compiled.save(tmp_path / "out")
    loaded = fxopt.load(tmp_path / "out")
    for given in others:
        with torch.no_grad():
            expected = model(*given)
        for engine in (compiled, loaded):
            difference = compare([expected], [engine(*given)])
            assert difference.sqnr_db > 20, str(difference)


def test_attention_over_five_axes_of_any_size() -> None:
    class Frames(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return functional.scaled_dot_product_attention(x, x, x)

    axes = {"x": {1: "frames", 3: "length"}}
    compiled = fxopt.compile(
        Frames().eval(), torch.randn(2, 3, 2, 4, 6), passes=[], backend="onnx(num_threads=1)", dynamic_axes=axes
    )
    x = torch.randn(3, 5, 2, 7, 6)
    torch.testing.assert_close(compiled(x), Frames()(x), rtol=1e-4, atol=1e-5)


def test_wrong_sizes_are_told_by_name() -> None:
    model, inputs, axes, _ = subject("encoder")
    compiled = fxopt.compile(model.eval(), inputs, passes=[], backend="eager", dynamic_axes=axes)
    with pytest.raises(InputError, match="input mask: expected length 9 as the inputs before it, got 8"):
        compiled(tokens(2, 9), padding(2, 8))
    with pytest.raises(InputError, match=re.escape("input tokens: expected shape [batch, length], got [2, 9, 1]")):
        compiled(tokens(2, 9)[..., None], padding(2, 9))


def test_the_batch_may_be_fixed_beside_a_free_axis() -> None:
    model, inputs, axes, _ = subject("convolutions")
    compiled = fxopt.compile(
        model.eval(), inputs, backend="onnx(num_threads=1)", dynamic_axes=axes, dynamic_batch=False
    )
    assert compiled.engine.info()["dynamic_batch"] is False
    x = torch.randn(1, 3, 17, 40)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-3, atol=1e-4)
    with pytest.raises(InputError, match=re.escape("expected shape [1, 3, height, width], got [2, 3, 17, 40]")):
        compiled(torch.randn(2, 3, 17, 40))
