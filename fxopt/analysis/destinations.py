"""Where the output of a node goes, as far as that is affine per channel: what an error in it comes to behind.

A BatchNorm in evaluation mode behind a convolution may scale one channel up a thousand times as much as another. What
an error of the convolution is worth is told by what leaves the BatchNorm; folded into the convolution, it tells the
same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor, fx

from fxopt.analysis.affine import Affine, affine_of
from fxopt.analysis.shapes import TensorSpec, shapes

if TYPE_CHECKING:
    from fxopt.program import Program

__all__ = ["Destination", "destination"]


class Destination(NamedTuple):
    """What is computed from a node's output y and from nothing else of it: scale * y + sum of factor * other.

    Attributes:
        scale: in float64, of y's rank or a scalar.
        others: the names of the other operands of a sum, with their factors; none if y is not added to anything.
    """

    scale: Tensor
    others: tuple[tuple[str, float], ...] = ()


def destination(program: Program, node: fx.Node) -> Destination:
    """Follows the output of `node` while it has one user and that is affine, up to the first sum."""
    scale = torch.ones((), dtype=torch.float64)
    while len(node.users) == 1:
        (user,) = node.users
        found = affine_of(program, user)
        factors = [factor for operand, factor in found.operands if operand is node] if isinstance(found, Affine) else []
        if not isinstance(found, Affine) or len(factors) != 1:
            break
        rank = len(cast("TensorSpec", program.analysis(shapes)[user.name]).shape)
        scale = scale * _along(factors[0], found.axis, rank)
        if found.is_sum:
            # the factors of a sum are numbers
            others = [
                (operand.name, cast("float", factor)) for operand, factor in found.operands if operand is not node
            ]
            return Destination(scale, tuple(others))
        node = user
    return Destination(scale)


def _along(factor: Tensor | float, axis: int | None, rank: int) -> Tensor:
    if not isinstance(factor, Tensor):
        return torch.tensor(factor, dtype=torch.float64)
    sizes = [1] * rank
    sizes[cast("int", axis)] = -1
    return factor.double().reshape(sizes)
