"""Values whose channels can be scaled without a change of what the program computes.

    y = W2 f(W1 x + b1) = (W2 / s) f(s (W1 x + b1))        s > 0, one for each channel between the two layers

holds where nothing but scaling and choosing lies between: f(s v) = s f(v) for a ReLU, a pooling, a dropout. In front
may be a convolution, a linear layer or the affine part of a layer norm; behind any number of convolutions and linear
layers that read nothing but this value.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from fxopt.analysis.shapes import TensorSpec, shapes
from fxopt.analysis.weight_uses import weight_uses

if TYPE_CHECKING:
    from torch import fx

    from fxopt.program import Program

__all__ = ["ScalableChannels", "scalable_channels"]

_CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d"})
_HOMOGENEOUS = frozenset(
    "relu leaky_relu identity contiguous dropout dropout1d dropout2d dropout3d drop_path max_pool1d max_pool2d "
    "max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d "
    "adaptive_max_pool2d".split()
)


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
    elif op not in _CONVOLUTIONS and op != "linear":
        return False
    return _is_own(program, node)


def _is_own(program: Program, node: fx.Node) -> bool:
    """Whether the tensors of a layer are read by this call alone."""
    uses = program.analysis(weight_uses)
    layer: Any = program.module_of(node)
    return all(uses[id(tensor)] == 1 for tensor in (layer.weight, layer.bias) if tensor is not None)


def _behind(program: Program, giver: fx.Node) -> ScalableChannels | None:
    layer: Any = program.module_of(giver)
    count = int(layer.weight.shape[0])
    last = program.op(giver) not in _CONVOLUTIONS
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
            if call.op in _HOMOGENEOUS or _flattens(program, user, count):
                reached.append(user)
            elif _reads_channels(program, user, count, last=last or _rank(program, value) == 2):
                readers.append(user.name)
                if value.name not in values:
                    values.append(value.name)
            else:
                return None
    return ScalableChannels(giver.name, tuple(values), tuple(readers))


def _rank(program: Program, node: fx.Node) -> int:
    spec = program.analysis(shapes).get(node.name)
    return len(spec.shape) if isinstance(spec, TensorSpec) else 0


def _flattens(program: Program, node: fx.Node, count: int) -> bool:
    """Whether a node takes positions away and leaves one number for each channel."""
    known = program.analysis(shapes)
    spec = known.get(node.name)
    source = known.get(node.all_input_nodes[0].name)
    if not isinstance(spec, TensorSpec) or not isinstance(source, TensorSpec):
        return False
    op = program.op(node)
    if op not in ("flatten", "mean") or len(source.shape) < 3 or source.shape[1] != count:
        return False
    return spec.shape == source.shape[:2]


def _reads_channels(program: Program, node: fx.Node, count: int, *, last: bool) -> bool:
    layer: Any = program.module_of(node)
    op = program.op(node)
    if layer is None or (op != "linear" and op not in _CONVOLUTIONS) or not _is_own(program, node):
        return False
    if op == "linear":
        return last and layer.in_features == count
    # what a convolution pads with must be zero
    return not last and layer.in_channels == count and layer.padding_mode == "zeros"
