"""What the layers of a program see of the calibration data: moments of their input channels, gathered in one pass.

    mean = E[x],   square = E[x²],   gram = E[x xᵀ]        over all samples and positions of the layer's input x

They are computed in float64 while the batches stream by: nothing but sums is kept, so memory does not grow with the
data. Layers that read the same value share its sums. Positions are those of the input itself; what a convolution pads
is not among them.

What was gathered is kept with the program until its next edit, or until it is trained. A pass that plans on it and
rewrites layer after layer carries it over its own edits (`carry`, with `Statistics.kept` where channels went): the
values of the original program are what its rewrites are meant to preserve, so its statistics remain a fair description
of the rewritten one. To measure again would cost a run over the data per rewrite, and describe the errors of the
rewrites before.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, fx

from fxopt.analysis.measurements import keep, measured
from fxopt.errors import InputError
from fxopt.ops import Call
from fxopt.progress import progress
from fxopt.randomness import fixed_random_state

if TYPE_CHECKING:
    from fxopt.program import Program

__all__ = ["InputMoments", "Statistics", "carry", "collect"]

# Channels are counted from the end, where a missing batch axis does not move them.
_CHANNEL_AXIS = {"linear": -1} | {f"conv{kind}{n}d": -n - 1 for kind in ("", "_transpose") for n in (1, 2, 3)}
_LARGEST_GRAM = 8192  # channels: half a GiB; the flattened input of a classifier may have 25,088
_BLOCK = 512  # channels: the Gram is symmetric, and only blocks on and below its diagonal are computed
_PARTS = 8  # of a batch, by samples, between which the covariances are compared
_CHUNK = 2**23  # numbers that are converted to float64 at a time: 64 MiB


@dataclass(frozen=True, eq=False)
class InputMoments:
    """Moments of a layer's input over the calibration data, per input channel, in float64 on the layer's device.

    Attributes:
        count: how many positions were seen: samples times positions in each.
        mean: E[x], [C].
        square: E[x²], [C].
        gram: E[x xᵀ], [C, C]; the whole of it for grouped convolutions too. None for depthwise convolutions, which
            never mix two channels, and above 8192 channels.
        noise: how uncertain the covariance S is: E|S - E S|², over tr(S)². For n independent samples of a normal
            distribution it is 1/n or a little more; neighbouring positions are far from independent. inf if there are
            not two samples to tell.
    """

    count: int
    mean: Tensor
    square: Tensor
    gram: Tensor | None
    noise: float = torch.inf

    @property
    def covariance(self) -> Tensor | None:
        """E[x xᵀ] - E[x] E[x]ᵀ, [C, C]; None where there is no Gram."""
        return None if self.gram is None else self.gram - torch.outer(self.mean, self.mean)

    def kept(self, indices: Sequence[int] | Tensor) -> InputMoments:
        """The moments of some of the channels, in this order."""
        index = torch.as_tensor(indices, dtype=torch.int64, device=self.mean.device)
        gram = None if self.gram is None else self.gram[index][:, index]
        return replace(self, mean=self.mean[index], square=self.square[index], gram=gram)


class Statistics(Mapping[str, InputMoments]):
    """What layers see of the calibration data: `InputMoments` by the name of the node that calls the layer."""

    def __init__(self, moments: Mapping[str, InputMoments]) -> None:
        self._moments = dict(moments)

    def __getitem__(self, layer: str) -> InputMoments:
        return self._moments[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self._moments)

    def __len__(self) -> int:
        return len(self._moments)

    def kept(self, layer: str, indices: Sequence[int] | Tensor) -> Statistics:
        """The same statistics after a layer has lost all input channels but these."""
        return Statistics(self._moments | {layer: self._moments[layer].kept(indices)})


def collect(program: Program, layers: Iterable[str] | None = None, *, gram: bool = True) -> Statistics:
    """The statistics of at least these layers, in one pass over the calibration data for all that are not known yet.

    What was gathered is kept until the program's next edit, and beyond it by `carry`.

    Args:
        program: a program with calibration data.
        layers: names of nodes that call a convolution, transposed convolution or linear module; None for all of them.
        gram: whether the Gram is needed, which takes most of the time.

    Raises:
        InputError: if there are no calibration data, they do not fit the model, a value is not finite on them, or a
            name is not that of such a node.
    """
    known = measured(program, _gathered)
    calls = {node.name: call for node, call in _layer_calls(program)}
    wanted = list(calls) if layers is None else list(layers)
    unknown = next((name for name in wanted if name not in calls), None)
    if unknown is not None:
        raise InputError(f"{unknown!r} calls no convolution or linear module: the layers are {', '.join(calls)}")
    missing = {
        name: calls[name] for name in wanted if name not in known or (gram and _lacks_gram(calls[name], known[name]))
    }
    if missing:
        known = Statistics({**known, **_gather(program, missing, gram=gram)})
        carry(program, known)
    return known


def carry(program: Program, statistics: Statistics) -> None:
    """Keeps statistics with a program that was just edited; for rewrites after which they describe it still."""
    keep(program, _gathered, statistics)


def _gathered(_: Program) -> Statistics:
    """What was gathered so far: nothing, unless something is kept under this name."""
    return Statistics({})


def _layer_calls(program: Program) -> Iterator[tuple[fx.Node, Call]]:
    for node in program.graph.nodes:
        call = program.call(node)
        if call.op in _CHANNEL_AXIS and call.module is not None:
            yield node, call


def _lacks_gram(call: Call, moments: InputMoments) -> bool:
    return moments.gram is None and _mixes(call) and len(moments.mean) <= _LARGEST_GRAM


def _gather(program: Program, calls: Mapping[str, Call], *, gram: bool) -> dict[str, InputMoments]:
    by_source: defaultdict[fx.Node, dict[tuple[int, bool], _Sums]] = defaultdict(dict)
    by_layer: dict[str, _Sums] = {}
    for name, call in calls.items():
        kind = _CHANNEL_AXIS[call.op], gram and _mixes(call)
        by_layer[name] = by_source[cast("fx.Node", call.arguments["input"])].setdefault(kind, _Sums(*kind))

    def watch(node: fx.Node, value: Any) -> None:
        for sums in by_source[node].values() if node in by_source else ():
            sums.add(value)

    total = operator.length_hint(program.calibration, 0)
    with progress("statistics of the layers' inputs", total) as advance, fixed_random_state():
        for inputs in program.calibration_inputs():
            program.run(*inputs, watch=watch)
            advance(1)
    moments = {sums: sums.finish() for sums in dict.fromkeys(by_layer.values())}
    for name, sums in by_layer.items():
        if not moments[sums].square.isfinite().all():
            raise InputError(f"the input of {name} is not finite on the calibration data")
    return {name: moments[sums] for name, sums in by_layer.items()}


def _mixes(call: Call) -> bool:
    """Whether an output of the layer depends on several input channels."""
    module: Any = call.module
    return call.op == "linear" or module.groups < module.in_channels or module.in_channels == 1


class _Sums:
    """Sums over the positions of one value."""

    def __init__(self, axis: int, products: bool) -> None:
        self._axis = axis
        self._products = products
        self._count = 0
        self._sum: Tensor | float = 0.0
        self._squares: Tensor | float = 0.0
        self._gram: Tensor | None = None
        self._parts = 0
        self._centre: Tensor | None = None  # the mean of the first batch
        self._spread = 0.0  # sum over the parts of positions times |moments about the centre|²

    def add(self, value: Tensor) -> None:
        if self._axis == -1 and value.ndim == 1:
            value = value.unsqueeze(0)
        axis = value.ndim + self._axis
        if not value.numel():
            return
        if self._centre is None:
            self._centre = value.mean([each for each in range(value.ndim) if each != axis], dtype=torch.float64)
        samples = max(1, min(_CHUNK * value.shape[0] // value.numel(), -(-value.shape[0] // _PARTS)))
        for part in torch.split(value, samples) if axis else (value,):
            channels = part.movedim(axis, 0)
            self._add(channels.reshape(len(channels), -1).double(), self._centre)

    def _add(self, x: Tensor, centre: Tensor) -> None:
        """`x` is [C, positions], `centre` is [C]."""
        total = x.sum(1)
        self._count += x.shape[1]
        self._sum = self._sum + total
        self._squares = self._squares + x.square().sum(1)
        if not self._products or len(x) > _LARGEST_GRAM:
            return
        gram = x.new_empty(len(x), len(x))
        for start in range(0, len(x), _BLOCK):
            block = slice(start, start + _BLOCK)
            torch.mm(x[start:], x[block].T, out=gram[start:, block])
        self._gram = gram.clone() if self._gram is None else self._gram.add_(gram)
        self._parts += 1
        # about the centre, which all parts share: about its own mean a part of one position would have no spread
        around = total - x.shape[1] * centre
        for start in range(0, len(x), _BLOCK):
            block = slice(start, start + _BLOCK)
            below = gram[start:, block].addr_(centre[start:], total[block], alpha=-1)
            below = below.addr_(around[start:], centre[block], alpha=-1).square_()
            # blocks on the diagonal are whole, those below it stand for two
            self._spread += float(2 * below.sum() - below[: len(total[block])].sum()) / x.shape[1]

    def finish(self) -> InputMoments:
        """The moments; call it once, as the Gram is completed where it is."""
        count, gram = self._count, self._gram
        mean, square = torch.as_tensor(self._sum) / count, torch.as_tensor(self._squares) / count
        if gram is None:
            return InputMoments(count, mean, square, None)
        gram.tril_().div_(count).add_(gram.tril(-1).T)
        found = InputMoments(count, mean, square, gram)
        if self._parts < 2:
            return found
        covariance, off = cast("Tensor", found.covariance), mean - cast("Tensor", self._centre)
        spread = self._spread / count - float((covariance + torch.outer(off, off)).square().sum())
        trace = float(covariance.trace())
        return replace(found, noise=max(spread, 0.0) / (self._parts - 1) / trace**2 if trace > 0 else torch.inf)
