"""What each BatchNorm sees of the calibration data once the ones before it have statistics from the same data.

    mean = sum x / n        variance = sum (x - mean)² / (n - 1)

over all n values that a channel has in the calibration data. The program is run operator by operator, over all batches
at once: each BatchNorm takes its statistics from the whole of its input, and normalizes with them before anything
behind it is computed. That takes one run and is exact, other than the usual way, in which a BatchNorm normalizes each
batch by the statistics of that batch (PreciseBN, arXiv:2105.07576).

All batches at once have to be in memory. Where their activations would take more than a GiB they are run in windows
that fit, each normalized by its own statistics, and the moments of the windows are pooled. The errors that this makes
cancel to first order. Measured on a ResNet-14 with windows of 8, 32 and 128 images, the outputs differ by 7 %, 1.6 %
and 0.5 % from the exact ones. Two ways that look better are worse: normalizing by what all windows so far have in
common (5 %, 4 % with large ones: the errors no longer cancel), and running again with the statistics of the run
before, which diverges in deep networks.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.nn.modules.batchnorm import _BatchNorm

from fxopt.analysis.affine import formula_of
from fxopt.analysis.liveness import unused_after, windows
from fxopt.progress import progress
from fxopt.randomness import fixed_random_state
from fxopt.sharing import buffers_restored
from fxopt.stepwise import StepwiseRun

if TYPE_CHECKING:
    from fxopt.program import Program

__all__ = ["Moments", "norm_inputs"]

_MEMORY = 2**30  # bytes of activations that are held at a time


@dataclass(frozen=True, eq=False)
class Moments:
    """Moments of some values, per channel, in float64.

    Attributes:
        count: how many values each channel has.
        mean: their mean, [C].
        squares: the sum of their squared deviations from it, [C].
    """

    count: int
    mean: Tensor
    squares: Tensor

    @classmethod
    def of(cls, value: Tensor) -> Moments:
        """The moments of a tensor with its channels on axis 1."""
        axes = [axis for axis in range(value.ndim) if axis != 1]
        count = value.numel() // value.shape[1]
        wide = value.float() if value.dtype.itemsize < 4 else value
        variance, mean = torch.var_mean(wide, axes, correction=0)
        return cls(count, mean.double(), variance.double() * count)

    def joined(self, other: Moments) -> Moments:
        """The moments of both sets of values together."""
        count = self.count + other.count
        step = other.mean - self.mean
        squares = self.squares + other.squares + step.square() * (self.count * other.count / count)
        return Moments(count, self.mean + step * (other.count / count), squares)

    @property
    def variance(self) -> Tensor:
        """The unbiased variance, [C], which PyTorch keeps as `running_var`; 0 for a single value."""
        return self.squares / max(1, self.count - 1)


def norm_inputs(program: Program) -> Mapping[str, Moments]:
    """By node name: the moments of the input of each BatchNorm call that normalizes by running statistics.

    They depend on everything in the program but those running statistics.

    Raises:
        InputError: if there are no calibration data, or they do not fit the model.
    """
    calls = [node for node in program.nodes if program.op(node) == "batch_norm"]
    norms = {
        node: cast(_BatchNorm, program.module_of(node))
        for node in calls
        if not isinstance(formula_of(program, node), str)
    }
    found: dict[str, Moments] = {}
    total = operator.length_hint(program.calibration, 0)
    with progress("statistics of BatchNorm", total) as advance, fixed_random_state(), torch.no_grad():
        for window in windows(program, _MEMORY):
            with buffers_restored(program.module):
                for name, moments in _run(program, window, norms):
                    found[name] = found[name].joined(moments) if name in found else moments
                    advance(len(window) / len(norms))
    return found


def _run(
    program: Program, window: Sequence[tuple[Tensor, ...]], norms: Mapping[fx.Node, _BatchNorm]
) -> Iterator[tuple[str, Moments]]:
    """Runs all batches, operator by operator, up to the last of the norms; the moments of each as they are found."""
    unused = unused_after(program)
    runs = [StepwiseRun(program, unused, inputs) for inputs in window]
    for node, norm in norms.items():
        for run in runs:
            run.before(node.name)
        moments = reduce(Moments.joined, [Moments.of(run.argument(node.name)) for run in runs])
        yield node.name, moments
        for run in runs:
            run.give(_normalized(run.argument(node.name), norm, moments))


def _normalized(value: Tensor, norm: _BatchNorm, moments: Moments) -> Tensor:
    """What the norm gives in evaluation mode, with these for its running statistics."""
    mean = moments.mean.to(norm.get_buffer("running_mean"))
    variance = moments.variance.to(norm.get_buffer("running_var"))
    return F.batch_norm(value, mean, variance, norm.weight, norm.bias, training=False, eps=norm.eps)
