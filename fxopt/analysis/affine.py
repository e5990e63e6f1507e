"""Which nodes are affine per channel, y = s1 x1 + s2 x2 + ... + t, with constants s and t: sums, scales, fixed BatchNorm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, fx, nn

from fxopt.analysis.identities import is_identity
from fxopt.analysis.shapes import TensorSpec, shapes

if TYPE_CHECKING:
    from fxopt.program import Program

__all__ = ["Affine", "affine_of"]


class Affine(NamedTuple):
    """y = sum of factor * operand, + shift. Operands have the shape and dtype of y.

    Attributes:
        operands: nodes, each with its factor: a number, or a float64 tensor with one value per channel.
        shift: a number, or a float64 tensor with one value per channel.
        axis: where the channels are; None if all constants are numbers.
    """

    operands: tuple[tuple[fx.Node, Tensor | float], ...]
    shift: Tensor | float = 0.0
    axis: int | None = None

    @property
    def is_sum(self) -> bool:
        """Whether it only adds or subtracts several operands."""
        return len(self.operands) > 1


def affine_of(program: Program, node: fx.Node) -> Affine | str | None:
    """What `node` computes, if that is affine per channel; a reason if only its mode forbids it; None otherwise."""
    call = program.call(node)
    if call.inplace:
        return None
    found: Affine | str | None = None
    if is_identity(program, node):
        found = Affine(((cast(fx.Node, node.args[0]), 1.0),))
    elif call.op == "batch_norm":
        found = _batch_norm(node, call.module)
    elif call.op in ("add", "sub"):
        found = _sum(program, node, call.arguments, -1.0 if call.op == "sub" else 1.0)
    elif call.op in ("mul", "div"):
        found = _scaled(program, node, call.op, call.arguments)
    elif call.op == "neg":
        found = Affine(((cast(fx.Node, call.arguments["input"]), -1.0),))
    if isinstance(found, Affine) and not _keeps_shape(program, node, found):
        return None
    return found


def _batch_norm(node: fx.Node, module: nn.Module | None) -> Affine | str:
    if not isinstance(module, nn.modules.batchnorm._BatchNorm):
        return f"{node.name} is a function of computed statistics, not a module"
    if module.training:
        return f"{node.target} is in training mode: call model.eval() first"
    if module.running_mean is None or module.running_var is None:
        return f"{node.target} has no running statistics: it normalises by the batch at hand"
    factor = (module.running_var.double() + module.eps).rsqrt()
    if module.weight is not None:
        factor = factor * module.weight.detach().double()
    shift = -module.running_mean.double() * factor
    if module.bias is not None:
        shift = shift + module.bias.detach().double()
    return Affine(((cast(fx.Node, node.args[0]), factor),), shift, 1)


def _sum(program: Program, node: fx.Node, arguments: Any, sign: float) -> Affine | None:
    alpha = arguments.get("alpha", 1)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or alpha == 0:
        return None
    terms = [(arguments.get("input"), 1.0), (arguments.get("other"), sign * alpha)]
    constants = [_constant(program, value, node) for value, _ in terms]
    operands = [(value, factor) for (value, factor), held in zip(terms, constants, strict=True) if held is None]
    if not operands or not all(isinstance(value, fx.Node) for value, _ in operands):
        return None
    shift: Tensor | float = 0.0
    axis = None
    for (_, factor), held in zip(terms, constants, strict=True):
        if held is not None:
            shift, axis = factor * held[0], held[1]
    return Affine(tuple(operands), shift, axis)


def _scaled(program: Program, node: fx.Node, op: str, arguments: Any) -> Affine | None:
    if arguments.get("rounding_mode") is not None:
        return None
    value, factor = arguments.get("input"), _constant(program, arguments.get("other"), node)
    if factor is None and op == "mul":
        value, factor = arguments.get("other"), _constant(program, arguments.get("input"), node)
    if factor is None or not isinstance(value, fx.Node):
        return None
    if op == "div":
        if isinstance(factor[0], float) and factor[0] == 0:
            return None
        factor = 1.0 / factor[0], factor[1]
    return Affine(((value, factor[0]),), axis=factor[1])


def _constant(program: Program, value: Any, node: fx.Node) -> tuple[Tensor | float, int | None] | None:
    """A number, or a held tensor that has one value per channel of `node`, with the axis of the channels."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value), None
    tensor = _held(program, value) if isinstance(value, fx.Node) else None
    spec = program.analysis(shapes)[node.name]
    if tensor is None or not isinstance(spec, TensorSpec) or tensor.ndim > len(spec.shape):
        return None
    wide = tensor.double()
    if wide.numel() == 1:
        return float(wide), None
    axes = [axis for axis, size in enumerate(wide.shape) if size > 1]
    if len(axes) != 1:
        return None
    return wide.flatten(), axes[0] + len(spec.shape) - wide.ndim


def _held(program: Program, node: fx.Node) -> Tensor | None:
    """A parameter or buffer that the program only reads, perhaps in another shape."""
    if node.op == "get_attr":
        tensor = program.tensor_of(node)
        written = any(program.call(user).inplace for user in node.users)
        return None if tensor is None or written or not tensor.is_floating_point() else tensor.detach()
    call = program.call(node)
    if call.op not in ("view", "reshape", "unsqueeze") or call.inplace:
        return None
    source = call.arguments.get("input")
    tensor = _held(program, source) if isinstance(source, fx.Node) else None
    shape = call.arguments.get("dim" if call.op == "unsqueeze" else "shape")
    sizes = shape if isinstance(shape, tuple | list) else (shape,)
    if tensor is None or not all(isinstance(size, int) for size in sizes):
        return None
    return tensor.unsqueeze(sizes[0]) if call.op == "unsqueeze" else tensor.reshape(tuple(sizes))


def _keeps_shape(program: Program, node: fx.Node, found: Affine) -> bool:
    known = program.analysis(shapes)
    spec = known[node.name]
    if not isinstance(spec, TensorSpec) or not spec.dtype.is_floating_point:
        return False
    if any(known[operand.name] != spec for operand, _ in found.operands):
        return False
    return found.axis is None or found.axis < len(spec.shape)
