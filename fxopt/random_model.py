"""Random small models for property tests: every shape of graph that passes must survive.

A model is grown block by block: a block takes the current value and gives the next one. Blocks hold the patterns that
rewriting gets wrong elsewhere: a convolution or BatchNorm called twice, a convolution whose output has two users,
BatchNorm before a padded convolution, parallel branches that are added, values that are views of others. All choices
come from one `random.Random`, so that a seed reproduces a model and hypothesis can shrink one (`strategies.randoms()`).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

__all__ = ["RandomProgram", "random_program"]


class RandomProgram(NamedTuple):
    """A model in evaluation mode, and positional inputs for it.

    Attributes:
        model: the module; its blocks are `model.blocks`, printed with it.
        inputs: a tuple of tensors, batch on axis 0.
    """

    model: nn.Module
    inputs: tuple[torch.Tensor, ...]


def random_program(
    source: int | random.Random, *, blocks: int = 5, dtype: torch.dtype = torch.float32
) -> RandomProgram:
    """A random model and its inputs.

    Args:
        source: a seed, or a generator to draw from, such as those of hypothesis' `strategies.randoms()`.
        blocks: the largest number of blocks.
        dtype: of parameters and inputs.

    >>> model, (x,) = random_program(7)
    >>> model(x).shape[0] == x.shape[0]
    True
    """
    draw = _Draw(random.Random(source) if isinstance(source, int) else source)  # noqa: S311 (tests, not secrets)
    model = _Model(draw, draw.pick(1, blocks)).eval().to(dtype)
    shape = (draw.pick(1, 3), model.channels, *[model.size] * model.axes)
    return RandomProgram(model, (torch.randn(shape, generator=draw.generator, dtype=torch.float64).to(dtype),))


class _Draw:
    """Choices of structure from a Python generator; weights from a torch generator that it seeds."""

    def __init__(self, source: random.Random) -> None:
        self._source = source
        self.generator = torch.Generator().manual_seed(source.randint(0, 2**31 - 1))

    def pick(self, low: int, high: int) -> int:
        return self._source.randint(low, high)

    def one_of(self, *choices: Any) -> Any:
        return choices[self._source.randint(0, len(choices) - 1)]

    def yes(self) -> bool:
        return bool(self.one_of(False, True))

    def fill(self, module: nn.Module) -> nn.Module:
        """Weights that keep activations near one, and statistics that are no identity."""
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if not tensor.is_floating_point():
                continue
            values = torch.randn(tensor.shape, generator=self.generator)
            if name.endswith("running_var"):
                values = values.abs() + 0.3
            elif tensor.ndim > 1:
                values = values / (tensor[0].numel() ** 0.5)
            else:
                values = values * 0.3 + (1.0 if name.endswith("weight") else 0.0)
            with torch.no_grad():
                tensor.copy_(values)
        return module


class _Model(nn.Module):
    """Blocks in a row, and perhaps a linear head."""

    def __init__(self, draw: _Draw, count: int) -> None:
        super().__init__()
        self.axes: int = draw.one_of(2, 2, 1, 3)
        self.channels: int = draw.one_of(4, 2, 8)
        self.size = 4
        layers = _Layers(draw, self.axes)
        channels, blocks = self.channels, []
        for _ in range(count):
            block = draw.one_of(*_BLOCKS)(layers, channels)
            channels = block.out_channels
            blocks.append(block)
        if draw.yes():
            blocks.append(_Head(layers, channels))
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class _Layers:
    """Makes filled layers of the model's number of axes."""

    def __init__(self, draw: _Draw, axes: int) -> None:
        self.draw = draw
        self.axes = axes

    def conv(self, channels: int, out: int, *, kernel: int | None = None, groups: int | None = None) -> nn.Module:
        """A convolution that keeps the size; `channels` and `out` are powers of two, so that groups divide both."""
        draw = self.draw
        kernel = draw.one_of(1, 3) if kernel is None else kernel
        groups = draw.one_of(1, 1, 2, min(channels, out)) if groups is None else groups
        kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[self.axes]
        mode = draw.one_of("zeros", "zeros", "zeros", "replicate")
        return draw.fill(
            kind(channels, out, kernel, padding=kernel // 2, groups=groups, bias=draw.yes(), padding_mode=mode)
        )

    def transposed(self, channels: int, out: int) -> nn.Module:
        """A transposed convolution that keeps the size."""
        kind = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}[self.axes]
        groups = self.draw.one_of(1, 2)
        return self.draw.fill(kind(channels, out, 3, padding=1, groups=groups, bias=self.draw.yes()))

    def norm(self, channels: int) -> nn.Module:
        """A BatchNorm of any kind: with or without affine parameters and running statistics, any eps."""
        kind = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[self.axes]
        affine, tracked = self.draw.one_of((True, True), (True, True), (True, True), (False, True), (True, False))
        eps = self.draw.one_of(1e-5, 1e-3, 0.1)
        return self.draw.fill(kind(channels, eps=eps, affine=affine, track_running_stats=tracked))

    def activation(self) -> nn.Module:
        kind, options = self.draw.one_of(
            (nn.ReLU, {}), (nn.ReLU, {"inplace": True}), (nn.Identity, {}), (nn.Dropout, {}), (nn.SiLU, {})
        )
        return self.draw.fill(kind(**options))


class _Block(nn.Module):
    """One step of a model, `out_channels` after it."""

    out_channels: int


class _Chain(_Block):
    """Convolution, BatchNorm and activation, in one of several orders, with what hides between them."""

    def __init__(self, layers: _Layers, channels: int) -> None:
        super().__init__()
        draw = layers.draw
        self.out_channels = draw.one_of(channels, 4, 8)
        conv = draw.one_of(layers.conv, layers.transposed)(channels, self.out_channels)
        between = draw.one_of(nn.Identity, nn.Dropout, None, None)
        middle = [between()] if between else []
        if draw.yes():
            parts = [conv, *middle, layers.norm(self.out_channels), layers.activation()]
        else:
            parts = [layers.norm(channels), *middle, conv, layers.activation()]
        self.body = nn.Sequential(*parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.body(x)
        return y


class _Residual(_Block):
    """x + norm(conv(x)), with the convolution's own output perhaps used a second time."""

    def __init__(self, layers: _Layers, channels: int) -> None:
        super().__init__()
        self.out_channels = channels
        self.conv = layers.conv(channels, channels)
        self.norm = layers.norm(channels)
        self.twice = layers.draw.yes()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.conv(x)
        z: torch.Tensor = self.norm(y)
        return x + z + y if self.twice else x + z


class _Shared(_Block):
    """One module called at two places: a convolution with two norms, or a norm behind two convolutions."""

    def __init__(self, layers: _Layers, channels: int) -> None:
        super().__init__()
        self.out_channels = channels
        self.share_conv = layers.draw.yes()
        self.parallel = layers.draw.yes()
        self.conv1, self.norm1 = layers.conv(channels, channels), layers.norm(channels)
        self.conv2 = self.conv1 if self.share_conv else layers.conv(channels, channels)
        self.norm2 = layers.norm(channels) if self.share_conv else self.norm1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.norm1(self.conv1(x))
        z: torch.Tensor = self.norm2(self.conv2(x if self.parallel else y))
        return y + z if self.parallel else z


class _Branches(_Block):
    """Parallel convolutions that are added, as RepVGG trains them: 3x3, 1x1 and identity, each with its norm."""

    def __init__(self, layers: _Layers, channels: int) -> None:
        super().__init__()
        self.out_channels = channels
        groups = layers.draw.one_of(1, 1, channels)
        kernels = layers.draw.one_of((3, 1), (3, 3), (1, 1), (3, 1, 1))
        self.branches = nn.ModuleList(
            nn.Sequential(layers.conv(channels, channels, kernel=kernel, groups=groups), layers.norm(channels))
            for kernel in kernels
        )
        if layers.draw.yes():
            self.branches.append(layers.norm(channels))
        self.activation = layers.activation()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, *others = [branch(x) for branch in self.branches]
        for other in others:
            first = first + other
        y: torch.Tensor = self.activation(first)
        return y


class _Concat(_Block):
    """Two convolutions of one value, concatenated, and a norm over both."""

    def __init__(self, layers: _Layers, channels: int) -> None:
        super().__init__()
        self.out_channels = 8
        self.left, self.right = layers.conv(channels, 4), layers.conv(channels, 4)
        self.norm = layers.norm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.norm(torch.cat([self.left(x), self.right(x)], dim=1))
        return y


class _Layout(_Block):
    """Layout changes (some undo each other, do nothing, or shuffle channels), and arithmetic with constants."""

    def __init__(self, layers: _Layers, channels: int) -> None:
        super().__init__()
        self.out_channels = channels
        self.kind = layers.draw.one_of("permute", "reshape", "shuffle", "chunk", "same", "scale", "flatten", "constant")
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * layers.axes))
        layers.draw.fill(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "permute":
            return x.transpose(1, 2).relu().transpose(1, 2)
        if self.kind == "reshape":
            return x.reshape(x.shape)
        if self.kind == "shuffle":
            return torch.unflatten(x, 1, (2, -1)).transpose(1, 2).flatten(1, 2)
        if self.kind == "chunk":
            left, right = x.chunk(2, dim=1)
            return torch.cat([right, left * torch.sigmoid(right)], dim=1)
        if self.kind == "same":
            return torch.relu(x) + torch.relu(x) * 0.5
        if self.kind == "scale":
            return x * self.gamma + 0.25
        if self.kind == "flatten":
            return torch.unflatten(x.flatten(2), 2, x.shape[2:])
        return x + (self.gamma * 2).exp() * torch.ones(1, dtype=x.dtype)


class _Gate(_Block):
    """Squeeze and excitation: the mean over the positions, two 1x1 convolutions, a product."""

    def __init__(self, layers: _Layers, channels: int) -> None:
        super().__init__()
        self.out_channels = channels
        self.axes = tuple(range(2, 2 + layers.axes))
        self.down = layers.conv(channels, channels, kernel=1, groups=1)
        self.norm = layers.norm(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        return x * torch.sigmoid(self.down(x.mean(self.axes, keepdim=True)))


class _Head(_Block):
    """Mean over the positions, linear layers with a norm before or behind them."""

    def __init__(self, layers: _Layers, channels: int) -> None:
        super().__init__()
        self.out_channels = 3
        draw = layers.draw
        linear, last = draw.fill(nn.Linear(channels, 8, bias=draw.yes())), draw.fill(nn.Linear(8, 3))
        before, behind = draw.fill(nn.BatchNorm1d(channels)), draw.fill(nn.BatchNorm1d(8))
        first = draw.one_of([linear, behind], [before, linear])
        self.body = nn.Sequential(*first, layers.activation(), last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.body(x.flatten(2).mean(2))
        return y


_BLOCKS: tuple[Callable[[_Layers, int], _Block], ...] = (
    _Chain,
    _Chain,
    _Residual,
    _Shared,
    _Branches,
    _Concat,
    _Layout,
    _Gate,
)
