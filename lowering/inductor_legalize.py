"""What Inductor does not take, said in other words: the same values, on a copy of the program.

Weights that are held as codes become plain ones. Inductor would not fold what unpacks a codebook into a constant, and
the vector code that it writes for that fails (torch 2.14: a division by zero in the lanes that are left over).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fxopt import edit
from fxopt.codebook import CodebookWeight
from fxopt.packed_weight import PackedWeight
from fxopt.sharing import share_module

if TYPE_CHECKING:
    from fxopt.program import Program

__all__ = ["legalize"]

_CODES = (CodebookWeight, PackedWeight)


def legalize(program: Program) -> Program:
    """The program itself if Inductor takes it, else a rewritten copy."""
    names = [node.name for node in program.nodes if isinstance(program.module_of(node), _CODES)]
    if not names:
        return program
    legal = program.copy()
    for name in names:
        module = legal.module_of(legal.node(name))
        if isinstance(module, _CODES):
            edit.set_module(legal, legal.node(name), _plain(module))
    return legal


class _Plain(nn.Module):
    """Gives a weight that it holds as it is."""

    weight: Tensor

    def forward(self) -> Tensor:
        return self.weight


def _plain(held: nn.Module) -> nn.Module:
    with torch.no_grad():
        weight = held()
    # a copy, as biases may be kept inside of the module
    plain = share_module(held)
    plain.__class__ = _Plain
    plain.register_buffer("weight", weight)
    return plain
