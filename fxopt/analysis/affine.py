"""Nodes that are affine per channel, y = s1 x1 + s2 x2 + t with constants s and t: sums, scales, fixed BatchNorm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, cast

from torch import Tensor, fx, nn

from fxopt.analysis.constants import constants, evaluate
from fxopt.analysis.identities import is_identity
from fxopt.analysis.shapes import TensorSpec, shapes

if TYPE_CHECKING:
    from fxopt.program import Program

__all__ = ["Affine", "affine_of", "formula_of"]


class Affine(NamedTuple):
    """y = sum of factor * operand, + shift.

    Attributes:
        operands: nodes, each with its factor: a number, or a float64 tensor with one value per channel.
        shift: a number, or a float64 tensor with one value per channel.
        axis: where the channels are, counted from the end if negative; None if all constants are numbers.
    """

    operands: tuple[tuple[fx.Node, Tensor | float], ...]
    shift: Tensor | float = 0.0
    axis: int | None = None

    @property
    def is_sum(self) -> bool:
        """Whether it adds or subtracts several operands."""
        return len(self.operands) > 1


def affine_of(program: Program, node: fx.Node) -> Affine | str | None:
    """What `node` computes, if that is affine per channel, without broadcasting, in floating point.

    Returns:
        The formula, with an axis that is not negative; a reason if only the node's mode forbids it; None otherwise.
    """
    found = formula_of(program, node)
    if not isinstance(found, Affine):
        return found
    known = program.analysis(shapes)
    spec = known[node.name]
    if not isinstance(spec, TensorSpec) or not spec.dtype.is_floating_point:
        return None
    if any(known[operand.name] != spec for operand, _ in found.operands):
        return None
    return found if found.axis is None else found._replace(axis=found.axis % len(spec.shape))


def formula_of(program: Program, node: fx.Node) -> Affine | str | None:
    """The same, taking for granted that the operands have the shape of the result: for nodes that `affine_of` knew."""
    call = program.call(node)
    if call.inplace:
        return None
    if is_identity(program, node):
        return Affine(((cast(fx.Node, node.args[0]), 1.0),))
    if call.op == "batch_norm":
        return _batch_norm(node, call.module)
    if call.op in ("add", "sub"):
        return _sum(program, call.arguments, -1.0 if call.op == "sub" else 1.0)
    if call.op in ("mul", "div"):
        return _scaled(program, call.op, call.arguments)
    if call.op == "neg":
        return Affine(((cast(fx.Node, call.arguments["input"]), -1.0),))
    return None


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


def _sum(program: Program, arguments: Any, sign: float) -> Affine | None:
    alpha = arguments.get("alpha", 1)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or alpha == 0:
        return None
    terms = [(arguments.get("input"), 1.0), (arguments.get("other"), sign * alpha)]
    constants = [_constant(program, value) for value, _ in terms]
    operands = [(value, factor) for (value, factor), held in zip(terms, constants, strict=True) if held is None]
    if not operands or not all(isinstance(value, fx.Node) for value, _ in operands):
        return None
    shift: Tensor | float = 0.0
    axis = None
    for (_, factor), held in zip(terms, constants, strict=True):
        if held is not None:
            shift, axis = factor * held[0], held[1]
    return Affine(tuple(operands), shift, axis)


def _scaled(program: Program, op: str, arguments: Any) -> Affine | None:
    if arguments.get("rounding_mode") is not None:
        return None
    value, factor = arguments.get("input"), _constant(program, arguments.get("other"))
    if factor is None and op == "mul":
        value, factor = arguments.get("other"), _constant(program, arguments.get("input"))
    if factor is None or not isinstance(value, fx.Node):
        return None
    if op == "div":
        if isinstance(factor[0], float) and factor[0] == 0:
            return None
        factor = 1.0 / factor[0], factor[1]
    return Affine(((value, factor[0]),), axis=factor[1])


def _constant(program: Program, value: Any) -> tuple[Tensor | float, int | None] | None:
    """A number; or a tensor that varies along one axis, flat, with that axis counted from the end; or None."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value), None
    tensor = _constant_tensor(program, value) if isinstance(value, fx.Node) else None
    if tensor is None or tensor.is_complex():
        return None
    if tensor.numel() == 1:
        return float(tensor), None
    axes = [axis for axis, size in enumerate(tensor.shape) if size > 1]
    return (tensor.double().flatten(), axes[0] - tensor.ndim) if len(axes) == 1 else None


def _constant_tensor(program: Program, node: fx.Node) -> Tensor | None:
    if node.name not in program.analysis(constants):
        return None
    if node.op == "get_attr":
        tensor = program.tensor_of(node)
        return None if tensor is None else tensor.detach()
    return evaluate(program, node) if isinstance(program.analysis(shapes)[node.name], TensorSpec) else None
