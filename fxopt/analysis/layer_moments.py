"""Mean and covariance of the patches that layers read, and of what they give, over the calibration data.

The program is run operator by operator; at each layer the sums are taken from rows that are drawn there
(`fxopt/analysis/samples.py`), handed to the caller, and dropped: a covariance of patches may take a hundred MiB.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from fxopt.analysis.liveness import unused_after, windows
from fxopt.analysis.patches import PatchLayer
from fxopt.analysis.samples import Seen, samples
from fxopt.errors import InputError
from fxopt.randomness import fixed_random_state
from fxopt.sharing import buffers_restored
from fxopt.stepwise import StepwiseRun

if TYPE_CHECKING:
    from fxopt.program import Program

__all__ = ["LayerMoments", "Moments", "layer_moments", "patch_moments"]

_MEMORY = 2**30  # bytes of activations


@dataclass(frozen=True, eq=False)
class Moments:
    """Of some vectors, for several groups of them at once, in float64.

    Attributes:
        mean: [groups, n].
        covariance: [groups, n, n].
        noise: how uncertain the covariance S is: E|S - E S|² over tr(S)², the mean over the groups; from what two
            halves of the samples differ by.
    """

    mean: Tensor
    covariance: Tensor
    noise: float


@dataclass(frozen=True, eq=False)
class LayerMoments:
    """What a layer reads and gives.

    Attributes:
        patches: of the patches, n = D; None where they are not asked for.
        outputs: of the outputs, n = outputs / groups.
    """

    patches: Moments | None
    outputs: Moments


def layer_moments(
    program: Program, layers: Sequence[str], with_patches: Callable[[PatchLayer], bool]
) -> Iterator[tuple[str, LayerMoments]]:
    """The moments of each layer in turn, from as many batches as fit in memory, the first ones.

    Args:
        program: with calibration data.
        layers: names of nodes that call convolutions or linear layers, in the order in which they run.
        with_patches: for which of them the patches are looked at.

    Raises:
        InputError: if there are no calibration data, they do not fit the model, or values are not finite on them.
    """
    for name, layer, seen in _layers_run(program, layers):
        patches, outputs = [_Sums() for _ in range(2)], [_Sums() for _ in range(2)]
        wanted = with_patches(layer)
        for half, rows, given in samples(layer, seen):
            if wanted:
                patches[half].add(rows)
            outputs[half].add(given)
        found = LayerMoments(_moments(*patches) if wanted else None, _moments(*outputs))
        if not found.outputs.covariance.isfinite().all():
            raise InputError(f"what {name} gives is not finite on the calibration data")
        yield name, found


def patch_moments(program: Program, layers: Sequence[str]) -> Iterator[tuple[str, Moments]]:
    """The moments of the patches alone, from fewer rows than `layer_moments` takes.

    Args:
        program: with calibration data.
        layers: names of nodes that call convolutions or linear layers, in the order in which they run.

    Raises:
        InputError: if there are no calibration data, they do not fit the model, or values are not finite on them.
    """
    for name, layer, seen in _layers_run(program, layers):
        sums = [_Sums() for _ in range(2)]
        for half, rows, _ in samples(layer, seen, few=True):
            sums[half].add(rows)
        found = _moments(*sums)
        if not found.covariance.isfinite().all():
            raise InputError(f"what {name} reads is not finite on the calibration data")
        yield name, found


def _layers_run(program: Program, layers: Sequence[str]) -> Iterator[tuple[str, PatchLayer, list[Seen]]]:
    """Each layer in turn with what it reads and gives."""
    batches = next(windows(program, _MEMORY))
    unused = unused_after(program)
    with fixed_random_state(), torch.no_grad(), buffers_restored(program.module):
        runs = [StepwiseRun(program, unused, inputs) for inputs in batches]
        for name in layers:
            layer = PatchLayer(cast("nn.Module", program.module_of(program.node(name))))
            seen = []
            for run in runs:
                run.before(name)
                value = run.argument(name)
                run.through(name)
                seen.append(Seen(layer.with_samples(value), layer.with_samples(run.values[name])))
            yield name, layer, seen


class _Sums:
    """Of rows, about the first that were seen."""

    def __init__(self) -> None:
        self.count = 0
        self.centre: Tensor | None = None
        self.total: Tensor | float = 0.0
        self.gram: Tensor | float = 0.0

    def add(self, rows: Tensor) -> None:
        """Takes in rows, [groups, rows, n]."""
        if not rows.shape[1]:
            return
        if self.centre is None:
            self.centre = rows.mean(1, keepdim=True)
        around = rows - self.centre
        self.count += rows.shape[1]
        self.total = self.total + around.sum(1).double()
        # a float32 product keeps its digits, as the rows are centred
        self.gram = self.gram + (around.transpose(1, 2) @ around).double()

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and covariance."""
        total = torch.as_tensor(self.total) / self.count
        covariance = torch.as_tensor(self.gram) / self.count - total.unsqueeze(2) * total.unsqueeze(1)
        return cast("Tensor", self.centre).squeeze(1).double() + total, covariance


def _moments(one: _Sums, other: _Sums) -> Moments:
    if not one.count or not other.count:
        return Moments(*(one if one.count else other).moments(), torch.inf)
    (mean, covariance), (mean_2, covariance_2) = one.moments(), other.moments()
    share = one.count / (one.count + other.count)
    step = mean_2 - mean
    both = share * covariance + (1 - share) * covariance_2
    both = both + share * (1 - share) * step.unsqueeze(2) * step.unsqueeze(1)
    traces = both.diagonal(dim1=1, dim2=2).sum(1).square()
    off = (covariance - covariance_2).square().sum((1, 2)) / 4
    noise = float(torch.where(traces > 0, off / traces, 0.0).mean())
    return Moments(mean + (1 - share) * step, both, noise)
