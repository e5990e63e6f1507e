"""Products of two activations with integers: matrix products, and those of attention, which are written out for that.

    softmax(Q K^T / sqrt(d) + mask) V  =  matmul(softmax(matmul(Q / sqrt(d), K^T) + mask), V)

Both products read integers and give floating numbers, between which the softmax computes in floating point. What it
gives lies between 0 and 1, whatever the data. Measured on ONNX Runtime (AVX2, one thread, 12 heads of 197 tokens): 2.4
and 1.5 times the speed of float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import fx

from fxopt import edit
from fxopt.analysis.constants import constants
from fxopt.analysis.shapes import TensorSpec, shapes
from fxopt.passes_base import Skip
from fxopt.quantization import Affine, dequantize, quantize

if TYPE_CHECKING:
    from fxopt.program import Program

__all__ = ["ATTENTION", "Products", "find_products", "operands", "quantize_attention"]

ATTENTION = "scaled_dot_product_attention"
_MATRIX = frozenset({"matmul", "bmm"})


class Products(NamedTuple):
    """Products of activations.

    Attributes:
        nodes: names of the nodes that are to compute with integers.
        left: what stays as it is.
    """

    nodes: list[str]
    left: list[Skip]


def find_products(program: Program, ignore: Sequence[str]) -> Products:
    """The products to quantize.

    Args:
        program: the program.
        ignore: patterns of the names of nodes.
    """
    nodes: list[str] = []
    left: list[Skip] = []
    for node in program.nodes:
        if program.op(node) in _MATRIX or program.op(node) == ATTENTION:
            reason = _reason_to_leave(program, node, ignore)
            if reason is None:
                nodes.append(node.name)
            else:
                left.append(Skip(node.name, reason))
    return Products(nodes, left)


def operands(program: Program, node: fx.Node) -> dict[str, fx.Node]:
    """What a product multiplies, by the names of its arguments."""
    names = ("query", "key", "value") if program.op(node) == ATTENTION else ("input", "other")
    arguments = program.call(node).arguments
    return {name: cast("fx.Node", arguments[name]) for name in names}


def quantize_attention(program: Program, node: fx.Node, affines: Mapping[str, Affine]) -> None:
    """Writes attention out, with integers in both products; the node gives what it gave.

    Args:
        program: is edited.
        node: calls scaled dot product attention.
        affines: of query, key and value.
    """
    arguments = program.call(node).arguments
    query, key, value = operands(program, node).values()
    scale = arguments.get("scale") or 1 / math.sqrt(_spec(program, query).shape[-1])
    lengths = _spec(program, query).shape[-2], _spec(program, key).shape[-2]
    device = program.example_inputs[0].device

    def insert(function: Any, *args: Any) -> fx.Node:
        return edit.insert_before(program, node, function, args)

    def rounded(source: fx.Node, affine: Affine) -> fx.Node:
        return insert(dequantize, insert(quantize, source, *affine.arguments), *affine.arguments)

    # the query is scaled ahead, being the smallest
    smaller = affines["query"]._replace(scale=affines["query"].scale * scale)
    left = rounded(insert(torch.mul, query, scale), smaller)
    right = rounded(insert(torch.transpose, key, -2, -1), affines["key"])
    scores = insert(torch.matmul, left, right)
    mask = arguments.get("attn_mask")
    if arguments.get("is_causal"):
        later = torch.ones(lengths, dtype=torch.bool, device=device).triu(1)
        held = edit.insert_tensor(program, node, later, name=f"{node.name}_later")
        scores = insert(torch.masked_fill, scores, held, -torch.inf)
    elif isinstance(mask, fx.Node) and _spec(program, mask).dtype is torch.bool:
        scores = insert(torch.masked_fill, scores, insert(torch.logical_not, mask), -torch.inf)
    elif mask is not None:
        scores = insert(torch.add, scores, mask)
    shares = insert(torch.softmax, scores, -1)
    whole = Affine.over(affines["value"].type, 0.0, 1.0)
    edit.set_call(program, node, torch.matmul, (rounded(shares, whole), rounded(value, affines["value"])))


def _reason_to_leave(program: Program, node: fx.Node, ignore: Sequence[str]) -> str | None:
    if any(fnmatch(node.name, pattern) for pattern in ignore):
        return "ignored"
    arguments = program.call(node).arguments
    fixed = program.analysis(constants)
    names = ("query", "key", "value") if program.op(node) == ATTENTION else ("input", "other")
    for name in names:
        operand = arguments.get(name)
        spec = program.analysis(shapes).get(operand.name) if isinstance(operand, fx.Node) else None
        if not isinstance(spec, TensorSpec) or spec.dtype is not torch.float32:
            return "it does not multiply numbers in float32"
        if cast("fx.Node", operand).name in fixed:
            return f"its {name} is a constant"
        if len(spec.shape) < 2:
            return f"its {name} is a vector"
    if program.op(node) != ATTENTION:
        return None
    if node.op == "call_module":
        return "it is a module"
    if arguments.get("dropout_p"):
        return "it has a dropout"
    return "its heads share keys" if arguments.get("enable_gqa") else None


def _spec(program: Program, node: fx.Node) -> TensorSpec:
    return cast("TensorSpec", program.analysis(shapes)[node.name])
