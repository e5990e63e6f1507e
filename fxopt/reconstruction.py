"""Fits the layers of a rewritten program, one after the other, so that they give what they gave before.

The rewritten program is run beside the original, on the calibration data and operator by operator. Where they come to a
convolution or linear layer, its weight and bias are fitted by least squares (`fxopt/regression.py`): from the patches
that it reads in the rewritten program, in which the layers before it are fitted already, to what it gives in the
original. So a layer also makes up for what those before it could not. Where its output is scaled per channel, as by a
BatchNorm in evaluation mode, and then goes into nothing but a sum, the fit is to what gives the original's sum beside
the other operands as they are now.

Weights in front of a BatchNorm keep their size, which does not matter until they are trained.

As many batches are used as fit in memory, the first ones. Left as they are: layers that are called at several places,
transposed convolutions, patches of more than 4608 values.

References: ThiNet (arXiv:1707.06342) for the patches; Zhang et al. (arXiv:1505.06798) for the asymmetric fit; He et al.
(arXiv:1707.06168) for the sums.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, fx, nn

from fxopt import edit
from fxopt.absorption import absorbing_norm, add_offset, rescale
from fxopt.analysis.destinations import Destination, destination
from fxopt.analysis.liveness import unused_after, windows
from fxopt.analysis.patches import PatchLayer
from fxopt.analysis.samples import Seen, samples, wide
from fxopt.analysis.shapes import shapes
from fxopt.analysis.weight_uses import reason_shared
from fxopt.errors import InputError
from fxopt.masking import mask_of
from fxopt.passes_base import Rewrite, Skip, listed
from fxopt.progress import progress
from fxopt.randomness import fixed_random_state
from fxopt.regression import Regression
from fxopt.sharing import buffers_restored
from fxopt.stepwise import StepwiseRun

if TYPE_CHECKING:
    from fxopt.program import Program

__all__ = ["Slicer", "layers_behind", "plan_fit", "reconstruct"]

_log = logging.getLogger(__name__)

Slicer = Callable[[str, Tensor], Tensor]
"""By the name of a node: of the value that it gives in the original, what the rewritten program has left."""

_LONGEST = 4608  # values of a patch: 512 channels under 3 x 3; the sums then take 340 MiB
_MEMORY = 2**30  # bytes of the original's activations; those of the rewritten program come on top
_LEAST_SCALE = 1e-3  # of the largest of a layer's channels


def layers_behind(program: Program, nodes: Collection[fx.Node]) -> Iterator[tuple[fx.Node, str | None]]:
    """The convolutions and linear layers that see what depends on the value of one of these nodes.

    Yields:
        The call, and why `reconstruct` leaves that layer as it is; None if it can be fitted.
    """
    behind: set[fx.Node] = set()
    for node in program.nodes:
        if any(source in nodes or source in behind for source in node.all_input_nodes):
            behind.add(node)
            call = program.call(node)
            if call.op == "linear" or call.op.startswith("conv"):
                yield node, _reason_not_to_fit(program, node, call.module)


def plan_fit(
    program: Program, changed: Collection[fx.Node], rewritten: Collection[fx.Node] = ()
) -> Iterator[Rewrite | Skip]:
    """The rewrite that fits the layers which see other values than before, and why some of them are not fitted.

    Args:
        program: with calibration data, as it is before.
        changed: the nodes that will give other values.
        rewritten: layers that will be others, and are fitted too.
    """
    first = program.nodes[0].name
    if program.training:
        yield Skip(first, "no layer is fitted to the data, as values are random in training mode")
        return
    if isinstance(program.calibration, Iterator):
        yield Skip(first, "no layer is fitted to the data: an iterator can be read once; pass a list")
        return
    layers = [node.name for node in rewritten]
    for node, reason in layers_behind(program, changed):
        if node in rewritten:
            continue
        if reason is None:
            layers.append(node.name)
        else:
            yield Skip(node.name, f"is not fitted to the data: {reason}")
    if layers:
        order = {node.name: place for place, node in enumerate(program.nodes)}
        layers.sort(key=order.__getitem__)
        yield Rewrite(layers[0], f"fit {len(layers)} layers to what they gave: {listed(layers)}", {"fit": layers})


def _reason_not_to_fit(program: Program, node: fx.Node, layer: Any) -> str | None:
    if layer is None:
        return "it is a function, not a module"
    if program.op(node).startswith("conv_transpose"):
        return "it is a transposed convolution"
    shared = reason_shared(program, node)
    if shared is not None:
        return shared
    if mask_of(layer) is not None:
        return "it has a mask, which a fit would fill"
    source = program.analysis(shapes)[cast("fx.Node", program.call(node).arguments["input"]).name]
    if len(source.shape) < (2 if program.op(node) == "linear" else layer.weight.ndim):
        return "what it reads has no batch axis"
    length = layer.weight[0].numel()
    return f"each output reads {length} values, and {_LONGEST} is the most" if length > _LONGEST else None


def reconstruct(program: Program, original: Program, layers: Iterable[str], left_of: Slicer) -> None:
    """Fits layers to what the original gives.

    Args:
        program: is edited; its nodes have the names that they have in the original.
        original: the program as it was, with calibration data, in evaluation mode.
        layers: names of the nodes that call them.
        left_of: what is left of a value of the original.

    Raises:
        InputError: if a name is not that of a node, the data do not fit the model, or values are not finite on them.
    """
    order = {node.name: place for place, node in enumerate(program.nodes)}
    wanted = sorted(layers, key=lambda name: order[program.node(name).name])
    goals = {name: _goal(program, name, order) for name in wanted}
    batches = next(windows(original, _MEMORY))
    with (
        progress("fitting layers", len(wanted), "layers") as advance,
        fixed_random_state(),
        torch.no_grad(),
        buffers_restored(original.module),
        buffers_restored(program.module),
    ):
        unused = unused_after(original), unused_after(program)
        pairs = [
            (StepwiseRun(original, unused[0], inputs), StepwiseRun(program, unused[1], inputs)) for inputs in batches
        ]
        for name in wanted:
            for before, after in pairs:
                before.through(name)
                after.before(name)
            seen = [_seen(name, *runs, goals[name], left_of) for runs in pairs]
            _fit(program, name, seen, _absorbed(program, original, name, left_of))
            _keep_size(program, original, name, left_of)
            advance(1)


def _seen(name: str, before: StepwiseRun, after: StepwiseRun, goal: Destination, left_of: Slicer) -> Seen:
    """What a layer reads in the rewritten program, and what it is to give."""
    target = wide(left_of(name, before.values[name]))
    for other, factor in goal.others:
        off = wide(left_of(other, before.values[other])) - wide(after.values[other])
        target = target + off * (factor * _inverse(goal.scale)).to(off)
    return Seen(after.argument(name), target)


def _goal(program: Program, name: str, order: Mapping[str, int]) -> Destination:
    """The sum that a layer is fitted to; without other operands if they are not all computed before it."""
    found = destination(program, program.node(name))
    return found if all(order[other] < order[name] for other, _ in found.others) else Destination(found.scale)


def _inverse(scale: Tensor) -> Tensor:
    """1 / scale; 0 where the layer has next to no say in the sum."""
    return torch.where(scale.abs() > _LEAST_SCALE * scale.abs().max(), 1 / scale, 0.0)


def _absorbed(program: Program, original: Program, name: str, left_of: Slicer) -> Tensor | float:
    """What the BatchNorm behind a layer adds by now to what it gives, since it has taken up a bias."""
    norm = absorbing_norm(program, program.node(name))
    if norm is None:
        return 0.0
    before, now = (cast("Any", each.module_of(each.node(norm.name))).running_mean for each in (original, program))
    left = left_of(norm.name, before.unsqueeze(0)).squeeze(0)
    return left.double() - cast("Tensor", now).double()


def _fit(program: Program, name: str, batches: Sequence[Seen], absorbed: Tensor | float) -> None:
    """Fits one layer to what there is of all batches, which is what it gives together with what is absorbed."""
    node = program.node(name)
    layer = PatchLayer(cast("nn.Module", program.module_of(node)))
    regression = Regression(layer.weight)
    for half, inputs, outputs in samples(layer, batches):
        regression.add(half, inputs, outputs)
    weight, bias, left, before = regression.solve()
    if not (weight.isfinite().all() and bias.isfinite().all()):
        raise InputError(f"what {name} reads or gives is not finite on the calibration data")
    _log.debug("%s: %.3g of the variance is left, %.3g before", name, left, before)
    edit.set_tensor(program, node, "weight", layer.as_weight(weight))
    add_offset(program, node, bias.reshape(-1) - layer.bias - absorbed)


def _keep_size(program: Program, original: Program, name: str, left_of: Slicer) -> None:
    """Scales the weights of a layer in front of a BatchNorm to the root mean square that they have in the original.

    Fitted weights are larger, and would train more slowly for it.
    """
    node = program.node(name)
    norm = absorbing_norm(program, node)
    if norm is None or cast("Any", program.module_of(norm)).weight is None:
        return
    before, now = (
        cast("Any", each.module_of(each.node(name))).weight.detach().double().flatten(1).square().mean(1).sqrt()
        for each in (original, program)
    )
    factors = left_of(norm.name, before.unsqueeze(0)).squeeze(0) / now
    rescale(program, node, norm, torch.where(factors.isfinite() & (factors > 0), factors, 1.0))
