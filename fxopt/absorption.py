"""What a BatchNorm behind a layer takes up, so that the layer need not: offsets and scales of the layer's outputs.

A layer without a bias gets none as long as nothing but a BatchNorm reads it: its running mean takes an offset up. So
parameters keep their names, and their number grows only where it must. And weights can be given any size without a
change of the outputs: what a step of training comes to depends on it, by 1 / size² (van Laarhoven, arXiv:1706.05350).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, fx
from torch.nn.modules.batchnorm import _BatchNorm

from fxopt import edit

if TYPE_CHECKING:
    from fxopt.program import Program

__all__ = ["absorbing_norm", "add_offset", "rescale"]


def absorbing_norm(program: Program, node: fx.Node) -> fx.Node | None:
    """The call of the BatchNorm behind a layer that has no bias; None if there is a bias, or another reader.

    Args:
        program: the program.
        node: calls the layer.
    """
    layer: Any = program.module_of(node)
    if layer.bias is not None or len(node.users) != 1:
        return None
    (user,) = node.users
    norm = program.module_of(user)
    able = isinstance(norm, _BatchNorm) and norm.running_mean is not None
    return user if able and len(program.callers(user)) == 1 else None


def add_offset(program: Program, node: fx.Node, offset: Tensor) -> None:
    """Adds constants to what a layer gives.

    Args:
        program: is edited.
        node: calls the layer: a module with `weight` and `bias`.
        offset: one per output channel.
    """
    layer: Any = program.module_of(node)
    norm = absorbing_norm(program, node)
    if norm is not None:
        module: Any = program.module_of(norm)
        mean = module.running_mean.double() - offset.to(module.running_mean.device)
        edit.set_tensor(program, norm, "running_mean", mean.to(module.running_mean.dtype))
        return
    bias = offset if layer.bias is None else layer.bias.detach().double() + offset
    edit.set_tensor(program, node, "bias", bias.to(layer.weight.dtype))


def rescale(program: Program, node: fx.Node, norm: fx.Node, factors: Tensor) -> None:
    """Multiplies what a layer gives, and has the BatchNorm behind it give what it gave.

    Args:
        program: is edited.
        node: calls the layer, which has no bias.
        norm: calls its `absorbing_norm`, which has a weight.
        factors: one per output channel, positive.
    """
    layer: Any = program.module_of(node)
    module: Any = program.module_of(norm)
    factors = factors.double()
    weight = layer.weight.detach()
    scaled = weight * factors.reshape(-1, *[1] * (weight.ndim - 1))
    edit.set_tensor(program, node, "weight", scaled.to(weight.dtype))
    before = module.running_var.double()
    after = before * factors.square()
    gain = ((after + module.eps) / (before + module.eps)).sqrt() / factors
    for name, value in (
        ("running_mean", module.running_mean.double() * factors),
        ("running_var", after),
        ("weight", module.weight.detach().double() * gain),
    ):
        edit.set_tensor(program, norm, name, value.to(getattr(module, name).dtype))
