"""Which layers have zeros where hardware makes use of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fxopt.kernels import connections

if TYPE_CHECKING:
    from fxopt.program import Program

__all__ = ["two_of_four"]

_LAYERS = frozenset({"conv1d", "conv2d", "conv3d", "linear"})


def two_of_four(program: Program) -> list[str]:
    """Paths of the layers of which the sparse tensor cores of NVIDIA need half of the products only.

    Of every four consecutive input channels of an output, at each place of the kernel, at most two weights are not zero
    (arXiv:2104.08378). That is read from the weights, so it holds whatever made the zeros and whatever came after.
    """
    found: dict[str, None] = {}
    for node in program.nodes:
        module: Any = program.module_of(node)
        if program.op(node) not in _LAYERS or module is None:
            continue
        weight = connections(module, module.weight.detach())
        groups, outputs, inputs, places = weight.shape
        if inputs % 4 == 0:
            fours = weight.reshape(groups, outputs, inputs // 4, 4, places)
            if bool(((fours != 0).sum(3) <= 2).all()):
                found[str(node.target)] = None
    return list(found)
