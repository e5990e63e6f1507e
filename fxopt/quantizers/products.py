"""Products of two activations with integers: matrix products, and those of attention, which are written out for that.

    softmax(Q K^T / sqrt(d) + mask) V  =  matmul(softmax(matmul(Q / sqrt(d), K^T) + mask), V)

Both products read integers and give floating numbers, between which the softmax computes in floating point. The range
of what it gives is read from the data like any other: a share of 197 tokens is near 1/197, and integers that reach up
to 1 would leave it two steps (measured on ViT-B/16: 19 dB of the outputs, and 27 with the range of the data).
Where a processor adds up integers in 16 bits (AVX2 without VNNI) products stay in floating point: the products alone
are 1.3 times as fast in ONNX Runtime (ViT-Tiny, 24 products of 197 tokens: 3.2 ms, and 4.1 in float32), which
quantizing what they read takes up (1.0 ms); the outputs keep 1.2 dB more.
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
from fxopt.analysis.measurements import keep, measured
from fxopt.analysis.shapes import TensorSpec, shapes
from fxopt.analysis.value_spreads import Spread, value_spreads
from fxopt.passes_base import Skip
from fxopt.quantization import Affine, dequantize, quantize

if TYPE_CHECKING:
    from fxopt.program import Program

__all__ = ["ATTENTION", "Products", "find_products", "operands", "quantize_attention", "share_spreads"]

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


def share_spreads(program: Program, nodes: Sequence[fx.Node]) -> Mapping[str, Spread]:
    """What the shares of attention are over the calibration data, by the name of the node: at least those of these.

    Args:
        program: with calibration data.
        nodes: that call scaled dot product attention.

    Raises:
        InputError: as `value_spreads`.
    """
    known = measured(program, _shares)
    missing = [node.name for node in nodes if node.name not in known]
    if missing:
        written = program.copy()
        shares = {name: _write_out(written, written.node(name)).shares.name for name in missing}
        spreads = value_spreads(written, list(shares.values()))
        known = {**known, **{name: spreads[given] for name, given in shares.items()}}
        keep(program, _shares, cast("Mapping[str, Spread]", known))
    return known


def quantize_attention(program: Program, node: fx.Node, affines: Mapping[str, Affine]) -> None:
    """Writes attention out, with integers in both products; the node gives what it gave.

    Args:
        program: is edited.
        node: calls scaled dot product attention.
        affines: of query, key, value and shares.
    """
    written = _write_out(program, node)
    query = affines["query"]._replace(scale=affines["query"].scale * written.scale)
    for reader, source, affine in (
        (written.scores, written.query, query),
        (written.scores, written.key, affines["key"]),
        (node, written.shares, affines["shares"]),
        (node, written.value, affines["value"]),
    ):
        codes = edit.insert_before(program, reader, quantize, (source, *affine.arguments))
        value = edit.insert_before(program, reader, dequantize, (codes, *affine.arguments))
        edit.set_operand(program, [reader], source, value)


class _Written(NamedTuple):
    """Attention as its products: `scores` multiplies `query` and `key`, and the node itself `shares` and `value`.

    Attributes:
        query: scaled ahead by `scale`, being the smallest.
        key: transposed.
    """

    query: fx.Node
    key: fx.Node
    scores: fx.Node
    shares: fx.Node
    value: fx.Node
    scale: float


def _write_out(program: Program, node: fx.Node) -> _Written:
    arguments = program.call(node).arguments
    query, key, value = operands(program, node).values()
    scale = arguments.get("scale") or 1 / math.sqrt(_spec(program, query).shape[-1])

    def insert(function: Any, *args: Any) -> fx.Node:
        return edit.insert_before(program, node, function, args)

    left, right = insert(torch.mul, query, scale), insert(torch.transpose, key, -2, -1)
    product = scores = insert(torch.matmul, left, right)
    mask = arguments.get("attn_mask")
    if arguments.get("is_causal"):
        scores = insert(torch.masked_fill, scores, _later(program, node, scores), -torch.inf)
    elif isinstance(mask, fx.Node) and _spec(program, mask).dtype is torch.bool:
        scores = insert(torch.masked_fill, scores, insert(torch.logical_not, mask), -torch.inf)
    elif mask is not None:
        scores = insert(torch.add, scores, mask)
    shares = insert(torch.softmax, scores, -1)
    if mask is not None:
        # a query for which nothing is left has shares of zero, as torch gives it
        shares = insert(torch.nan_to_num, shares, 0.0)
    edit.set_call(program, node, torch.matmul, (shares, value))
    return _Written(left, right, product, shares, value, scale)


def _later(program: Program, node: fx.Node, scores: fx.Node) -> fx.Node:
    """Which keys come after which query: a constant, or computed where lengths are free."""
    if program.free_axes:
        everywhere = edit.insert_before(program, node, torch.ones_like, (scores,), {"dtype": torch.bool})
        return edit.insert_before(program, node, torch.triu, (everywhere, 1))
    query, key, _ = operands(program, node).values()
    lengths = _spec(program, query).shape[-2], _spec(program, key).shape[-2]
    later = torch.ones(lengths, dtype=torch.bool, device=program.example_inputs[0].device).triu(1)
    return edit.insert_tensor(program, node, later, name=f"{node.name}_later")


def _shares(_: Program) -> Mapping[str, Spread]:
    """What the shares of attention were found to be so far."""
    return {}


def _reason_to_leave(program: Program, node: fx.Node, ignore: Sequence[str]) -> str | None:
    if any(fnmatch(node.name, pattern) for pattern in ignore):
        return "ignored"
    if not program.scheme.products:
        return "it is no faster with integers on this target"
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
