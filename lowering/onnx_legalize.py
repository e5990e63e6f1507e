"""What the ONNX exporter does not take, said in other words: the same values, on a copy of the program.

Attention over more or fewer than four axes: torch's exporter takes [batch, heads, tokens, channels] only. Leading axes
are merged for the call and split again behind it; a missing one is added and taken away.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxopt import edit
from fxopt.analysis.shapes import TensorSpec, shapes

if TYPE_CHECKING:
    from fxopt.program import Program

__all__ = ["legalize"]

_AXES = 4
_OTHER_RANKS = {3, 5, 6, 7, 8}


def legalize(program: Program) -> Program:
    """The program itself if the exporter takes it, else a rewritten copy."""
    odd = [node.name for node in program.nodes if _is_odd_attention(program, node)]
    if not odd:
        return program
    legal = program.copy()
    for name in odd:
        _with_four_axes(legal, legal.node(name))
    return legal


def _is_odd_attention(program: Program, node: fx.Node) -> bool:
    if program.op(node) != "scaled_dot_product_attention":
        return False
    arguments = program.call(node).arguments
    ranks = {_rank(program, arguments[name]) for name in ("query", "key", "value")}
    mask = arguments.get("attn_mask")
    if len(ranks) != 1 or not ranks <= _OTHER_RANKS:
        return False
    # a mask of as few axes as two is broadcast over whatever leads; others would have to be merged likewise
    return mask is None or (isinstance(mask, fx.Node) and _rank(program, mask) == 2)


def _with_four_axes(program: Program, node: fx.Node) -> None:
    known = program.analysis(shapes)
    arguments: dict[str, Any] = dict(program.call(node).arguments)
    leading = known[arguments["query"].name].shape[1:-3]
    surplus = len(known[arguments["query"].name].shape) - _AXES
    for name in ("query", "key", "value"):
        source = arguments[name]
        if surplus > 0:
            merged = edit.insert_before(program, node, torch.flatten, (source, 0, surplus))
        else:
            merged = edit.insert_before(program, node, torch.unsqueeze, (source, 1))
        arguments[name] = merged
    attention = edit.replace(program, node, torch.nn.functional.scaled_dot_product_attention, (), arguments)
    if surplus > 0:
        edit.insert_after(program, attention, torch.unflatten, (attention, 0, (-1, *leading)))
    else:
        edit.insert_after(program, attention, torch.squeeze, (attention, 1))


def _rank(program: Program, value: Any) -> int | None:
    spec = program.analysis(shapes).get(value.name) if isinstance(value, fx.Node) else None
    return len(spec.shape) if isinstance(spec, TensorSpec) else None
