"""Lets weights share few values: each layer keeps a codebook of k centroids, and 1 to 8 bits a weight to choose.

    w_i  ->  c[a_i],      c, a = argmin sum_i s_i (w_i - c[a_i])²

k-means in one dimension, optimal for small tensors (`fxopt.kmeans`). s is 1, or with `sensitivity="fisher"` the mean
squared gradient of the loss by w_i (`fxopt.analysis.weight_sensitivity`): what the loss minds is kept more exactly. The
weight is held as codes and codebook (`fxopt.codebook`), in memory, in saved files and in ONNX; its centroids train. It
saves bytes, not time: the layer computes with the weight that they stand for.

Convolutions, linear layers and embeddings are clustered; biases and norms are left alone. Layers that share a weight go
together and go on sharing it. No more values than clusters: nothing is lost. Weights that were pruned stay zero, in
training too: one of the clusters is zero if the layer has a mask, or more zeros than a cluster has weights on average.

It belongs behind all passes that read or change weights. Refused, with the reason: ignored layers, weights that are not
finite, that something else reads too, that gain nothing, and calls that have no functional form.

Papers: Deep Compression (arXiv:1510.00149); arXiv:1612.01543 (Hessian-weighted); arXiv:1701.07204 (optimal in 1-D).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from fxopt.analysis.measurements import keep, measured
from fxopt.analysis.weight_sensitivity import squared_gradients
from fxopt.codebook import CodebookWeight, packed_bytes
from fxopt.errors import InputError
from fxopt.held_weight import FUNCTIONS, call_with, readers_of, reason_to_leave, weight_of
from fxopt.kmeans import centroids, nearest
from fxopt.masking import mask_of
from fxopt.ops import DYNAMIC
from fxopt.options import check_choice, check_patterns
from fxopt.passes_base import Pass, Rewrite, Skip
from fxopt.program import Program

__all__ = ["ClusterWeights"]

_DEFAULT_CLUSTERS = 16
_OTHER_LAYERS = DYNAMIC.union("lstm gru rnn bilinear embedding_bag multi_head_attention".split())
_LEAST_SENSITIVITY = 1e-6  # of the mean: weights that the data do not reach are clustered too
_UNCOUNTED = 1e-12


@dataclass(frozen=True, kw_only=True)
class ClusterWeights(Pass):
    """Clusters the weights of layers, and holds them as a codebook and packed codes.

    Attributes:
        n_clusters: values that the weights of a layer may have, 2 to 256; None for 2^bits, or 16.
        bits: the same by the bits of a code, 1 to 8; give one of the two.
        per: "tensor" for one codebook a layer, "channel" for one for each index of axis 0 of the weight (the output
            channels; of transposed convolutions the input channels).
        sensitivity: "none" counts all weights alike, "fisher" by their mean squared gradient; it takes calibration
            batches that hold targets behind the inputs.
        ignore: patterns of layer paths, "head.*", that are left as they are.
    """

    name: ClassVar[str] = "cluster_weights"
    provides: ClassVar[frozenset[str]] = frozenset({"clustered"})

    n_clusters: int | None = None
    bits: int | None = None
    per: Literal["tensor", "channel"] = "tensor"
    sensitivity: Literal["none", "fisher"] = "none"
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        # a spec string may give values of any type
        for option, value, low, high in (("n_clusters", self.n_clusters, 2, 256), ("bits", self.bits, 1, 8)):
            if value is not None and (type(value) is not int or not low <= value <= high):
                raise ValueError(f"{option} must be a whole number from {low} to {high}, not {value!r}")
        if self.n_clusters is not None and self.bits is not None:
            raise ValueError("give n_clusters or bits, not both: bits=b means n_clusters=2**b")
        check_choice("per", self.per, ("tensor", "channel"))
        check_choice("sensitivity", self.sensitivity, ("none", "fisher"))
        check_patterns("ignore", self.ignore)

    def plan(self, program: Program) -> Iterator[Rewrite | Skip]:
        """One decision per weight, at the first layer that uses it.

        Raises:
            InputError: if sensitivities are asked for, and there are no calibration data with targets.
        """
        if self.sensitivity == "fisher":
            _require_data(program)
        seen: set[int] = set()
        for node in program.nodes:
            call = program.call(node)
            if call.op in FUNCTIONS and call.module is None:
                source = call.arguments.get("weight")
                clustered = isinstance(source, fx.Node) and program.op(source) == "codebook_weight"
                yield Skip(node.name, "clustered already" if clustered else f"its weight comes from {source}")
            elif call.op in _OTHER_LAYERS:
                yield Skip(node.name, f"the weights of {call.op} are not clustered")
            elif call.op in FUNCTIONS and id(weight_of(program, node)) not in seen:
                seen.add(id(weight_of(program, node)))
                yield self._decision(program, node)

    def apply(self, program: Program, rewrite: Rewrite) -> None:
        """Clusters one weight, and makes its layers functions of the node that gives it.

        Values and sensitivities are no part of the plan: it replays on another checkpoint.
        """
        layers = [program.node(name) for name in rewrite.params["layers"]]
        fisher = measured(program, squared_gradients) if self.sensitivity == "fisher" else None
        weight = weight_of(program, layers[0])
        mask = mask_of(program.module_of(layers[0]))
        values = weight if mask is None else nn.Parameter(weight.detach().masked_fill(~mask, 0), weight.requires_grad)
        importance = None if fisher is None else fisher[f"{layers[0].target}.weight"]
        held = self._held(values, importance, zero=self._has_zero(program, layers[0]))
        call_with(program, layers, held)
        if fisher is not None:
            # of the trained weights, by which the layers that follow are to be clustered too
            keep(program, squared_gradients, fisher)

    def _decision(self, program: Program, node: fx.Node) -> Rewrite | Skip:
        weight = weight_of(program, node)
        layers = readers_of(program, weight)
        paths = sorted({str(item.target) for item in layers})
        zero = self._has_zero(program, node)
        clustered = self._bytes(weight, zero=zero)
        reason = self._reason_to_keep(program, layers, weight, clustered)
        if reason is not None:
            return Skip(node.name, reason)
        if self.sensitivity == "fisher":
            fisher = measured(program, squared_gradients)[f"{node.target}.weight"]
            if not bool(fisher.any()):
                return Skip(node.name, "the loss does not depend on its weight on the calibration data")
        what = f"cluster {', '.join(paths)}: {weight.nbytes} to {clustered} bytes"
        if zero:
            what += ", pruned weights stay zero"
        return Rewrite(node.name, what, {"layers": [item.name for item in layers]})

    def _reason_to_keep(self, program: Program, layers: list[fx.Node], weight: Tensor, clustered: int) -> str | None:
        """Why a weight, read by these layers, is left alone; `clustered` is the bytes that it would take."""
        reason = reason_to_leave(program, layers, self.ignore)
        if reason is None and clustered >= weight.nbytes:
            return f"nothing to gain: {weight.nbytes} bytes as it is, {clustered} clustered"
        return reason

    def _has_zero(self, program: Program, node: fx.Node) -> bool:
        """Whether one of a layer's clusters is zero."""
        weight = weight_of(program, node)
        zeros = weight.numel() - int(weight.count_nonzero())
        return mask_of(program.module_of(node)) is not None or zeros * self._clusters() > weight.numel()

    def _clusters(self) -> int:
        return 2**self.bits if self.bits is not None else self.n_clusters or _DEFAULT_CLUSTERS

    def _code_bits(self) -> int:
        return (self._clusters() - 1).bit_length()

    def _rows(self, weight: Tensor) -> int:
        return len(weight) if self.per == "channel" else 1

    def _bytes(self, weight: Tensor, *, zero: bool) -> int:
        codebook = self._rows(weight) * (self._clusters() - zero) * weight.element_size()
        return packed_bytes(weight.numel(), self._code_bits()) + codebook

    def _held(self, weight: Tensor, fisher: Tensor | None, *, zero: bool) -> CodebookWeight:
        """The clustered weight."""
        values = _rows_of(weight, self._rows(weight))
        importance: NDArray[np.floating] | None = None
        if fisher is not None:
            importance = _rows_of(fisher, self._rows(weight)).astype(np.float64)
            importance = importance / importance.mean() + _LEAST_SENSITIVITY
        if zero:
            pruned = values == 0
            values, importance = _without(values, pruned, importance)
        found = torch.from_numpy(centroids(values, self._clusters() - zero, importance)).to(weight.dtype)
        codes = nearest(values, found.double().numpy())
        if zero:
            codes = np.where(pruned, 0, codes + 1)
        codebook = nn.Parameter(found.to(weight.device), requires_grad=weight.requires_grad)
        packed = torch.from_numpy(codes).to(weight.device)
        return CodebookWeight(packed, codebook, tuple(weight.shape), self._code_bits(), zero=zero)


def _rows_of(tensor: Tensor, rows: int) -> NDArray[np.floating]:
    wide = torch.promote_types(tensor.dtype, torch.float32)
    found: NDArray[np.floating] = tensor.detach().to("cpu", wide).reshape(rows, -1).numpy()
    return found


def _without(
    values: NDArray[np.floating], out: NDArray[np.bool_], weights: NDArray[np.floating] | None
) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """Values of which some do not count: they are like the first of their row that does."""
    first = np.take_along_axis(values, np.argmin(out, axis=1)[:, None], 1)
    counts = np.ones_like(values) if weights is None else weights
    return np.where(out, first, values), np.where(out, _UNCOUNTED, counts)


def _require_data(program: Program) -> None:
    if program.calibration is None:
        raise InputError(
            "cluster_weights(sensitivity='fisher') takes gradients of the loss: pass calibration=, an iterable of "
            "batches that hold targets behind the inputs, (x, target)"
        )
