"""What passes share that write one layer as several in a row: which layers, what their outputs count, the edit.

The last of the new layers keeps the node, the path and the bias of the old one, so that what is behind finds it, and
a fit in the end (`fxopt/reconstruction.py`) knows what it gave.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, fx, nn

from fxopt import edit
from fxopt.absorption import add_offset
from fxopt.analysis.destinations import destination
from fxopt.analysis.originals import keep_original
from fxopt.analysis.shapes import shapes
from fxopt.analysis.weight_uses import reason_shared
from fxopt.layer_times import time_ratio
from fxopt.masking import mask_of
from fxopt.passes_base import Skip

if TYPE_CHECKING:
    from fxopt.program import Program

__all__ = [
    "LONGEST",
    "Sizes",
    "convolution_like",
    "output_scale",
    "reason_to_keep",
    "share_of_time",
    "sizes_of",
    "sorted_out",
    "substitute",
    "with_weight",
]

LONGEST = 4608  # values of a patch, whose covariance is looked at: 512 channels under 3 x 3
_LEAST_SCALE = 1e-3  # of the largest of a layer's outputs


class Sizes(NamedTuple):
    """Of what a layer reads and gives, for the example: channels aside, samples included.

    Attributes:
        inputs: positions of the input, per spatial axis, and their samples in front.
        outputs: the same of the output.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def reason_to_keep(program: Program, node: fx.Node, ignore: Sequence[str]) -> str | None:
    """Why a linear layer or convolution cannot be written as others, whatever they are; None if it can.

    Args:
        program: the program.
        node: calls the layer.
        ignore: patterns of layer paths.
    """
    layer: Any = program.module_of(node)
    if layer is None:
        return "it is a function, not a module"
    if any(fnmatch(str(node.target), pattern) for pattern in ignore):
        return "ignored"
    shared = reason_shared(program, node)
    if shared is not None:
        return shared
    if mask_of(layer) is not None:
        return "it has a mask, which other layers would lose: do this before prune_weights"
    if len(program.analysis(shapes)[node.name].shape) < (2 if program.op(node) == "linear" else layer.weight.ndim):
        return "what it reads has no batch axis"
    return None


def sorted_out(
    program: Program, kinds: Collection[str], reason_to_leave: Callable[[Program, fx.Node], str | None]
) -> tuple[list[fx.Node], list[Skip]]:
    """The layers that may be written as others, and those that are left alone.

    Args:
        program: the program.
        kinds: canonical operators of the layers to look at.
        reason_to_leave: why a layer is left alone; None if it is not.
    """
    layers: list[fx.Node] = []
    left: list[Skip] = []
    for node in program.nodes:
        if program.op(node) in kinds:
            reason = reason_to_leave(program, node)
            if reason is None:
                layers.append(node)
            else:
                left.append(Skip(node.name, reason))
    return layers, left


def sizes_of(program: Program, node: fx.Node) -> Sizes:
    """The sizes of what a layer reads and gives."""
    known = program.analysis(shapes)
    before = known[cast("fx.Node", program.call(node).arguments["input"]).name].shape
    after = known[node.name].shape
    if program.op(node) == "linear":
        return Sizes(before[:-1], after[:-1])
    return Sizes((before[0], *before[2:]), (after[0], *after[2:]))


def output_scale(program: Program, node: fx.Node) -> Tensor:
    """What each output of a layer counts, float64[outputs], positive; no output counts next to nothing."""
    weight: Tensor = cast("Any", program.module_of(node)).weight
    scale = destination(program, node).scale.to(weight.device)
    axis = -1 if program.op(node) == "linear" else 1
    if scale.ndim <= 1 or not scale.shape[axis] == scale.numel() == len(weight):
        return torch.ones(len(weight), dtype=torch.float64, device=weight.device)
    sizes = scale.reshape(-1).abs()
    most = float(sizes.max())
    return sizes.clamp(min=_LEAST_SCALE * most) if most > 0 else torch.ones_like(sizes)


def convolution_like(layer: Any, weight: Tensor, own: Sequence[bool], groups: int) -> nn.Module:
    """A convolution without a bias that has some of the axes of another one's kernel.

    Args:
        layer: the other convolution, whose stride, padding and dilation it has along those axes.
        weight: of the new one, in any data type.
        own: which of the spatial axes it has.
        groups: of the new one.
    """
    padding = layer.padding
    if not isinstance(padding, str):
        padding = tuple(pad if mine else 0 for pad, mine in zip(padding, own, strict=True))
    made: nn.Module = type(layer)(
        weight.shape[1] * groups,
        len(weight),
        tuple(weight.shape[2:]),
        stride=tuple(step if mine else 1 for step, mine in zip(layer.stride, own, strict=True)),
        padding=padding,
        dilation=tuple(step if mine else 1 for step, mine in zip(layer.dilation, own, strict=True)),
        groups=groups,
        bias=False,
        padding_mode=layer.padding_mode,
        device="meta",
    )
    return with_weight(made, weight, layer)


def with_weight(made: nn.Module, weight: Tensor, layer: Any) -> nn.Module:
    """Gives a new layer its weight, as a parameter like that of the old one."""
    like: Tensor = layer.weight
    made.weight = nn.Parameter(weight.to(like).contiguous(), like.requires_grad)
    return made


def share_of_time(program: Program, node: fx.Node, layers: Sequence[nn.Module]) -> float:
    """The time that layers in a row take, over that of the layer that they are to take the place of.

    Args:
        program: with a backend to measure on.
        node: calls the layer.
        layers: all but the last one's bias, which is the old one's.

    Raises:
        InputError: if it is not known which backend the program is for.
        BackendError: if the backend cannot lower them.
    """
    layer: Any = program.module_of(node)
    _take_bias(layers[-1], layer)
    source = program.analysis(shapes)[cast("fx.Node", program.call(node).arguments["input"]).name]
    return time_ratio(program, layer, layers, source)


def substitute(
    program: Program, node: fx.Node, first: Mapping[str, nn.Module], last: nn.Module, offset: Tensor, original: Program
) -> None:
    """Puts layers in a row in the place of one.

    Args:
        program: is edited.
        node: calls the layer.
        first: all but the last layer, in order, by what is put behind the old layer's path to make theirs.
        last: takes over node, path and bias.
        offset: what is added to the bias, or taken up by the BatchNorm behind, float64[outputs].
        original: what `original_of` gave, which is remembered.
    """
    _take_bias(last, program.module_of(node))
    source = cast("fx.Node", program.call(node).arguments["input"])
    for name, module in first.items():
        source = edit.insert_before(program, node, module, (source,), name=f"{node.target}_{name}")
    node = edit.replace(program, node, last, (source,))
    add_offset(program, node, offset)
    keep_original(program, original)


def _take_bias(made: Any, layer: Any) -> None:
    if layer.bias is not None:
        made.bias = nn.Parameter(layer.bias.detach(), layer.bias.requires_grad)
