"""How the loss would change if nothing heard a channel: first-order Taylor expansion, sample by sample.

For a sample with the loss L, removing a unit u from all that reads it changes L by about

    t_u = sum a dL/da

over all elements a of u at the inputs of the operators that mix channels: the next layers, and products of values. The
score is the mean of t_u² over the calibration samples. They are taken to lie along the first axis of every value.

References: Molchanov et al. (arXiv:1611.06440), Theis et al. (arXiv:1801.05787).
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from fxopt.analysis.channels import Channels
from fxopt.analysis.labels import Labels
from fxopt.errors import InputError
from fxopt.progress import progress
from fxopt.randomness import fixed_random_state

if TYPE_CHECKING:
    from fxopt.program import Program

__all__ = ["loss_changes"]

_MIXING = frozenset(
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d linear matmul mm bmm einsum "
    "scaled_dot_product_attention".split()
)


def loss_changes(program: Program, channels: Channels) -> Mapping[int, float]:
    """The mean squared change of the loss by unit, for all units that something reads.

    Args:
        program: with calibration data whose batches hold targets behind the inputs; see `Program.loss_of`.
        channels: its channels.

    Raises:
        InputError: if there are no calibration data or no targets, they do not fit, or the loss is not finite.
    """
    read = _values_read(program, channels)
    units = torch.tensor(sorted({unit for labels, _ in read.values() for unit in labels.tolist()}), dtype=torch.int64)
    total = torch.zeros(len(units), dtype=torch.float64)
    samples = 0
    count = operator.length_hint(program.calibration, 0)
    with progress("gradients of the loss", count) as advance, fixed_random_state():
        for inputs, targets in program.calibration_pairs():
            values: dict[fx.Node, Tensor] = {}

            def watch(node: fx.Node, value: Any, values: dict[fx.Node, Tensor] = values) -> None:
                if node in read and isinstance(value, Tensor):
                    values[node] = value if value.requires_grad else value.requires_grad_()

            loss = program.loss_of(program.run(*inputs, watch=watch, gradients=True), targets)
            if not bool(loss.isfinite()):
                raise InputError("the loss is not finite on the calibration data")
            gradients = torch.autograd.grad(loss, list(values.values()), allow_unused=True)
            size = len(inputs[0])
            changes = torch.zeros(len(units), size, dtype=torch.float64)
            for (node, value), gradient in zip(values.items(), gradients, strict=True):
                if gradient is not None:
                    labels, axis = read[node]
                    each = _by_sample((value * gradient).detach(), axis, size).double().cpu()
                    changes.index_add_(0, torch.searchsorted(units, labels), each)
            # the loss is a mean over the samples
            total += (changes * size).square().sum(1)
            samples += size
            advance(1)
    return dict(zip(units.tolist(), (total / max(samples, 1)).tolist(), strict=True))


def _values_read(program: Program, channels: Channels) -> dict[fx.Node, tuple[Tensor, int]]:
    """The values that operators which mix channels read: one label per index of an axis, and that axis from the end."""
    found = {}
    for node in program.nodes:
        if program.op(node) in _MIXING:
            for source in node.all_input_nodes:
                value = channels.values[source.name]
                if isinstance(value, Labels) and len(value.axes) == 1:
                    (axis,) = value.axes
                    found[source] = (value.compact.reshape(-1), axis - len(value.shape))
    return found


def _by_sample(changes: Tensor, axis: int, size: int) -> Tensor:
    """Summed over all but the axis of channels and the samples: [C, samples]; spread evenly if these are not axis 0."""
    moved = changes.movedim(axis, 0)
    if changes.ndim > 1 and -axis < changes.ndim and moved.shape[1] % size == 0:
        return moved.reshape(len(moved), size, -1).sum(2)
    return moved.reshape(len(moved), -1).sum(1, keepdim=True).expand(-1, size) / size
