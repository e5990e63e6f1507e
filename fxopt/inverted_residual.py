"""Fits an inverted residual to what a residual block gives: expand 1 x 1, filter depthwise, project 1 x 1.

    h = relu6(norm(E x)),   d = relu6(norm(D * h)),   z ~ norm(P d) + x

with the layers of `fxopt.nn.InvertedResidual`. What is fitted to, z - x, or z where the block cannot keep x, is known
on calibration data. The hidden units start as those of the block's first convolution: each of its kernels W_m, [C, k²],
becomes the pair e_m d_mᵀ that loses the least of its outputs on data with the covariance S of x (the SVD of S^1/2 W_m),
and the BatchNorm behind it that of the depthwise convolution; units that are left over start at random. Some steps of
Adam on the squared error then move E, D and the norms; P is always the ridge regression of z - x on d
(`fxopt/regression.py`), and the statistics of the norms are those of the data. Of the start and the end is kept what is
nearer to z on samples that neither has seen: a quarter of them.

References: MobileNetV2 (arXiv:1801.04381) for the block, FitNets (arXiv:1412.6550) for the regression of features.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxopt.analysis.patches import PatchLayer, padding_along
from fxopt.analysis.samples import Seen, samples, wide
from fxopt.errors import InputError
from fxopt.regression import Regression

__all__ = ["FirstLayer", "Fit", "Sizes", "Untrained", "fit"]

_HELD_OUT = 4  # every so manieth sample is not fitted to
_LEAST = 4  # samples
_ROWS = 8192  # positions in a step
_RATE = 1e-2
_RIDGES = (torch.inf, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-8, 1e-12, 1e-15)
_EXACT = 1e-12  # an error at which there is nothing to gain


class Sizes(NamedTuple):
    """Of an inverted residual; those of the depthwise convolution per axis.

    Attributes:
        inputs: channels of x.
        hidden: channels of the depthwise convolution.
        outputs: channels of z.
        kernel: its kernel.
        stride: its stride.
        padding: its padding, of zeros.
        dilation: its dilation.
        skip: whether x is added.
    """

    inputs: int
    hidden: int
    outputs: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    skip: bool

    @property
    def filter(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int], tuple[int, int]]:
        """Of the depthwise convolution: kernel, stride, padding, dilation."""
        return self.kernel, self.stride, self.padding, self.dilation


class FirstLayer(NamedTuple):
    """The first convolution of a block, and what scales and shifts its outputs.

    Attributes:
        layer: the convolution.
        scale: float64[M].
        shift: float64[M], added to what is scaled; the layer's own bias included.
    """

    layer: nn.Conv2d
    scale: Tensor
    shift: Tensor


@dataclass(frozen=True, eq=False)
class Fit:
    """An inverted residual without its skip.

    Attributes:
        layers: by the names that `fxopt.nn.InvertedResidual` has for them, in evaluation mode.
        sizes: its own.
        error: the share of the variance of z that is lost, on samples that were not fitted to.
    """

    layers: nn.Sequential
    sizes: Sizes
    error: float

    def __call__(self, x: Tensor) -> Tensor:
        """What the block gives for x."""
        found: Tensor = self.layers(x)
        return x + found if self.sizes.skip else found


class Untrained(nn.Module):
    """The layers of an inverted residual of these sizes, with weights at random, and its skip."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        hidden = sizes.hidden
        self.layers = nn.Sequential(
            nn.Conv2d(sizes.inputs, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(),
            nn.Conv2d(hidden, hidden, *sizes.filter, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(),
            nn.Conv2d(hidden, sizes.outputs, 1, bias=False),
            nn.BatchNorm2d(sizes.outputs),
        )
        self._skip = sizes.skip

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layers(x)
        return x + found if self._skip else found


def fit(sizes: Sizes, first: FirstLayer, batches: Sequence[Seen], steps: int) -> Fit:
    """The inverted residual that comes closest.

    Args:
        sizes: of it.
        first: what the hidden units start from.
        batches: x, [N, C, H, W], and z, samples on axis 0.
        steps: of Adam.

    Raises:
        InputError: if there are less than four samples, or values are not finite.
    """
    data = _Data(sizes, batches)
    net = _Net(sizes, first, data)
    error = net.solve(data)
    layers = net.layers(data)
    if steps and error > _EXACT:
        net.fit(data, steps)
        after = net.solve(data)
        if after < error:
            error, layers = after, net.layers(data)
    if not all(tensor.isfinite().all() for tensor in layers.state_dict().values()):
        raise InputError("what the block reads or gives is not finite on the calibration data")
    like = first.layer.weight
    return Fit(layers.to(device=like.device, dtype=like.dtype), sizes, error)


class _Data:
    """What is fitted to, and what is held out: x and what is to be added to it."""

    def __init__(self, sizes: Sizes, batches: Sequence[Seen]) -> None:
        self.fitted: list[Seen] = []
        self.held: list[Seen] = []
        count = sum(len(seen.value) for seen in batches)
        if count < _LEAST:
            raise InputError(f"the calibration data hold {count} samples, and a fit takes at least {_LEAST}")
        start = 0
        for x, z in batches:
            x, z = (wide(item).contiguous(memory_format=torch.channels_last) for item in (x, z))
            target = z - x if sizes.skip else z
            held = (torch.arange(start, start + len(x), device=x.device) + 1) % _HELD_OUT == 0
            start += len(x)
            for places, part in ((~held, self.fitted), (held, self.held)):
                if places.any():
                    part.append(Seen(x[places], target[places]))
        outputs = _Sums()
        for x, target in self.held:
            outputs.add(x + target if sizes.skip else target)
        self.count = outputs.count
        self.variance = float(outputs.variance().sum())

    def inputs(self) -> Iterator[Tensor]:
        """Every x."""
        yield from (seen.value for seen in (*self.fitted, *self.held))

    def picks(self, generator: torch.Generator) -> Iterator[Seen]:
        """Some samples at random, again and again, from one batch after the other."""
        while True:
            for x, target in self.fitted:
                count = max(1, min(len(x), _ROWS // max(1, target[0, 0].numel())))
                places = torch.randint(len(x), (count,), generator=generator).to(x.device)
                yield Seen(x[places], target[places])


class _Sums:
    """Of channels of what comes by, [N, C, H, W] each.

    Attributes:
        count: values per channel.
        top: the largest.
    """

    def __init__(self) -> None:
        self.count = 0
        self.top: Tensor | None = None
        self._centre: Tensor | None = None
        self._total: Tensor | float = 0.0
        self._squares: Tensor | float = 0.0

    def add(self, values: Tensor) -> None:
        largest = values.amax((0, 2, 3)).double()
        self.top = largest if self.top is None else torch.maximum(self.top, largest)
        if self._centre is None:
            self._centre = values.mean((0, 2, 3), keepdim=True)
        around = values - self._centre
        self.count += values[:, 0].numel()
        self._total = self._total + around.sum((0, 2, 3)).double()
        self._squares = self._squares + around.square().sum((0, 2, 3)).double()

    def mean(self) -> Tensor:
        assert self._centre is not None, "nothing came by"
        return self._centre.flatten().double() + self._total / self.count

    def variance(self) -> Tensor:
        squares = torch.as_tensor(self._squares) / self.count
        return (squares - (torch.as_tensor(self._total) / self.count).square()).clamp(min=0)


class _Net(nn.Module):
    """The layers while they are fitted; the last one with a bias in the place of its norm."""

    def __init__(self, sizes: Sizes, first: FirstLayer, data: _Data) -> None:
        super().__init__()
        sample = data.fitted[0].value
        kinds: Any = {"device": sample.device, "dtype": sample.dtype}
        hidden = sizes.hidden
        self.expand = nn.Conv2d(sizes.inputs, hidden, 1, bias=False, **kinds)
        self.expand_norm = nn.BatchNorm2d(hidden, **kinds)
        self.depthwise = nn.Conv2d(
            hidden,
            hidden,
            *sizes.filter,
            groups=hidden,
            bias=False,
            **kinds,
        )
        self.depthwise_norm = nn.BatchNorm2d(hidden, **kinds)
        self.project = nn.Conv2d(hidden, sizes.outputs, 1, **kinds)
        for layer in (self.expand, self.depthwise):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out")
        self.to(memory_format=torch.channels_last)
        self.eval()
        self._start_from(first, data)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.project(self._features(x))
        return found

    def _filtered(self, x: Tensor) -> Tensor:
        found: Tensor = self.depthwise(F.relu6(self.expand_norm(self.expand(x))))
        return found

    def _features(self, x: Tensor) -> Tensor:
        return F.relu6(self.depthwise_norm(self._filtered(x)))

    @torch.no_grad()
    def _start_from(self, first: FirstLayer, data: _Data) -> None:
        """Gives the first hidden units the kernels of the block's first convolution, as far as a unit can have one."""
        places = _places(first.layer, self.depthwise)
        if places is None:
            return
        directions, taps, sizes = _pairs(first, data)
        picks = sizes.argsort(descending=True)[: self.expand.out_channels]
        count = len(picks)
        self.expand.weight[:count, :, 0, 0] = directions[picks].to(self.expand.weight)
        self.depthwise.weight[:count] = 0
        rows, columns = (torch.tensor(each, device=picks.device) for each in places)
        values = taps[picks].reshape(count, len(rows), len(columns)).to(self.depthwise.weight)
        self.depthwise.weight[:count, 0, rows[:, None], columns] = values
        # nothing is added in front of the depthwise convolution, whose padding is then what the block's is; below 6
        seen = _settle(self.expand_norm, self.expand, data)
        gain = _gain(seen.variance()[:count], cast("Tensor", seen.top)[:count])
        _set(self.expand_norm, gain, torch.zeros_like(gain))
        seen = _settle(self.depthwise_norm, self._filtered, data)
        shift = first.shift[picks].to(gain)
        scale = _gain(seen.variance()[:count] / gain.square(), cast("Tensor", seen.top)[:count] / gain + shift)
        _set(self.depthwise_norm, scale / gain, scale * shift)

    def fit(self, data: _Data, steps: int) -> None:
        """Some steps of Adam towards the targets."""
        optimizer = torch.optim.Adam(self.parameters(), _RATE)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=steps, pct_start=0.1)
        picks = data.picks(torch.Generator().manual_seed(0))
        self.train()
        with torch.enable_grad():
            for _ in range(steps):
                x, target = next(picks)
                loss = (self(x) - target).square().sum(1).mean() / max(data.variance, 1e-30)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        self.eval()

    @torch.no_grad()
    def solve(self, data: _Data) -> float:
        """Sets the statistics and the projection; the error."""
        _settle(self.expand_norm, self.expand, data)
        _settle(self.depthwise_norm, self._filtered, data)
        layer = PatchLayer(self.project)
        regression = Regression(torch.zeros_like(layer.weight), _RIDGES)
        for index, (x, target) in enumerate(data.fitted):
            for half, inputs, outputs in samples(layer, [Seen(self._features(x), target)]):
                # of batches of one sample each, every other one
                regression.add((half + index) % 2, inputs, outputs)
        weight, bias, _, _ = regression.solve()
        self.project.weight.copy_(layer.as_weight(weight))
        cast("Tensor", self.project.bias).copy_(bias.reshape(-1))
        lost = sum(float((self(x) - target).double().square().sum()) for x, target in data.held)
        return lost / data.count / data.variance if data.variance else float(lost > 0)

    @torch.no_grad()
    def layers(self, data: _Data) -> nn.Sequential:
        """Copies, under the names of `fxopt.nn.InvertedResidual`."""
        twin = copy.deepcopy(self).to(memory_format=torch.contiguous_format)
        bias = cast("Tensor", twin.project.bias).double()
        twin.project.bias = None
        # rows of length 1: what a step of training comes to depends on it, by 1 / length²
        length = twin.project.weight.flatten(1).norm(dim=1).clamp(min=1e-30)
        twin.project.weight /= length[:, None, None, None]
        norm = nn.BatchNorm2d(len(bias), device=bias.device, dtype=twin.project.weight.dtype).eval()
        _settle(norm, lambda x: twin.project(twin._features(x)), data)
        _set(norm, length.double(), bias)
        named = {
            "expand": twin.expand,
            "expand_norm": twin.expand_norm,
            "expand_activation": nn.ReLU6(),
            "depthwise": twin.depthwise,
            "depthwise_norm": twin.depthwise_norm,
            "depthwise_activation": nn.ReLU6(),
            "project": twin.project,
            "project_norm": norm,
        }
        return nn.Sequential(OrderedDict(named)).eval()


def _settle(norm: nn.BatchNorm2d, layer: Callable[[Tensor], Tensor], data: _Data) -> _Sums:
    """Sets the statistics of a norm to those of what a layer gives."""
    seen = _Sums()
    for x in data.inputs():
        seen.add(layer(x))
    cast("Tensor", norm.running_mean).copy_(seen.mean())
    cast("Tensor", norm.running_var).copy_(seen.variance())
    return seen


def _set(norm: nn.BatchNorm2d, factor: Tensor, offset: Tensor) -> None:
    """Has the first channels of a norm give factor * value + offset."""
    count = len(factor)
    mean, variance = (cast("Tensor", each)[:count].double() for each in (norm.running_mean, norm.running_var))
    norm.weight[:count] = (factor * (variance + norm.eps).sqrt()).to(norm.weight)
    norm.bias[:count] = (factor * mean + offset).to(norm.bias)


def _gain(variance: Tensor, top: Tensor) -> Tensor:
    """What scales values to a deviation of 1, or less, so that none is cut off at 6."""
    least = 1e-6 * top.abs().max().clamp(min=1e-6)
    return torch.minimum(1 / variance.sqrt().clamp(min=least), 5 / top.clamp(min=least))


def _places(layer: nn.Conv2d, depthwise: nn.Conv2d) -> list[list[int]] | None:
    """Where the taps of the first convolution lie in the depthwise kernel, per axis; None if not all of them do."""
    found = []
    for axis in range(2):
        spread, taps = int(depthwise.dilation[axis]), range(layer.kernel_size[axis])
        ahead = padding_along(layer, axis)[0]
        offsets = [tap * layer.dilation[axis] - ahead + int(depthwise.padding[axis]) for tap in taps]
        inside = all(offset % spread == 0 and 0 <= offset // spread < depthwise.kernel_size[axis] for offset in offsets)
        if not inside:
            return None
        found.append([offset // spread for offset in offsets])
    return found


def _pairs(first: FirstLayer, data: _Data) -> tuple[Tensor, Tensor, Tensor]:
    """The pair of a direction and taps for each kernel of the first convolution, and how much its output varies.

    Returns:
        float64: [M, C], [M, taps] and [M].
    """
    kernels = first.layer.weight.detach().double().flatten(2) * first.scale[:, None, None]
    sums: Tensor | float = 0.0
    count = 0
    for x in data.inputs():
        rows = x.movedim(1, -1).flatten(0, -2).double()
        sums, count = sums + rows.T @ rows, count + len(rows)
    values, vectors = torch.linalg.eigh(torch.as_tensor(sums) / count)
    roots = values.clamp(min=0).sqrt()
    inverse = torch.where(roots > 1e-7 * roots.max(), 1 / roots, 0.0)
    u, s, v = torch.linalg.svd((vectors * roots) @ vectors.T @ kernels, full_matrices=False)
    directions = u[:, :, 0] @ (vectors * inverse) @ vectors.T
    mean = torch.cat([x.movedim(1, -1).flatten(0, -2) for x in data.inputs()]).mean(0).double()
    signs = torch.where(directions @ mean < 0, -1.0, 1.0)
    return directions * signs[:, None], v[:, 0] * (s[:, 0] * signs)[:, None], s[:, 0]
