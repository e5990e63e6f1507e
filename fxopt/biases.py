"""Where a constant that is added to what a layer gives is kept: in its bias, or in the BatchNorm behind it.

A layer without a bias gets none as long as nothing but a BatchNorm reads it: its running mean takes the constant up. So
parameters keep their names, and their number grows only where it must.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, fx
from torch.nn.modules.batchnorm import _BatchNorm

from fxopt import edit

if TYPE_CHECKING:
    from fxopt.program import Program

__all__ = ["absorbing_norm", "add_offset"]


def absorbing_norm(program: Program, node: fx.Node) -> fx.Node | None:
    """The call of the BatchNorm whose running mean takes up what is added to a layer's output; None if its bias does.

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
