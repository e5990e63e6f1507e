"""Channels: what belongs together, what is locked and why; and that removing any of them is exact."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn

import fxopt
from benchmarks.silenced import run_silenced
from fxopt import Program, edit
from fxopt.analysis.channel_scope import Attention
from fxopt.analysis.channels import Channels, find_channels
from fxopt.analysis.labels import Labels
from fxopt.analysis.shapes import shapes
from fxopt.compare import compare
from fxopt.removal import remove_channels
from fxopt.testing import assert_untouched, model_state, random_program

TOLERANCE = 1e-9


class Model(nn.Module):
    """Layers in a dictionary, and a forward that is given."""

    def __init__(self, forward: Callable[..., torch.Tensor], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self._forward = forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._forward(self, x)


def captured(model: nn.Module, *shape: int) -> Program:
    generator = torch.Generator().manual_seed(0)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point():
            values = torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * 0.5
            tensor.data = values.abs() + 0.5 if name.endswith("running_var") else values
    return fxopt.capture(model.eval().double(), torch.randn(*shape, generator=generator, dtype=torch.float64))


def free(channels: Channels) -> dict[str, int]:
    return {group.name: len(group) for group in channels.groups if group.locked is None}


def locked(channels: Channels) -> dict[str, str]:
    return {group.name: group.locked for group in channels.groups if group.locked is not None}


def some_units(channels: Channels, source: random.Random) -> list[int]:
    """Any units, of each group one at least left."""
    units: list[int] = []
    for group in channels.groups:
        if group.locked is None:
            units += source.sample(group.units, source.randint(0, len(group) - 1))
    return units


def assert_exact(program: Program, channels: Channels, units: list[int]) -> Program:
    """The property that proves a removal, on two batch sizes; also that shapes are what the labels say."""
    text = program.text()
    pruned = program.copy()
    left = remove_channels(pruned, channels, units)
    edit.clean(pruned)
    assert program.text() == text
    known = pruned.analysis(shapes)
    for node in pruned.nodes:
        value = left.values.get(node.name)
        assert not isinstance(value, Labels) or known[node.name].shape == value.shape, node.name
    for size in (None, 3):
        inputs = program.inputs_with_batch(size, seed=1)
        difference = compare(run_silenced(program, channels, units, inputs), pruned.run(*inputs))
        assert difference.within(TOLERANCE), f"{difference}\n{pruned}"
    return pruned


def assert_all_removals_exact(program: Program, channels: Channels, *, trials: int = 3) -> None:
    for seed in range(trials):
        assert_exact(program, channels, some_units(channels, random.Random(seed)))


def test_a_residual_ties_what_is_added() -> None:
    model = Model(
        lambda m, x: m.head(m.second(F.relu(m.first(m.stem(x)))) + m.stem(x)),
        stem=nn.Conv2d(3, 8, 3, padding=1),
        first=nn.Conv2d(8, 6, 1),
        second=nn.Conv2d(6, 8, 1),
        head=nn.Conv2d(8, 2, 1),
    )
    program = captured(model, 2, 3, 6, 6)
    channels = find_channels(program)
    assert free(channels) == {"stem.weight": 8, "first.weight": 6}
    assert locked(channels) == {"head.weight": "an output of the model"}
    members = [channels.members[index] for index in channels.groups[0].members]
    held = [(item.node, item.name) for item in members if item.axis is not None]
    assert held == [
        ("stem", "weight"),
        ("stem", "bias"),
        ("first", "weight"),
        ("second", "weight"),
        ("second", "bias"),
        ("stem_1", "weight"),
        ("stem_1", "bias"),
        ("head", "weight"),
    ]
    assert_all_removals_exact(program, channels)


def test_what_is_removed_shows_in_the_modules() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 2, 1)
    )
    program = captured(model, 2, 3, 8, 8)
    state = model_state(model)
    channels = find_channels(program)
    pruned = assert_exact(program, channels, list(channels.groups[0].units[:3]))
    module = pruned.module
    first, norm, grouped, last = (module.get_submodule(name) for name in "0134")
    assert (first.out_channels, norm.num_features, grouped.groups, grouped.in_channels) == (5, 5, 5, 5)
    assert (grouped.out_channels, last.in_channels, last.out_channels) == (5, 5, 2)
    assert norm.running_mean.shape == (5,)
    assert [name for name, _ in module.named_parameters()] == [name for name, _ in model.named_parameters()]
    module.train()(torch.randn(2, 3, 8, 8, dtype=torch.float64)).sum().backward()
    assert first.weight.grad is not None
    assert_untouched(model, state)


@pytest.mark.parametrize("groups", [2, 4, 8])
def test_grouped_convolutions(groups: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 32, 3, groups=groups), nn.ReLU(), nn.Conv2d(32, 2, 1))
    program = captured(model, 2, 3, 6, 6)
    channels = find_channels(program)
    # groups that are no wider than they are many go as a whole, others shrink alike
    assert free(channels) == ({"0.weight": groups} if groups > 2 else {"0.weight": 8, "1.weight": 16})
    assert_all_removals_exact(program, channels)


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        (nn.Conv1d, (2, 3, 9)),
        (nn.Conv3d, (2, 3, 5, 5, 5)),
        (nn.ConvTranspose1d, (2, 3, 5)),
        (nn.ConvTranspose2d, (2, 3, 4, 4)),
    ],
)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_convolutions_of_any_kind(kind: type[nn.Module], shape: tuple[int, ...], groups: int) -> None:
    model = nn.Sequential(kind(3, 8, 3), nn.PReLU(8), kind(8, 8, 2, groups=groups), nn.PReLU(), kind(8, 2, 1))
    program = captured(model, *shape)
    assert free(find_channels(program))
    assert_all_removals_exact(program, find_channels(program))


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(8),
        nn.BatchNorm2d(8, affine=False),
        nn.GroupNorm(1, 8),
        nn.GroupNorm(2, 8),
        nn.GroupNorm(8, 8),
        nn.InstanceNorm2d(8),
        nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
    ],
    ids=str,
)
def test_norms(norm: nn.Module) -> None:
    program = captured(nn.Sequential(nn.Conv2d(3, 8, 1), norm, nn.SiLU(), nn.Conv2d(8, 2, 1)), 2, 3, 4, 4)
    channels = find_channels(program)
    assert free(channels) == {"0.weight": 4 if "2, 8" in str(norm) else 8}
    assert_all_removals_exact(program, channels)


def to_windows(x: torch.Tensor) -> torch.Tensor:
    """[B, 8, 4, 4] -> [B * 4 windows, 4 places, 8]."""
    return x.view(-1, 8, 2, 2, 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(-1, 4, 8)


def from_windows(x: torch.Tensor) -> torch.Tensor:
    return x.view(-1, 2, 2, 2, 2, 8).permute(0, 5, 1, 3, 2, 4).reshape(-1, 8, 4, 4)


def last(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 2, 3, 1)


def first(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 3, 1, 2)


def counted_by_another(m: Any, x: torch.Tensor) -> torch.Tensor:
    count = m.gate(x).shape[1]
    return x.flatten(1).view(x.shape[0], count, -1)[:, : 2 * count // 2].view(x.shape)


def of_statistics(x: torch.Tensor) -> torch.Tensor:
    large, small = x.amax((2, 3), keepdim=True), torch.amin(x, -1, keepdim=True)
    return x - large + small / (1 + x.std(3, keepdim=True) + x.var(2, keepdim=True) + x.norm(dim=(2, 3), keepdim=True))


LAYOUTS: dict[str, Callable[[nn.Module, torch.Tensor], torch.Tensor]] = {
    "permute": lambda m, x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    "flatten": lambda m, x: x.flatten(1).view(x.shape[0], 8, 4, 4),
    "written sizes": lambda m, x: x.reshape(-1, 8, 16).transpose(1, 2).reshape(-1, 4, 4, 8).permute(0, 3, 1, 2),
    "the shape asked for": lambda m, x: x.reshape(x.shape).unflatten(2, (2, 2)).flatten(2).unflatten(2, x.shape[2:]),
    "asked sizes": lambda m, x: x.view(x.shape[0], x.shape[1], -1).view(x.size(0), x.size(1), 4, 4),
    "shuffle": lambda m, x: x.view(-1, 2, 4, 4, 4).transpose(1, 2).reshape(-1, 8, 4, 4),
    "nn.ChannelShuffle": lambda m, x: F.channel_shuffle(x, 2),
    "chunks": lambda m, x: torch.cat([part * 2 for part in x.chunk(2, 1)], 1),
    "uneven parts": lambda m, x: torch.cat(x.split([3, 5], 1)[::-1], 1),
    "gate": lambda m, x: torch.cat([x[:, :4] * x[:, 4:].sigmoid(), x[:, 2:6]], 1),
    "narrow": lambda m, x: torch.cat([x.narrow(1, 2, 6), x.narrow(1, 0, 2)], 1),
    "stack": lambda m, x: torch.stack([x, x * 2], 1).sum(1),
    "unbind": lambda m, x: torch.cat(torch.unbind(x.unflatten(1, (2, 4)), 1), 1),
    "radix": lambda m, x: torch.cat([x, x.view(-1, 2, 4, 4, 4).softmax(1).sum(1)], 1)[:, :8],
    "flip": lambda m, x: x.flip(1),
    "roll in space": lambda m, x: x.roll(1, 2),
    "pad": lambda m, x: F.pad(x, (1, 1, 0, 2)),
    "expand": lambda m, x: x.mean((2, 3), keepdim=True).expand(-1, 8, 4, 4),
    "repeat": lambda m, x: x.repeat(1, 1, 2, 1),
    "squeeze": lambda m, x: x.unsqueeze(1).squeeze(1),
    "squeeze and excite": lambda m, x: x * torch.sigmoid(m.gate(x.mean((2, 3), keepdim=True))),
    "spatial gate": lambda m, x: x * m.one(x).sigmoid(),
    "pool": lambda m, x: F.interpolate(F.max_pool2d(x, 2), scale_factor=2),
    "pixel shuffle": lambda m, x: F.pixel_unshuffle(F.pixel_shuffle(x, 2), 2),
    "windows": lambda m, x: from_windows(to_windows(x)),
    "scaled by a parameter": lambda m, x: x * m.scale.weight.view(1, -1, 1, 1),
    "normalised over space": lambda m, x: F.normalize(x, dim=-1),
    "a product with space": lambda m, x: torch.matmul(x, x.transpose(2, 3)),
    "einsum": lambda m, x: torch.einsum("bchw,bchv->bcwv", x, x),
    "batch and channels folded": lambda m, x: x.reshape(x.shape[0] * 16, 2, 4).transpose(1, 2).reshape(x.shape),
    "folded beside an open size": lambda m, x: x.reshape(x.shape[0] * 16, -1, 4).flip(1).reshape(x.shape[0], 8, 4, 4),
    "folded and expanded": lambda m, x: x.reshape(-1, 1, 4, 4).expand(x.shape[0] * 8, 2, 4, 4).sum(1).reshape(x.shape),
    "sizes asked of another": counted_by_another,
    "the shape of another": lambda m, x: (x * 2).flatten(1).view_as(x).reshape_as(x),
    "expanded as another": lambda m, x: x.mean((2, 3), keepdim=True).expand_as(x).type_as(x),
    "repeated in place": lambda m, x: x.repeat_interleave(2, dim=1).unflatten(1, (8, 2)).sum(2),
    "statistics of each": lambda m, x: of_statistics(x),
    "masked": lambda m, x: torch.where(x <= 1, x, torch.rsub(x, 1)) * torch.reciprocal(1 + x.square()),
    "gated": lambda m, x: torch.cat([F.glu(x, 1)] * 2, 1),
    "windows of rows": lambda m, x: x.unfold(2, 2, 2).flatten(2).view(x.shape),
    "patches": lambda m, x: F.fold(F.unfold(x, 2, stride=2), (4, 4), 2, stride=2),
    "patches by channel": lambda m, x: F.unfold(x, 2, stride=2).view(-1, 8, 4, 4),
    "along the tokens": lambda m, x: m.tokens(x.flatten(2)).relu().view(x.shape),
    "normalised along the tokens": lambda m, x: m.along(x.flatten(2)).view(x.shape),
    "layer norm of a computed weight": lambda m, x: first(F.layer_norm(last(x), (8,), m.scale.weight * 2)),
    "rms norm of a computed weight": lambda m, x: first(F.rms_norm(last(x), [8], weight=m.scale.weight * 2, eps=0.1)),
    "group norm of a computed weight": lambda m, x: F.group_norm(x, 1, m.scale.weight * 2, eps=0.1),
    "groups norm of a computed weight": lambda m, x: F.group_norm(x, 2, bias=m.scale.weight * 2),
    "channel norm of a computed weight": lambda m, x: F.group_norm(x, num_groups=8, weight=m.scale.weight * 2),
    "batch norm of a computed weight": lambda m, x: F.batch_norm(x, None, None, m.scale.weight * 2, training=True),
    "prelu of a computed weight": lambda m, x: F.prelu(x, m.scale.weight * 2),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name: str) -> None:
    model = Model(
        lambda m, x: m.last(m.mix(LAYOUTS[name](m, F.relu(m.norm(m.conv(x)))))).mean((2, 3)),
        conv=nn.Conv2d(3, 8, 1),
        norm=nn.BatchNorm2d(8),
        gate=nn.Conv2d(8, 8, 1),
        one=nn.Conv2d(8, 1, 1),
        tokens=nn.Linear(16, 16),
        along=nn.LayerNorm(16),
        scale=nn.PReLU(8),
        mix=nn.Conv2d(8, 6, 1),
        last=nn.Conv2d(6, 2, 1),
    )
    program = captured(model, 2, 3, 4, 4)
    channels = find_channels(program)
    assert {"conv.weight", "mix.weight"} <= free(channels).keys(), locked(channels)
    assert_all_removals_exact(program, channels)


@pytest.mark.parametrize("name", ["folded beside an open size", "folded and expanded", "batch and channels folded"])
def test_computed_sizes_follow_one_removal_after_another(name: str) -> None:
    model = Model(lambda m, x: m.mix(LAYOUTS[name](m, m.conv(x))), conv=nn.Conv2d(3, 8, 1), mix=nn.Conv2d(8, 2, 1))
    program = captured(model, 2, 3, 4, 4)
    channels = find_channels(program)
    units = channels.groups[0].units
    pruned, left = program.copy(), channels
    for gone in (units[:2], units[3:4], units[5:7]):
        left = remove_channels(pruned, left, gone)
    for size in (None, 3):
        inputs = program.inputs_with_batch(size, seed=1)
        expected = run_silenced(program, channels, [*units[:2], *units[3:4], *units[5:7]], inputs)
        assert compare(expected, pruned.run(*inputs)).within(TOLERANCE)


REFUSED: dict[str, tuple[Callable[[Any, torch.Tensor], torch.Tensor], str]] = {
    "softmax": (lambda m, x: x.softmax(1), "softmax over channels at softmax"),
    "no rule": (lambda m, x: x.sort(1)[0], "sort at sort has no rule"),
    "a constant": (lambda m, x: x + torch.arange(8).view(1, 8, 1, 1), "meets a value of fixed size at add"),
    "their number": (lambda m, x: x / x.shape[1], "their number is used in arithmetic at truediv"),
    "padded": (lambda m, x: F.pad(x, (0, 0, 0, 0, 0, 2))[:, :8], "padded at pad"),
    "rolled": (lambda m, x: x.roll(1, 1), "rolled at roll"),
    "largest": (lambda m, x: x - x.amax(1, keepdim=True), "amax over channels at amax"),
    "repeated as often as each says": (
        lambda m, x: x.repeat_interleave(torch.ones(8).long(), 1),
        "repeated at repeat_interleave",
    ),
    "in steps": (lambda m, x: torch.cat([x[:, ::2], x[:, ::2]], 1), "indexed at getitem"),
    "a computed weight": (
        lambda m, x: F.conv2d(x, m.mix.weight * 2)[:, [0] * 8],
        "conv2d at conv2d reads it with a weight from elsewhere (simplify makes constant ones parameters)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_followed_is_locked_with_the_reason(name: str) -> None:
    forward, why = REFUSED[name]
    model = Model(lambda m, x: m.mix(forward(m, m.conv(x))), conv=nn.Conv2d(3, 8, 1), mix=nn.Conv2d(8, 2, 1))
    program = captured(model, 2, 3, 4, 4)
    channels = find_channels(program)
    assert locked(channels)["conv.weight"] == why
    assert_all_removals_exact(program, channels)


def standardised(weight: torch.Tensor) -> torch.Tensor:
    return F.batch_norm(weight.reshape(1, 6, -1), None, None, training=True).reshape_as(weight)


GIVEN: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "standardised": lambda m, x: F.conv2d(x, standardised(m.mix.weight), m.mix.bias * 2),
    "scaled by channel": lambda m, x: F.conv2d(x, m.mix.weight * m.scale.weight.view(6, 1, 1, 1)),
    "transposed": lambda m, x: F.conv_transpose2d(x, m.mix.weight.transpose(0, 1) * 2),
    "linear": lambda m, x: first(F.linear(last(x), m.mix.weight.flatten(1), torch.cat([m.three.bias] * 2))),
}  # fmt: skip


@pytest.mark.parametrize("name", GIVEN)
def test_of_a_layer_with_a_computed_weight_the_outputs_shrink(name: str) -> None:
    model = Model(
        lambda m, x: m.last(m.act(GIVEN[name](m, m.conv(x)))),
        conv=nn.Conv2d(3, 8, 1),
        mix=nn.Conv2d(8, 6, 1),
        three=nn.Conv2d(3, 3, 1),
        scale=nn.PReLU(6),
        act=nn.ReLU(),
        last=nn.Conv2d(6, 2, 1),
    )
    program = captured(model, 2, 3, 4, 4)
    channels = find_channels(program)
    op = {"linear": "linear", "transposed": "conv_transpose2d"}.get(name, "conv2d")
    why = f"{op} at {op} reads it with a weight from elsewhere (simplify makes constant ones parameters)"
    assert locked(channels)["conv.weight"] == why
    assert_all_removals_exact(program, channels)


def test_a_grouped_layer_with_a_computed_weight_is_locked() -> None:
    model = Model(
        lambda m, x: m.last(F.conv2d(m.conv(x), m.mix.weight * 2, groups=2)),
        conv=nn.Conv2d(3, 8, 1),
        mix=nn.Conv2d(8, 6, 1, groups=2),
        last=nn.Conv2d(6, 2, 1),
    )
    channels = find_channels(captured(model, 2, 3, 4, 4))
    assert free(channels) == {}
    assert locked(channels)["conv.weight"] == "conv2d at conv2d is grouped, with a weight from elsewhere"


@pytest.mark.parametrize("norm", [nn.LayerNorm(8), nn.LayerNorm(8, bias=False), nn.RMSNorm(8)], ids=str)
def test_norms_over_channels(norm: nn.Module) -> None:
    program = captured(nn.Sequential(nn.Linear(3, 8), norm, nn.GELU(), nn.Linear(8, 2)), 2, 5, 3)
    channels = find_channels(program)
    assert free(channels) == {"0.weight": 8}
    assert_all_removals_exact(program, channels)


def test_one_channel_that_meets_all_others_is_locked_alone() -> None:
    model = Model(lambda m, x: m.mix(m.conv(x)[:, 3:4] + m.conv(x)), conv=nn.Conv2d(3, 8, 1), mix=nn.Conv2d(8, 2, 1))
    program = captured(model, 2, 3, 4, 4)
    channels = find_channels(program)
    assert free(channels) == {"conv.weight": 7}
    why = "meets a value of fixed size at add, with every channel of the other operand"
    assert locked(channels)["conv.weight#2"] == why
    assert_all_removals_exact(program, channels)


def attention(
    heads: int, dim: int, *, fused: bool, functional: bool, mask: bool = False
) -> Callable[[nn.Module, torch.Tensor], torch.Tensor]:
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, _ = x.shape
        y = m.norm(x)
        if fused:
            q, k, v = m.qkv(y).reshape(batch, tokens, 3, heads, dim).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = (layer(y).view(batch, tokens, heads, dim).transpose(1, 2) for layer in (m.q, m.k, m.v))
        if functional:
            z = F.scaled_dot_product_attention(q, k, v, attn_mask=torch.ones(tokens, tokens).double() if mask else None)
        else:
            z = (q * dim**-0.5 @ k.transpose(-2, -1)).softmax(-1) @ v
        x = x + m.proj(z.transpose(1, 2).reshape(batch, tokens, heads * dim))
        return m.head(x[:, 0] + m.down(F.gelu(m.up(x))).mean(1))

    return forward


@pytest.mark.parametrize("mode", ["head_dim", "heads", "none"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("functional", [False, True])
def test_attention(mode: Attention, fused: bool, functional: bool) -> None:
    heads, dim = 4, 6
    wide = heads * dim
    layers: dict[str, nn.Module] = (
        {name: nn.Linear(10, wide) for name in "qkv"} if not fused else {"qkv": nn.Linear(10, 3 * wide)}
    )
    model = Model(
        attention(heads, dim, fused=fused, functional=functional),
        **layers,
        norm=nn.LayerNorm(10),
        proj=nn.Linear(wide, 10),
        up=nn.Linear(10, 12),
        down=nn.Linear(12, 10),
        head=nn.Linear(10, 2),
    )
    program = captured(model, 2, 5, 10)
    channels = find_channels(program, attention=mode)
    found = free(channels)
    assert found["up.weight"] == 12
    size = {"head_dim": dim, "heads": heads}
    assert {name: count for name, count in found.items() if name != "up.weight"} == (
        {}
        if mode == "none"
        else {"qkv.weight": size[mode]}
        if fused
        else {"q.weight": dim, "v.weight": dim}
        if mode == "head_dim"
        else {"q.weight": heads}
    )
    assert_all_removals_exact(program, channels)


def test_attention_keeps_the_scale_of_the_original_width() -> None:
    model = Model(
        attention(2, 4, fused=False, functional=True),
        **{name: nn.Linear(8, 8) for name in "qkv"},
        norm=nn.Identity(),
        proj=nn.Linear(8, 8),
        up=nn.Linear(8, 4),
        down=nn.Linear(4, 8),
        head=nn.Linear(8, 2),
    )
    program = captured(model, 2, 3, 8)
    channels = find_channels(program)
    group = channels.group("q.weight")
    assert group is not None
    pruned = assert_exact(program, channels, list(group.units[:2]))
    (scale,) = (pruned.call(node).arguments["scale"] for node in pruned.nodes if "attention" in node.name)
    assert scale == 0.5


def test_class_token_and_position_embedding_shrink_with_the_tokens() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch = nn.Conv2d(3, 8, 2, stride=2)
            self.token = nn.Parameter(torch.zeros(1, 1, 8))
            self.position = nn.Parameter(torch.zeros(1, 5, 8))
            self.scale = nn.Parameter(torch.ones(8))
            self.up, self.down, self.head = nn.Linear(8, 6), nn.Linear(6, 8), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.patch(x).flatten(2).transpose(1, 2)
            x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
            return self.head((x + self.scale * self.down(self.up(x).relu()))[:, 0])

    program = captured(Tokens(), 2, 3, 4, 4)
    channels = find_channels(program)
    assert free(channels) == {"patch.weight": 8, "up.weight": 6}
    pruned = assert_exact(program, channels, list(channels.groups[0].units[2:5]))
    sizes = {name: tuple(tensor.shape) for name, tensor in pruned.module.named_parameters()}
    assert (sizes["token"], sizes["position"], sizes["scale"]) == ((1, 1, 5), (1, 5, 5), (5,))
    assert_all_removals_exact(program, channels)


def test_an_embedding_tied_to_the_head_is_locked_by_the_output_only_along_the_vocabulary() -> None:
    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 6)
            self.middle = nn.Linear(6, 6)
            self.head = nn.Linear(6, 11, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            x = self.embed(tokens)
            return self.head(x + self.middle(x))

    model = Language().double().eval()
    program = fxopt.capture(model, torch.randint(0, 11, (2, 7)))
    channels = find_channels(program)
    assert free(channels) == {"embed.weight": 6}
    pruned = assert_exact(program, channels, list(channels.groups[0].units[1:3]))
    assert pruned.module.get_submodule("head").weight.shape == (11, 4)


def test_a_weight_that_is_read_beside_its_layer_is_locked() -> None:
    model = Model(
        lambda m, x: m.mix(m.conv(x) + m.conv.bias.view(1, 8, 1, 1)), conv=nn.Conv2d(3, 8, 1), mix=nn.Conv2d(8, 2, 1)
    )
    channels = find_channels(captured(model, 2, 3, 4, 4))
    assert locked(channels)["conv.weight"] == "a tensor of conv is read at conv_bias too"


def test_a_parameter_that_is_read_twice_shrinks_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(8, 1, 1))
            self.again = self.scale
            self.conv, self.mix = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.mix(self.again * (self.scale * self.conv(x)).relu() + self.scale)

    program = captured(Twice(), 2, 3, 4, 4)
    assert free(find_channels(program)) == {"conv.weight": 8}
    assert_all_removals_exact(program, find_channels(program))


@pytest.mark.parametrize("share", range(3))
def test_any_removal_from_any_model_is_exact(share: int) -> None:
    @hypothesis.seed(share)
    @hypothesis.settings(
        max_examples=60,
        deadline=None,
        phases=[hypothesis.Phase.explicit, hypothesis.Phase.reuse, hypothesis.Phase.generate],
        suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
    )
    @hypothesis.given(st.randoms(use_true_random=False))
    def holds(source: random.Random) -> None:
        model, inputs = random_program(source, dtype=torch.float64)
        program = fxopt.capture(model, inputs)
        channels = find_channels(program)
        assert_exact(program, channels, some_units(channels, source))

    holds()


def test_channels_that_are_zero_change_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 1))
    program = captured(model, 2, 3, 8, 8)
    with torch.no_grad():
        model[0].weight[2:5] = 0
        model[0].bias[2:5] = 0
    program = fxopt.capture(model, torch.randn(2, 3, 8, 8, dtype=torch.float64))
    channels = find_channels(program)
    pruned = program.copy()
    remove_channels(pruned, channels, list(channels.groups[0].units[2:5]))
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(pruned.run(x)[0], model(x), rtol=1e-12, atol=1e-12)
