"""Runs layers in float16 or bfloat16, and the rest in float32: mixed precision, by casts that stand in the graph.

By operator, as in the lists of `torch.autocast`:

    low          convolutions, linear and bilinear layers, matrix products, attention, embeddings, recurrent layers;
                 their weights are stored in the low data type
    float32      norms, softmax, exponentials, logarithms, powers, roots, sums, means and average pooling, comparisons,
                 whatever the operator table does not know, and what `ignore` names
    as it comes  element by element, and layout: low if all operands are low, float32 if one of them is not

A layer stays in float32, with the reason, where range demands it:

- a weight or bias is beyond the largest number of the data type (65504 for float16);
- more than a tenth of its weights that are not zero would become zero. Below that it is the few channels that weight
  decay has silenced; above it the scale of the layer itself is below 2^-24, the smallest float16;
- an input or output was larger than that number, on the example inputs or the calibration data. A mask that is added in
  attention is no reason: its numbers that stand for minus infinity become the smallest of the data type.

An operator of the last kind also stays in float32 where a constant of it overflows or vanishes (the 1e-8 in x + 1e-8),
or its result was too large. Tied weights stay tied: layers that share one run low together or not at all. Casts that
the model makes are kept. How casts are placed is in `fxopt.precision`.

Behind passes that fold or fit weights: what lies between two layers may be cast by then. Papers: arXiv:1710.03740
(mixed precision), arXiv:1905.12322 (bfloat16).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx

from fxopt import edit
from fxopt.analysis.constants import held_tensors
from fxopt.analysis.measurements import keep, measured
from fxopt.analysis.shapes import TensorSpec, shapes, specs_in
from fxopt.analysis.value_ranges import value_ranges
from fxopt.ops import DROPOUTS, DYNAMIC, operators
from fxopt.options import check_choice, check_patterns
from fxopt.passes_base import Pass, Rewrite, Skip
from fxopt.precision import Lowering, survives
from fxopt.program import Program

__all__ = ["CastPrecision"]

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}

_LOW = frozenset(f"conv{kind}{axes}d" for kind in ("", "_transpose") for axes in (1, 2, 3)) | frozenset(
    "linear bilinear embedding lstm gru rnn matmul mm bmm addmm einsum scaled_dot_product_attention".split()
)

_ELEMENTWISE = frozenset(item.name for item in operators().values() if item.elementwise)

_FLOAT32 = frozenset(
    "exp log log1p pow square sqrt rsqrt reciprocal softplus logsigmoid erf to float double expand_as "
    "eq ne lt le gt ge".split()
)

_LAYOUT = frozenset(
    "view reshape view_as flatten unflatten permute transpose t squeeze unsqueeze expand repeat_interleave movedim "
    "unfold im2col repeat cat stack split chunk unbind select slice narrow getitem roll flip pad constant_pad "
    "pixel_shuffle pixel_unshuffle channel_shuffle glu amax amin max_pool1d max_pool2d max_pool3d "
    "adaptive_max_pool2d".split()
)

_FOLLOWS = (_ELEMENTWISE - _FLOAT32) | _LAYOUT | DROPOUTS

_BITS = 8  # that bfloat16 has: the largest number of a value must have as many
_VANISHING = 0.1  # share of a weight's numbers that may become zero


@dataclass(frozen=True, kw_only=True)
class CastPrecision(Pass):
    """Runs layers in 16 bits.

    Attributes:
        dtype: "float16", or "bfloat16", which has the range of float32 and fewer digits.
        keep_io: whether inputs and outputs stay as they are; False takes and gives numbers in `dtype`.
        ignore: patterns of layer paths, "head.*", or of node names where no layer is called, that stay in float32.
    """

    name: ClassVar[str] = "cast_precision"
    provides: ClassVar[frozenset[str]] = frozenset({"mixed_precision"})

    dtype: Literal["float16", "bfloat16"] = "float16"
    keep_io: bool = True
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, _DTYPES)
        if type(self.keep_io) is not bool:
            raise ValueError(f"keep_io must be True or False, not {self.keep_io!r}")
        check_patterns("ignore", self.ignore)

    def plan(self, program: Program) -> Iterator[Rewrite | Skip]:
        """One decision per layer or per layers that share weights, and one for inputs and outputs."""
        found = False
        for node in program.nodes:
            if program.op(node) in DYNAMIC:
                yield Skip(node.name, "it computes with integers")
        for group in _groups(program):
            reasons = {node: self._reason_to_keep(program, node) for node in group}
            keeps = next((node for node, reason in reasons.items() if reason is not None), None)
            if keeps is None:
                found = True
                others = f" and {len(group) - 1} that share its weights" if len(group) > 1 else ""
                yield Rewrite(group[0].name, f"run {_label(group[0])}{others} in {self.dtype}")
                continue
            for node, reason in reasons.items():
                yield Skip(node.name, reason or f"it shares weights with {keeps.name}, which stays as it is")
        if found and not self.keep_io:
            yield Rewrite(program.nodes[-1].name, f"take and give {self.dtype}")

    def apply(self, program: Program, rewrite: Rewrite) -> None:
        """Makes one group of layers low, or the inputs and outputs."""
        ranges = measured(program, value_ranges)
        node = program.node(rewrite.node)
        lowering = Lowering(program, self._torch, lambda item: self._follows(program, item))
        if node.op == "output":
            edit.set_io_dtype(program, self._torch)
            lowering.lower_inputs()
            lowering.lower_outputs()
        else:
            group = next(group for group in _groups(program) if node in group)
            masks = {item: mask for item in group if (mask := self._mask_beyond(program, item)) is not None}
            lowering.lower(group, masks=masks)
        # the values are those of the original program, which low ones are to be near
        keep(program, value_ranges, ranges)

    @property
    def _torch(self) -> torch.dtype:
        return _DTYPES[self.dtype]

    @property
    def _limit(self) -> float:
        return float(torch.finfo(self._torch).max)

    @property
    def _least(self) -> float:
        """Of the numbers that have so many bits; smaller ones lose one with each halving."""
        return float(torch.finfo(self._torch).tiny * torch.finfo(self._torch).eps * 2.0 ** (_BITS - 1))

    def _ignored(self, node: fx.Node) -> bool:
        return any(fnmatch(_label(node), pattern) for pattern in self.ignore)

    def _reason_to_keep(self, program: Program, node: fx.Node) -> str | None:
        """Why a layer is left as it is; None if it can run low."""
        if self._ignored(node):
            return "ignored"
        integers = ("dequantize", "quantized_tensor", "fake_quantize", "fake_quantized_weight")
        if any(program.op(item) in integers for item in node.all_input_nodes):
            return "it computes with integers"
        if any(program.op(item) == "packed_weight" for item in node.all_input_nodes):
            return "its weight is held as integers"
        tensors = held_tensors(program, node)
        known = program.analysis(shapes)
        operands = [spec for item in node.all_input_nodes for spec in specs_in(known[item.name])]
        dtypes = [spec.dtype for spec in (*operands, *specs_in(known[node.name]))] + [item.dtype for item in tensors]
        numbers = [dtype for dtype in dtypes if dtype.is_floating_point or dtype.is_complex]
        other = next((dtype for dtype in numbers or dtypes if dtype is not torch.float32), None)
        if other is not None:
            name = str(other).removeprefix("torch.")
            return (
                f"it computes in {name} already" if other in _DTYPES.values() else f"it computes in {name}, not float32"
            )
        outside = _reader_outside(program, node)
        if outside is not None:
            return f"its weight is also read by {outside.name}"
        read = [tensor for item in node.all_input_nodes if (tensor := program.tensor_of(item)) is not None]
        masks = [program.tensor_of(item) for item in _masks(program, node)]
        for tensor in (*tensors, *read):
            reason = None if any(tensor is mask for mask in masks) else self._reason_of_weight(tensor)
            if reason is not None:
                return reason
        ranges = measured(program, value_ranges)
        for item in (*node.all_input_nodes, node):
            reached, what = ranges.get(item.name, 0.0), "output" if item is node else "input"
            if reached > self._limit and item not in _masks(program, node):
                return f"its {what} reaches {reached:.3g}, and the largest {self.dtype} is {self._limit:.6g}"
            if 0 < reached < self._least:
                return f"its {what} never exceeds {reached:.3g}, where {self.dtype} has fewer than {_BITS} bits"
        return None

    def _reason_of_weight(self, tensor: Tensor) -> str | None:
        if not tensor.is_floating_point() or not tensor.numel():
            return None
        largest = float(tensor.detach().abs().max())
        if not tensor.detach().to(self._torch).isfinite().all():
            return f"a weight of it is {largest:.3g}, and the largest {self.dtype} is {self._limit:.6g}"
        used = tensor.detach() != 0
        count, gone = int(used.sum()), int((used & (tensor.detach().to(self._torch) == 0)).sum())
        if gone > _VANISHING * count:
            return f"{gone / count:.0%} of its weights would vanish in {self.dtype}"
        return None

    def _mask_beyond(self, program: Program, node: fx.Node) -> fx.Node | None:
        """The mask that attention adds, where it holds larger numbers than the data type."""
        ranges = measured(program, value_ranges)
        return next((mask for mask in _masks(program, node) if ranges.get(mask.name, 0.0) > self._limit), None)

    def _follows(self, program: Program, node: fx.Node) -> bool:
        """Whether an operator may run low once all of its operands are."""
        call = program.call(node)
        if call.op not in _FOLLOWS or call.inplace or self._ignored(node):
            return False
        if call.module is not None and any(item.is_floating_point() for item in held_tensors(program, node)):
            return False
        if call.op in ("pad", "constant_pad"):
            filled: Any = call.arguments.get("value") if call.module is None else getattr(call.module, "value", 0)
            numbers = [filled]
        else:
            options = {} if call.module is None else vars(call.module)
            numbers = [*call.arguments.values(), *options.values()] if call.op in _ELEMENTWISE else []
        return all(survives(item, self._torch) for item in numbers if type(item) in (int, float))


def _masks(program: Program, node: fx.Node) -> list[fx.Node]:
    """What attention adds to its scores."""
    mask = program.call(node).arguments.get("attn_mask")
    return [mask] if isinstance(mask, fx.Node) else []


def _label(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_module" else node.name


def _groups(program: Program) -> list[list[fx.Node]]:
    """The layers, in execution order; those that share a tensor or a module are together."""
    groups: list[tuple[set[int], list[fx.Node]]] = []
    for node in program.nodes:
        if program.op(node) not in _LOW or not isinstance(program.analysis(shapes).get(node.name), TensorSpec | tuple):
            continue
        held = set(map(id, _tensors(program, node)))
        joined = [group for group in groups if group[0] & held]
        merged = held.union(*(group[0] for group in joined)), [*(item for group in joined for item in group[1]), node]
        groups = [group for group in groups if group not in joined] + [merged]
    order = {node: index for index, node in enumerate(program.nodes)}
    return sorted((sorted(nodes, key=order.__getitem__) for _, nodes in groups), key=lambda group: order[group[0]])


def _tensors(program: Program, node: fx.Node) -> list[Any]:
    """The tensors of the program's own that a layer computes with."""
    read = [item for item in node.all_input_nodes if item.op == "get_attr" and item not in _masks(program, node)]
    return [*held_tensors(program, node), *(program.tensor_of(item) for item in read)]


def _reader_outside(program: Program, node: fx.Node) -> fx.Node | None:
    """What reads a tensor of the module called at `node` and is no layer, or reads it under another path."""
    module = program.module_of(node)
    if module is None:
        return None
    own = set(map(id, held_tensors(program, node)))
    paths = tuple(f"{caller.target}." for caller in program.callers(node))
    for other in program.nodes:
        if program.op(other) in _LOW or not own & set(map(id, held_tensors(program, other))):
            continue
        if other.op != "get_attr" or not str(other.target).startswith(paths):
            return other
        outside = next((user for user in other.users if program.op(user) not in _LOW), None)
        if outside is not None:
            return outside
    return None
