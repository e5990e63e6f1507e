"""What Inductor does not take, said in other words: the same values, on a copy of the program.

Weights that are held as codes become plain ones. Inductor would not fold what unpacks a codebook into a constant, and
the vector code that it writes for that fails (torch 2.14: a division by zero in the lanes that are left over).

Integers of one channel, which a convolution multiplies, become two, with zeros for the weights of the second. Strides
of one channel do not tell how it is laid out, and where the batch is free Inductor's kernel takes it for what it is not
and answers nonsense.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxopt import edit
from fxopt.codebook import CodebookWeight
from fxopt.packed_weight import PackedWeight
from fxopt.quantization import QuantizedTensor, dequantize
from fxopt.sharing import share_module

if TYPE_CHECKING:
    from fxopt.program import Program

__all__ = ["legalize"]

_CODES = (CodebookWeight, PackedWeight)
_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")


def legalize(program: Program) -> Program:
    """The program itself if Inductor takes it, else a rewritten copy."""
    held = [node.name for node in program.nodes if isinstance(program.module_of(node), _CODES)]
    narrow = [node.name for node in program.nodes if _reads_one_channel(program, node)]
    if not held and not narrow:
        return program
    legal = program.copy()
    for name in held:
        edit.set_module(legal, legal.node(name), _plain(cast("nn.Module", legal.module_of(legal.node(name)))))
    for name in narrow:
        _widen(legal, legal.node(name))
    return legal


def _reads_one_channel(program: Program, node: fx.Node) -> bool:
    """Whether a node convolves integers of one channel with a weight of integers that no other node reads."""
    if program.op(node) not in _CONVOLUTIONS:
        return False
    arguments = program.call(node).arguments
    source, weight = arguments.get("input"), arguments.get("weight")
    if not (isinstance(source, fx.Node) and isinstance(weight, fx.Node) and program.op(source) == "dequantize"):
        return False
    held = program.module_of(weight)
    alone = len(weight.users) == len(program.callers(weight)) == 1
    return isinstance(held, QuantizedTensor) and held.codes.shape[1] == 1 == arguments.get("groups", 1) and alone


def _widen(program: Program, node: fx.Node) -> None:
    """Has a convolution read a second channel, with nothing in it."""
    source, weight = (cast("fx.Node", program.call(node).arguments[name]) for name in ("input", "weight"))
    held = cast("QuantizedTensor", program.module_of(weight)).codes
    edit.set_tensor(program, weight, "codes", torch.cat([held, torch.zeros_like(held)], 1))
    codes, *affine = source.args
    wide = edit.insert_before(program, node, F.pad, (codes, (*(0, 0) * (held.ndim - 2), 0, 1)))
    edit.set_operand(program, [node], source, edit.insert_before(program, node, dequantize, (wide, *affine)))


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
