"""What the ONNX exporter does not take, said in other words: the same values, on a copy of the program.

Attention over more or fewer than four axes: torch's exporter takes [batch, heads, tokens, channels] only. Leading axes
are merged for the call and split again behind it; a missing one is added and taken away. A mask that has the leading
axes of the query goes the same way; one of [tokens, tokens] is broadcast over whatever leads; any other is left to the
exporter.

Recurrent layers: see `onnx_recurrent`. In 16 bits ONNX Runtime crashes while it loads one with a matrix product behind
it (1.32, float16, on the CPU), where it has no kernel for them anyway. They compute in float32, between casts.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from fxopt import edit
from fxopt.analysis.shapes import shape_of
from fxopt.lowering.onnx_recurrent import InSingle, spell_recurrences

if TYPE_CHECKING:
    from fxopt.program import Program

__all__ = ["legalize"]

_AXES = 4
_OTHER_RANKS = {3, 5, 6, 7, 8}


def legalize(program: Program) -> Program:
    """The program itself if the exporter takes it, else a rewritten copy."""
    odd = [node.name for node in program.nodes if _is_odd_attention(program, node)]
    small = [node.name for node in program.nodes if _is_small_recurrence(program, node)]
    if not odd and not small:
        return spell_recurrences(program)
    legal = program.copy()
    for name in odd:
        _with_four_axes(legal, legal.node(name))
    for name in small:
        module = legal.module_of(legal.node(name))
        if isinstance(module, nn.RNNBase):
            single = copy.deepcopy(module).float()
            edit.set_module(legal, legal.node(name), InSingle(single, module.all_weights[0][0].dtype))
    return spell_recurrences(legal)


def _is_small_recurrence(program: Program, node: fx.Node) -> bool:
    module = program.module_of(node)
    return isinstance(module, nn.RNNBase) and module.weight_ih_l0.dtype in (torch.float16, torch.bfloat16)


def _is_odd_attention(program: Program, node: fx.Node) -> bool:
    if program.op(node) != "scaled_dot_product_attention":
        return False
    arguments = program.call(node).arguments
    query, mask = arguments["query"], arguments.get("attn_mask")
    if len(shape_of(program, query)) not in _OTHER_RANKS:
        return False
    if not all(_leads_alike(program, arguments[name], query) for name in ("key", "value")):
        return False
    return mask is None or len(shape_of(program, mask)) == 2 or _leads_alike(program, mask, query)


def _leads_alike(program: Program, mask: Any, query: Any) -> bool:
    return shape_of(program, mask)[:-2] == shape_of(program, query)[:-2]


def _with_four_axes(program: Program, node: fx.Node) -> None:
    arguments: dict[str, Any] = dict(program.call(node).arguments)
    query, shape = arguments["query"], shape_of(program, arguments["query"])
    like_query = shape_of(program, arguments["value"])[-1] == shape[-1]
    surplus = len(shape) - _AXES
    names = ["query", "key", "value"]
    if arguments.get("attn_mask") is not None and _leads_alike(program, arguments["attn_mask"], arguments["query"]):
        names.append("attn_mask")
    for name in names:
        source = arguments[name]
        if surplus > 0:
            merged = edit.insert_before(program, node, torch.flatten, (source, 0, surplus))
        else:
            merged = edit.insert_before(program, node, torch.unsqueeze, (source, 1))
        arguments[name] = merged
    attention = edit.replace(program, node, torch.nn.functional.scaled_dot_product_attention, (), arguments)
    if surplus > 0 and program.free_axes and like_query:
        edit.insert_after(program, attention, torch.Tensor.reshape_as, (attention, query))
    elif surplus > 0:
        edit.insert_after(program, attention, torch.unflatten, (attention, 0, (-1, *shape[1:-3])))
    else:
        edit.insert_after(program, attention, torch.squeeze, (attention, 1))
