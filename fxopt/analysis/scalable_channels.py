"""Values whose channels can be scaled without a change of what the program computes.

    y = W2 f(W1 x + b1) = (W2 / s) f(s (W1 x + b1))        s > 0, one for each channel between the two layers

holds where nothing but scaling and choosing lies between: f(s v) = s f(v) for a ReLU, a pooling, a dropout. In front
may be a convolution, a linear layer or the affine part of a layer norm; behind any number of convolutions and linear
layers that read nothing but this value.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from fxopt.analysis.shapes import TensorSpec, axes_of, shapes
from fxopt.analysis.weight_uses import weight_uses

if TYPE_CHECKING:
    from torch import fx

    from fxopt.program import Program

__all__ = ["ScalableChannels", "scalable_channels"]

_ELEMENTWISE = frozenset("relu leaky_relu identity contiguous dropout dropout1d dropout2d dropout3d drop_path".split())
_POOLS = {f"{kind}_pool{axes}d": axes for kind in ("max", "avg", "adaptive_avg", "adaptive_max") for axes in (1, 2, 3)}
"""How many axes each takes places from: the last ones."""
_CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d"})


class ScalableChannels(NamedTuple):
    """Channels between a layer and those that read it.

    Attributes:
        giver: name of the node that calls the layer in front.
        values: names of the nodes whose values the layers behind read.
        readers: names of the nodes that call these.
    """

    giver: str
    values: tuple[str, ...]
    readers: tuple[str, ...]


def scalable_channels(program: Program) -> list[ScalableChannels]:
    """All of them, in the order of the program."""
    found = (_behind(program, node) for node in program.nodes if _gives(program, node))
    return [item for item in found if item is not None]


def _gives(program: Program, node: fx.Node) -> bool:
    """Whether a node calls a layer whose outputs can be scaled by its own tensors."""
    layer: Any = program.module_of(node)
    op = program.op(node)
    if layer is None or layer.training:
        return False
    if op == "layer_norm":
        if not layer.elementwise_affine or len(layer.normalized_shape) != 1:
            return False
    elif op in _CONVOLUTIONS:
        if not _has_batch(layer, _rank(program, node)):
            return False
    elif op != "linear":
        return False
    return _is_own(program, node)


def _has_batch(convolution: Any, rank: int) -> bool:
    """Whether what a convolution reads or gives has a batch axis, and its channels on axis 1."""
    return bool(rank == len(convolution.kernel_size) + 2)


def _is_own(program: Program, node: fx.Node) -> bool:
    """Whether the tensors of a layer are read by this call alone."""
    uses = program.analysis(weight_uses)
    layer: Any = program.module_of(node)
    return all(uses[id(tensor)] == 1 for tensor in (layer.weight, layer.bias) if tensor is not None)


def _behind(program: Program, giver: fx.Node) -> ScalableChannels | None:
    layer: Any = program.module_of(giver)
    count = int(layer.weight.shape[0])
    last = program.op(giver) not in _CONVOLUTIONS  # of the axes, that of the channels; else it is 1
    readers: list[str] = []
    values: list[str] = []
    reached = [giver]
    while reached:
        value = reached.pop()
        if not value.users:
            return None
        for user in value.users:
            call = program.call(user)
            if call.arguments.get("input") is not value or len(user.all_input_nodes) != 1 or call.inplace:
                return None
            if call.op in _ELEMENTWISE or (not last and _keeps_channels_apart(program, user)):
                reached.append(user)
            elif _reads_channels(program, user, count, _rank(program, value), last=last):
                readers.append(user.name)
                if value.name not in values:
                    values.append(value.name)
            else:
                return None
    return ScalableChannels(giver.name, tuple(values), tuple(readers))


def _rank(program: Program, node: fx.Node) -> int:
    spec = program.analysis(shapes).get(node.name)
    return len(spec.shape) if isinstance(spec, TensorSpec) else 0


def _keeps_channels_apart(program: Program, node: fx.Node) -> bool:
    """Whether a node pools, averages or takes away places alone, of a value with its channels on axis 1."""
    call, rank = program.call(node), _rank(program, node.all_input_nodes[0])
    if call.op == "flatten":
        known = program.analysis(shapes)
        spec, source = known.get(node.name), known.get(node.all_input_nodes[0].name)
        return isinstance(spec, TensorSpec) and isinstance(source, TensorSpec) and spec.shape == source.shape[:2]
    if call.op == "mean":
        axes = axes_of(call.arguments.get("dim"), rank)
        return bool(axes) and min(axes) > 1
    return _POOLS.get(call.op) == rank - 2


def _reads_channels(program: Program, node: fx.Node, count: int, rank: int, *, last: bool) -> bool:
    layer: Any = program.module_of(node)
    op = program.op(node)
    if layer is None or (op != "linear" and op not in _CONVOLUTIONS) or not _is_own(program, node):
        return False
    if op == "linear":
        return (last or rank == 2) and layer.in_features == count
    # what a convolution pads with must be zero
    fits = _has_batch(layer, rank) and layer.in_channels == count
    return not last and fits and layer.padding_mode == "zeros"
