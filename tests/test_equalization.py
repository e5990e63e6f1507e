"""Scaling channels: nothing but rounding changes, and quantization loses less."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt import Program
from fxopt.analysis.scalable_channels import scalable_channels
from fxopt.equalization import equalizations, scale_channels
from fxopt.passes import Quantize
from fxopt.passes_base import Rewrite


class Inverted(nn.Module):
    """Expanded, depthwise, projected, pooled, classified."""

    def __init__(self, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.expand = nn.Conv2d(3, 12, 1)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.project = nn.Conv2d(12, 6, 1)
        self.grouped = nn.Conv2d(6, 8, 3, groups=2)
        self.head = nn.Linear(8, 4)
        self.activation = activation()

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.expand(x))
        x = self.project(self.activation(self.depthwise(x)))
        x = torch.max_pool2d(self.activation(self.grouped(x)), 2)
        out: Tensor = self.head(x.mean((2, 3)))
        return out


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.query, self.key = nn.Linear(16, 8), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.query(x) @ self.key(x).transpose(-2, -1)


def unequal(layer: Any, readers: list[Any], seed: int = 0) -> None:
    """Gives channels sizes that differ by up to a hundredfold."""
    count = len(layer.weight)
    factors = 10 ** (2 * torch.rand(count, generator=torch.Generator().manual_seed(seed)) - 1)
    with torch.no_grad():
        for tensor in (layer.weight, layer.bias):
            tensor.mul_(factors.reshape(-1, *[1] * (tensor.ndim - 1)))
        for reader in readers:
            groups = getattr(reader, "groups", 1)
            parts = reader.weight.reshape(groups, -1, reader.weight.shape[1], reader.weight[0, 0].numel())
            reader.weight.copy_((parts / factors.reshape(groups, 1, -1, 1)).reshape(reader.weight.shape))


@pytest.fixture
def images() -> list[Tensor]:
    return [torch.randn(32, 3, 10, 10, generator=torch.Generator().manual_seed(1)) for _ in range(2)]


def inverted() -> Inverted:
    torch.manual_seed(0)
    model = Inverted().eval()
    unequal(model.expand, [model.depthwise])
    unequal(model.depthwise, [model.project], 1)
    unequal(model.project, [model.grouped], 2)
    unequal(model.grouped, [model.head], 3)
    return model


def captured(model: nn.Module, batches: list[Tensor]) -> Program:
    return fxopt.optimize(model, (batches[0][:2],), ["fold_batch_norm"], calibration=batches, on_no_match="ignore")


def sqnr(expected: Tensor, found: Tensor) -> float:
    return float(10 * torch.log10(expected.square().sum() / (expected - found).square().sum()))


def test_which_channels_can_be_scaled(images: list[Tensor]) -> None:
    found = scalable_channels(captured(Inverted().eval(), images))
    assert [(item.giver, item.values, item.readers) for item in found] == [
        ("expand", ("activation",), ("depthwise",)),
        ("depthwise", ("activation_1",), ("project",)),
        ("project", ("project",), ("grouped",)),
        ("grouped", ("mean",), ("head",)),
    ]
    tokens = [torch.randn(4, 5, 16)]
    found = scalable_channels(captured(Attention().eval(), tokens))
    assert [(item.giver, item.readers) for item in found] == [("norm", ("query", "key"))]


@pytest.mark.parametrize("activation", [nn.ReLU6, nn.GELU, nn.Hardswish])
def test_what_does_not_scale_is_left_alone(activation: type[nn.Module], images: list[Tensor]) -> None:
    program = captured(Inverted(activation).eval(), images)
    assert [item.giver for item in scalable_channels(program)] == ["project"]


class Mixing(nn.Module):
    """Something between two layers that mixes channels where it stands."""

    def __init__(self, giver: nn.Module, between: nn.Module, reader: nn.Module) -> None:
        super().__init__()
        self.giver, self.between, self.reader = giver, between, reader

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.reader(self.between(self.giver(x)))
        return out


class Mean(nn.Module):
    def __init__(self, *axes: int) -> None:
        super().__init__()
        self.axes = axes

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(self.axes)


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (Mixing(nn.LayerNorm(8), nn.AvgPool1d(3, 1, 1), nn.Linear(8, 4)), (2, 5, 8)),
        (Mixing(nn.Linear(8, 8), nn.MaxPool1d(3, 1, 1), nn.Linear(8, 4)), (2, 5, 8)),
        (Mixing(nn.Conv1d(5, 8, 3, padding=1), Mean(1), nn.Linear(8, 4)), (2, 5, 8)),
        (Mixing(nn.Conv1d(5, 8, 3, padding=1), nn.AvgPool2d(3, 1, 1), nn.Conv1d(8, 4, 1)), (2, 5, 8)),
        (Mixing(nn.Linear(8, 5), Mean(2), nn.Linear(5, 4)), (2, 5, 8)),
    ],
)
def test_what_mixes_channels_where_they_stand_is_left_alone(model: nn.Module, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    assert not scalable_channels(captured(model.eval(), [torch.randn(shape)]))


def test_places_may_be_pooled_and_averaged() -> None:
    model = Mixing(nn.Conv1d(5, 8, 3), nn.Sequential(nn.AvgPool1d(2), Mean(-1)), nn.Linear(8, 4)).eval()
    assert [item.readers for item in scalable_channels(captured(model, [torch.randn(2, 5, 8)]))] == [("reader",)]


def test_scaling_that_changes_outputs_is_refused_and_no_other(
    images: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, image = inverted(), (images[0][:2],)
    wrong, right = list(equalizations(captured(model, images), ["depthwise", "project"], per_channel=True))
    wrong = wrong._replace(channels=wrong.channels._replace(readers=()))
    monkeypatch.setattr("fxopt.quantizers.static.equalizations", lambda *_, **__: [wrong, right])
    program = fxopt.optimize(model, image, ["fold_batch_norm", Quantize()], calibration=images, on_no_match="ignore")
    (skip,) = (skip for skip in program.report.passes[-1].skips if skip.node == "expand" and "scaled" in skip.why)
    assert skip.why.startswith("its channels are not scaled, as that changes outputs: relative error")
    assert [item.node for item in program.report.passes[-1].rewrites if "factors" in item.params] == ["depthwise"]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        out: Tensor = self.second(x) + x
        return out


def test_a_value_that_something_else_reads_is_left_alone(images: list[Tensor]) -> None:
    assert not scalable_channels(captured(Residual().eval(), images))
    shared = nn.Conv2d(3, 3, 1)
    assert not scalable_channels(captured(nn.Sequential(shared, nn.ReLU(), shared).eval(), images))


@pytest.mark.parametrize("per_channel", [True, False])
def test_scaling_is_exact_in_float64(per_channel: bool, images: list[Tensor]) -> None:
    model = inverted().double()
    batches = [batch.double() for batch in images]
    program = captured(model, batches)
    layers = ["depthwise", "project", "grouped", "head"]
    found = list(equalizations(program, layers, per_channel=per_channel))
    assert found
    changed = program.copy()
    for item in found:
        scale_channels(changed, item.channels.giver, item.channels.readers, item.factors)
    with torch.no_grad():
        expected, scaled = model(batches[0]), changed.module(batches[0])
    assert float((expected - scaled).abs().max() / expected.abs().max()) < 1e-12
    assert torch.equal(program.module.state_dict()["expand.weight"], model.state_dict()["expand.weight"])


@pytest.mark.parametrize(("per_channel", "gain"), [(True, 0.5), (False, 4.0)])
def test_quantization_loses_less(per_channel: bool, gain: float, images: list[Tensor]) -> None:
    model = inverted()
    fresh = torch.randn(64, 3, 10, 10, generator=torch.Generator().manual_seed(5))
    found = {}
    for equalize in ("auto", "off"):
        pass_ = Quantize(equalize=equalize, per_channel=per_channel, round="nearest")  # type: ignore[arg-type]
        program = fxopt.optimize(
            model, (images[0][:2],), ["fold_batch_norm", pass_], calibration=images, on_no_match="ignore"
        )
        with torch.no_grad():
            found[equalize] = sqnr(model(fresh), program.module(fresh))
    assert found["auto"] > found["off"] + gain


def test_a_norm_gives_scaled_channels_to_all_that_read_it() -> None:
    torch.manual_seed(0)
    model = Attention().eval()
    with torch.no_grad():
        model.norm.weight[3] = 40.0  # as in large transformers: few channels are far larger than the rest
    tokens = [torch.randn(16, 5, 16)]
    program = captured(model, tokens)
    (found,) = equalizations(program, ["query", "key"], per_channel=True)
    assert found.channels.readers == ("query", "key")
    assert found.noise < 0.2
    losses = {}
    for equalize in ("auto", "off"):
        quantized = fxopt.optimize(
            model,
            (tokens[0],),
            ["fold_batch_norm", Quantize(equalize=equalize, round="nearest", observer="minmax")],  # type: ignore[arg-type]
            calibration=tokens,
            on_no_match="ignore",
        )
        with torch.no_grad():
            losses[equalize] = sqnr(model(tokens[0]), quantized.module(tokens[0]))
    assert losses["auto"] > losses["off"] + 3


def test_channels_that_are_equal_are_left_as_they_are(images: list[Tensor]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(3).repeat(3, 1)[:8].reshape(8, 3, 1, 1))
        model[2].weight.copy_(torch.where(model[2].weight > 0, 0.5, -0.5))
    program = fxopt.optimize(
        model, (images[0],), ["fold_batch_norm", Quantize()], calibration=images, on_no_match="ignore"
    )
    assert not [item for item in program.report.passes[-1].rewrites if "factors" in item.params]


def test_a_decision_says_what_it_is_worth(images: list[Tensor]) -> None:
    (_, plan) = fxopt.explain(inverted(), (images[0][:2],), ["fold_batch_norm", "quantize"], calibration=images)
    first = next(item for item in plan.rewrites if "factors" in item.params)
    assert isinstance(first, Rewrite)
    assert first.node == "expand"
    assert first.what.startswith("12 channels scaled, for depthwise: ")
    assert first.what.endswith("% less noise is expected")
