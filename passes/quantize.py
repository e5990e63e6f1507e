"""Has convolutions, linear layers and what lies between them compute with 8-bit integers.

    x about scale (q - zero_point)          activations: 8 bits, a range for each value, from calibration data
    W about scale_o q                       weights: one scale for each output, rounded so that the least is lost

Where integers go is decided by `fxopt/analysis/integer_regions.py`; which ones by the scheme of the backend
(`fxopt/integer_scheme.py`); ranges come from histograms (`fxopt/analysis/value_spreads.py`), and weights are rounded by
`fxopt/rounding.py`, whereupon the bias takes up what is lost on average. In the graph each quantized value is a pair of
a quantize and a dequantize node, and each weight is held as integers: eager execution simulates what an engine computes
with integer kernels.

Fold BatchNorms before. Refused, with the reason: layers without an integer kernel, that are ignored, whose weight comes
from elsewhere, or that do not compute in float32; and a program in which no layer is left.

Papers: arXiv:1712.05877 (integer inference), arXiv:2004.09602 (a survey of what works).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast, get_args

import torch
from torch import Tensor, fx, nn

from fxopt import edit
from fxopt.analysis.integer_regions import integer_regions
from fxopt.analysis.layer_moments import layer_moments
from fxopt.analysis.measurements import keep, measured
from fxopt.analysis.originals import keep_original, original_of
from fxopt.analysis.patches import PatchLayer
from fxopt.analysis.shapes import TensorSpec, shapes
from fxopt.analysis.value_spreads import Observer, affine_of, value_spreads
from fxopt.errors import InputError, PassError
from fxopt.held_weight import FUNCTIONS, call_with, readers_of, reason_to_leave, weight_of
from fxopt.integer_scheme import INT32
from fxopt.masking import mask_of
from fxopt.options import check_choice, check_patterns
from fxopt.passes_base import Pass, Rewrite, Skip, listed
from fxopt.program import Program
from fxopt.quantization import Affine, QuantizedTensor, dequantize, quantize
from fxopt.rounding import Rounded, Rounding, rounded
from fxopt.substitution import LONGEST

__all__ = ["Quantize"]

_KERNELS = frozenset({"conv1d", "conv2d", "conv3d", "linear"})
_RECURRENT = frozenset({"lstm", "gru", "rnn"})
_Key = tuple[tuple[str, ...], int, Rounding, bool]
"""Layers that share a weight, its bits, how it is rounded, whether by channel."""


@dataclass(frozen=True, kw_only=True)
class Quantize(Pass):
    """Quantizes a program for integer kernels.

    Attributes:
        observer: how ranges of activations are chosen: "minmax", "percentile", "mse" or "entropy"; "auto" is "mse".
        round: how weights are rounded: "nearest", or "gptq", which lets weights make up for each other; "auto" is
            "gptq".
        per_channel: whether each output of a layer has a scale of its own.
        ignore: patterns of layer paths, "head.*", that go on computing in floating point.
    """

    name: ClassVar[str] = "quantize"
    requires: ClassVar[frozenset[str]] = frozenset({"batch_norm_folded"})
    provides: ClassVar[frozenset[str]] = frozenset({"quantized"})
    refuses: ClassVar[frozenset[str]] = frozenset({"clustered", "mixed_precision", "quantized"})

    observer: Observer | Literal["auto"] = "auto"
    round: Rounding | Literal["auto"] = "auto"
    per_channel: bool = True
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_choice("observer", self.observer, ("auto", *get_args(Observer)))
        check_choice("round", self.round, ("auto", *get_args(Rounding)))
        if type(self.per_channel) is not bool:
            raise ValueError(f"per_channel must be True or False, not {self.per_channel!r}")
        check_patterns("ignore", self.ignore)

    def plan(self, program: Program) -> Iterator[Rewrite | Skip]:
        """One decision per value to quantize, then one per weight.

        Raises:
            InputError: if there are no calibration data, or no layer can be quantized.
        """
        if program.calibration is None:
            raise InputError("quantize takes ranges from data: pass calibration=, an iterable of batches")
        weights, left = self._weights(program)
        yield from left
        if not weights:
            reasons = "; ".join(map(str, left[:3])) or "it has no convolution or linear layer"
            raise InputError(f"quantize finds no layer that could compute with integers: {reasons}")
        regions = integer_regions(program, [layer.name for layers in weights for layer in layers])
        spreads = value_spreads(program, [name for name in regions.readers if name not in regions.same])
        affines: dict[str, Affine] = {}
        for name, readers in regions.readers.items():
            same = regions.same.get(name)
            affines[name] = self._affine(program, spreads, name) if same is None else affines[same]
            low, high = affines[name].range
            yield Rewrite(
                name,
                f"{affines[name].type.name} from {low:.4g} to {high:.4g}, for {listed(readers)}",
                {"affine": affines[name].to_json(), "readers": list(readers)},
            )
        for layers in weights:
            source = cast("fx.Node", program.call(layers[0]).arguments["input"])
            read = {"input": affines[source.name].to_json()} if program.op(layers[0]) == "linear" else {}
            paths = ", ".join(sorted({str(layer.target) for layer in layers}))
            yield Rewrite(
                layers[0].name,
                f"{program.scheme.weight_bits}-bit weights of {paths}",
                {
                    "layers": [layer.name for layer in layers],
                    "bits": program.scheme.weight_bits,
                    **read,
                },
            )

    def apply(self, program: Program, rewrite: Rewrite) -> None:
        """Quantizes one value or one weight; what a weight becomes is no part of the plan."""
        original = original_of(program)
        if "affine" in rewrite.params:
            _quantize_value(program, program.node(rewrite.node), rewrite.params)
        else:
            self._quantize_weight(program, original, rewrite.params)
        keep_original(program, original)

    def _weights(self, program: Program) -> tuple[list[list[fx.Node]], list[Skip]]:
        """The layers to quantize, by the weight that they read, and those that are left alone."""
        weights: list[list[fx.Node]] = []
        left: list[Skip] = []
        seen: set[int] = set()
        for node in program.nodes:
            call = program.call(node)
            if call.op in _RECURRENT:
                left.append(Skip(node.name, f"{call.op} has no integer kernel"))
            if call.op not in FUNCTIONS or call.op == "embedding":
                continue
            if call.module is None:
                left.append(Skip(node.name, f"its weight comes from {call.arguments.get('weight')}"))
            elif id(weight_of(program, node)) not in seen:
                weight = weight_of(program, node)
                seen.add(id(weight))
                layers = readers_of(program, weight)
                reason = _reason_to_leave(program, layers, self.ignore)
                if reason is None:
                    weights.append(layers)
                else:
                    left.append(Skip(node.name, reason))
        return weights, left

    def _affine(self, program: Program, spreads: Mapping[str, Any], name: str) -> Affine:
        observer: Observer = "mse" if self.observer == "auto" else self.observer
        return affine_of(spreads[name], program.scheme.activations, observer)

    def _quantize_weight(self, program: Program, original: Program, params: Mapping[str, Any]) -> None:
        layers = [program.node(name) for name in params["layers"]]
        first, layer = layers[0], cast("Any", program.module_of(layers[0]))
        found = self._rounded(original, params["layers"], params["bits"])
        weight: Tensor = layer.weight
        codes = found.codes.transpose(1, 2).reshape(weight.shape).to(torch.int8)
        scale = found.scale.reshape(-1).float()
        bias = None
        if len(layers) == 1:
            whole = found.offset if layer.bias is None else layer.bias.detach().double() + found.offset
            if program.op(first) == "linear":
                # a linear layer that gives floating numbers has an integer kernel only with a bias of integers
                bias = _integer_bias(whole, scale, Affine.from_json(params["input"]))
            if bias is None and (layer.bias is not None or bool(found.offset.any())):
                edit.set_tensor(program, first, "bias", whole.to(weight.dtype))
        call_with(program, layers, QuantizedTensor(codes.contiguous(), scale), bias)

    def _rounded(self, original: Program, layers: Sequence[str], bits: int) -> Rounded:
        """A weight in integers, by what its only layer reads of the calibration data; kept with the program."""
        how: Rounding = "gptq" if self.round == "auto" else self.round
        key = tuple(layers), bits, how, self.per_channel
        known: Mapping[_Key, Rounded] = measured(original, _roundings)
        if key not in known:
            limit = 2 ** (bits - 1) - 1
            found = dict(known)
            for names, moments in self._moments(original):
                layer = PatchLayer(cast("nn.Module", original.module_of(original.node(names[0]))))
                mask = mask_of(original.module_of(original.node(names[0])))
                weight = layer.weight if mask is None else layer.weight * _as_matrix(layer, mask)
                found[names, bits, how, self.per_channel] = rounded(
                    weight, limit, moments, how=how, per_channel=self.per_channel
                )
            known = found
            keep(original, _roundings, cast("Mapping[_Key, Rounded]", found))
        return known[key]

    def _moments(self, original: Program) -> Iterator[tuple[tuple[str, ...], Any]]:
        weights, _ = self._weights(original)
        alone = [layers[0].name for layers in weights if len(layers) == 1]
        for name, moments in layer_moments(original, alone, lambda layer: layer.length <= LONGEST):
            yield (name,), moments.patches
        yield from ((tuple(layer.name for layer in layers), None) for layers in weights if len(layers) > 1)


def _reason_to_leave(program: Program, layers: Sequence[fx.Node], ignore: Sequence[str]) -> str | None:
    """Why layers that share a weight do not compute with integers; None if they do."""
    reason = reason_to_leave(program, layers, ignore)
    if reason is not None:
        return reason
    known = program.analysis(shapes)
    for layer in layers:
        op, module = program.op(layer), cast("Any", program.module_of(layer))
        source = program.call(layer).arguments.get("input")
        if op not in _KERNELS:
            return f"{op} has no integer kernel"
        if getattr(module, "padding_mode", "zeros") != "zeros":
            return f"there is no integer kernel that pads with padding_mode={module.padding_mode!r}"
        spec = known.get(source.name) if isinstance(source, fx.Node) else None
        if not isinstance(spec, TensorSpec) or spec.dtype is not torch.float32:
            return "it does not compute in float32"
    return None


def _quantize_value(program: Program, node: fx.Node, params: Mapping[str, Any]) -> None:
    """Has some readers of a value read what its integers stand for."""
    affine = Affine.from_json(params["affine"])
    wanted = set(params["readers"])
    readers = [item for item in program.nodes if item.name in wanted]
    if not readers:
        raise PassError("nothing reads it", pass_name=Quantize.name, node=node.name)
    codes = edit.insert_before(program, readers[0], quantize, (node, *affine.arguments), name=f"{node.name}_quantized")
    value = edit.insert_before(program, readers[0], dequantize, (codes, *affine.arguments))
    for reader in readers:
        args, kwargs = fx.node.map_arg((reader.args, reader.kwargs), lambda item: value if item is node else item)
        edit.set_arguments(program, reader, args, kwargs)


def _integer_bias(bias: Tensor, scale: Tensor, source: Affine) -> QuantizedTensor | None:
    """A bias with the scale that products of integers have; None if there is none, or it would not fit."""
    scales = scale * source.scale
    codes = (bias / scales.double()).round()
    if not bool(bias.any()) or bool((codes.abs() > INT32.high).any()) or bool((scales == 0).any()):
        return None
    return QuantizedTensor(codes.to(torch.int32), scales)


def _as_matrix(layer: PatchLayer, mask: Tensor) -> Tensor:
    """A mask in the layout of the layer's weight."""
    return mask.double().reshape(layer.groups, -1, layer.length).transpose(1, 2)


def _roundings(_: Program) -> Mapping[_Key, Rounded]:
    """What was rounded so far."""
    return {}
