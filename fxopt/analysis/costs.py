"""What a program costs: parameters, multiply-accumulates (MACs) and bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import fx, nn

from fxopt.analysis.shapes import TensorSpec, shapes
from fxopt.interpret import run_graph
from fxopt.ops import DYNAMIC, Call
from fxopt.report import Cost
from fxopt.sharing import share_module

if TYPE_CHECKING:
    from fxopt.program import Program

__all__ = ["macs_by_node", "total_cost"]

_CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d"})
_TRANSPOSED = frozenset({"conv_transpose1d", "conv_transpose2d", "conv_transpose3d"})
_PRODUCTS = frozenset({"matmul", "mm", "bmm", "addmm"})
_INTEGERS = DYNAMIC | {"packed_weight", "quantized_tensor"}
_INTRICATE = frozenset({"einsum", "bilinear", "lstm", "gru", "rnn", "multi_head_attention"})


def total_cost(program: Program) -> Cost:
    """Parameters (shared ones once), MACs at the example's sizes, and bytes of parameters and buffers.

    Parameters that are held as integers count, each of them; of codebooks the centroids do.
    """
    module = program.module
    tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return Cost(
        params=sum(parameter.numel() for parameter in module.parameters()) + _held_as_integers(program),
        macs=sum(program.analysis(macs_by_node).values()),
        bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()),
    )


def _held_as_integers(program: Program) -> int:
    """How many numbers of the model are held as integers."""
    found: dict[int, int] = {}
    for node in program.nodes:
        if program.op(node) in _INTEGERS:
            module = cast("Any", program.module_of(node))
            found.update({id(module.get_buffer(name)): count for name, count in module.held.items()})
    return sum(found.values())


def macs_by_node(program: Program) -> Mapping[str, int]:
    """MACs of each node that multiplies and accumulates (convolution, linear, matmul, attention), by node name.

    From the shapes, at the sizes of the example inputs. A program with operators whose products are hidden (einsum,
    unknown functions) is counted by torch's flop counter instead, two flops a MAC.
    """
    calls = [(node, program.call(node)) for node in program.graph.nodes]
    known = program.analysis(shapes)
    counted: Mapping[str, int] = {}
    if any(
        (call.op in _INTRICATE and not _is_ours_to_count(call)) or call.op.startswith("unknown:") for _, call in calls
    ):
        # torch does not know our own operators, and sees no products inside of recurrent layers
        counted, calls = _counted(program), [(node, call) for node, call in calls if _is_ours_to_count(call)]
    found = {node.name: _macs(node, call, known) for node, call in calls}
    return {**counted, **{name: macs for name, macs in found.items() if macs}}


def _is_ours_to_count(call: Call) -> bool:
    return call.op in DYNAMIC or isinstance(call.module, nn.RNNBase)


def _macs(node: fx.Node, call: Call, known: Mapping[str, Any]) -> int:
    if call.op in _CONVOLUTIONS or call.op == "linear":
        shape = _weight_shape(call, known)
        return _numel(known[node.name]) * math.prod(shape[1:])
    if call.op in _TRANSPOSED:
        return _numel(_spec(call.arguments["input"], known)) * math.prod(_weight_shape(call, known)[1:])
    if isinstance(call.module, nn.RNNBase):
        steps = math.prod(_spec(call.arguments["input"], known).shape[:-1])
        return steps * sum(weight.numel() for weight in call.module.parameters() if weight.dim() > 1)
    if call.op in DYNAMIC:
        rows = math.prod(_spec(call.arguments["input"], known).shape[:-1])
        return int(cast("Any", call.module).macs(rows))
    if call.op in _PRODUCTS:
        return _numel(known[node.name]) * _spec(call.arguments["input"], known).shape[-1]
    if call.op == "scaled_dot_product_attention":
        query, value = (_spec(call.arguments[name], known) for name in ("query", "value"))
        return math.prod(query.shape[:-1]) * value.shape[-2] * (query.shape[-1] + value.shape[-1])
    return 0


def _weight_shape(call: Call, known: Mapping[str, Any]) -> tuple[int, ...]:
    if call.module is not None:
        return tuple(cast("torch.Tensor", call.module.weight).shape)
    return _spec(call.arguments["weight"], known).shape


def _spec(value: Any, known: Mapping[str, Any]) -> TensorSpec:
    return cast("TensorSpec", known[value.name])


def _numel(spec: TensorSpec) -> int:
    return math.prod(spec.shape)


def _counted(program: Program) -> Mapping[str, int]:
    """By torch's flop counter, on fake tensors; on real ones if a shape depends on the data."""
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            return _count(program, [mode.from_tensor(tensor.detach()) for tensor in program.example_inputs])
    except (DataDependentOutputException, DynamicOutputShapeException):
        return _count(program, [tensor.detach().clone() for tensor in program.example_inputs])


def _count(program: Program, inputs: list[torch.Tensor]) -> dict[str, int]:
    from torch.utils.flop_counter import FlopCounterMode

    found: dict[str, int] = {}
    with FlopCounterMode(display=False) as mode:
        seen = 0

        def watch(node: fx.Node, _: Any) -> None:
            nonlocal seen
            flops, seen = mode.get_total_flops() - seen, mode.get_total_flops()
            if flops:
                found[node.name] = flops // 2

        run_graph(share_module(program.module), program.graph, inputs, watch)
    return found
