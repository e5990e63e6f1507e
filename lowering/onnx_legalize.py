"""What the ONNX exporter does not take, said in other words: the same values, on a copy of the program.

Attention over more or fewer than four axes: torch's exporter takes [batch, heads, tokens, channels] only. Leading axes
are merged for the call and split again behind it; a missing one is added and taken away. A mask that has the leading
axes of the query goes the same way; one of [tokens, tokens] is broadcast over whatever leads; any other is left to the
exporter.

Averages: a divisor of its own, which the exporter leaves out, is a factor behind (with ceil_mode it is refused).
Windows that reach beyond the input (ceil_mode), where nothing is padded, leave out what is beyond: it is all the same
whether padding counts, but ONNX Runtime's integer kernel (1.32) divides otherwise where it does.

Bounds of a clamp, one a whole number and one not. Inputs that are handed out: where the exporter does not optimize it
gives the input the output's name.

Recurrent layers: see `onnx_recurrent`. In 16 bits ONNX Runtime crashes while it loads one with a matrix product behind
it (1.32, float16, on the CPU), where it has no kernel for them anyway. They compute in float32, between casts.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from fxopt import edit
from fxopt.analysis.shapes import shape_of, shapes
from fxopt.errors import BackendError
from fxopt.lowering.onnx_recurrent import InSingle, spell_recurrences
from fxopt.ops import Call

if TYPE_CHECKING:
    from fxopt.program import Program

__all__ = ["legalize"]

_AXES = 4
_AVERAGES = {"avg_pool1d": 1, "avg_pool2d": 2, "avg_pool3d": 3}
_OTHER_RANKS = {3, 5, 6, 7, 8}


def legalize(program: Program) -> Program:
    """The program itself if the exporter takes it, else a rewritten copy."""
    spellings = {node.name: spell for node in program.nodes if (spell := _spelling(program, node)) is not None}
    handed_out = [node.name for node in program.nodes[-1].all_input_nodes if node.op == "placeholder"]
    if not spellings and not handed_out:
        return spell_recurrences(program)
    legal = program.copy()
    for name, spell in spellings.items():
        spell(legal, legal.node(name))
    for name in handed_out:
        output, given = legal.nodes[-1], legal.node(name)
        edit.set_operand(legal, [output], given, edit.insert_before(legal, output, torch.clone, (given,)))
    return spell_recurrences(legal)


def _is_small_recurrence(program: Program, node: fx.Node) -> bool:
    module = program.module_of(node)
    return isinstance(module, nn.RNNBase) and module.weight_ih_l0.dtype in (torch.float16, torch.bfloat16)


def _spelling(program: Program, node: fx.Node) -> Callable[[Program, fx.Node], None] | None:
    """How a node is said otherwise; None if it need not be."""
    if _is_odd_attention(program, node):
        return _with_four_axes
    if _is_small_recurrence(program, node):
        return _in_single
    call = program.call(node)
    if call.op == "clamp":
        low, high = (call.arguments.get(name) for name in ("min", "max"))
        mixed = {type(low), type(high)} == {int, float}
        return _clamp if mixed and program.analysis(shapes)[node.name].dtype.is_floating_point else None
    if call.op not in _AVERAGES:
        return None
    if call.option("divisor_override") is not None:
        return _average_by_divisor
    unpadded = not any(_along_axes(call, "padding", 0))
    beyond = unpadded and call.option("ceil_mode", False) and call.option("count_include_pad", True)
    return _average_of_what_is_there if beyond else None


def _in_single(program: Program, node: fx.Node) -> None:
    module = program.module_of(node)
    if isinstance(module, nn.RNNBase):  # else another call of it came before
        single = copy.deepcopy(module).float()
        edit.set_module(program, node, InSingle(single, module.all_weights[0][0].dtype))


def _clamp(program: Program, node: fx.Node) -> None:
    arguments = program.call(node).arguments
    edit.replace(program, node, torch.clamp, (arguments["input"], float(arguments["min"]), float(arguments["max"])))


def _average_of_what_is_there(program: Program, node: fx.Node) -> None:
    call = program.call(node)
    options = call.option("kernel_size"), call.option("stride"), 0, True, False
    edit.replace(program, node, getattr(torch.nn.functional, call.op), (call.arguments["input"], *options))


def _average_by_divisor(program: Program, node: fx.Node) -> None:
    call = program.call(node)
    if call.option("ceil_mode"):
        raise BackendError(
            f"{node.name}: ONNX has no average pooling with divisor_override and ceil_mode: backend='eager' runs it"
        )
    options = (call.option(name) for name in ("kernel_size", "stride"))
    arguments = (call.arguments["input"], *options, call.option("padding", 0))
    average = edit.insert_before(program, node, getattr(torch.nn.functional, call.op), arguments)
    window = math.prod(_along_axes(call, "kernel_size"))
    edit.replace(program, node, torch.mul, (average, window / call.option("divisor_override")))


def _along_axes(call: Call, name: str, default: Any = None) -> Sequence[Any]:
    """An option of a pooling, for each axis."""
    given = call.option(name, default)
    return given if isinstance(given, tuple | list) else [given] * _AVERAGES[call.op]


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
