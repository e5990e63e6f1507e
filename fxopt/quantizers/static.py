"""Static quantization: ranges of activations are fixed ahead, from calibration data.

    x about scale (q - zero_point)          activations: 8 bits, a range for each value
    W about scale_o q                       weights: one scale for each output

Where integers go is decided by `fxopt/analysis/integer_regions.py`; which ones by the scheme of the backend
(`fxopt/integer_scheme.py`); ranges come from histograms (`fxopt/analysis/value_spreads.py`), and weights are rounded by
`fxopt/rounding.py`. In the graph each quantized value is a pair of a quantize and a dequantize node, and each weight is
held as integers: eager execution simulates what an engine computes with integer kernels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, fx

from fxopt import edit
from fxopt.analysis.integer_regions import integer_regions
from fxopt.analysis.measurements import keep, measured
from fxopt.analysis.originals import keep_original, original_of
from fxopt.analysis.value_spreads import Observer, affine_of, value_spreads
from fxopt.equalization import Equalization, equalizations, scale_channels
from fxopt.errors import InputError, PassError
from fxopt.held_weight import call_with
from fxopt.integer_scheme import INT32
from fxopt.passes_base import Rewrite, Skip, listed
from fxopt.progress import progress
from fxopt.quantization import Affine, QuantizedTensor, dequantize, quantize
from fxopt.quantizers.base import Quantizer
from fxopt.quantizers.layers import find_layers
from fxopt.quantizers.output_means import last_layers, mean_loss
from fxopt.quantizers.products import ATTENTION, Products, find_products, operands, quantize_attention, share_spreads
from fxopt.quantizers.sensitivity import Units, quantized_sqnr
from fxopt.quantizers.weights import WeightCodes, WeightRounding
from fxopt.rounding import Rounding
from fxopt.verify import Reference

if TYPE_CHECKING:
    from fxopt.program import Program

__all__ = ["KERNELS", "Equalize", "StaticQuantizer", "integer_bias", "read_integers"]

Equalize = Literal["auto", "off"]

KERNELS = frozenset({"conv1d", "conv2d", "conv3d", "linear"})


@dataclass(frozen=True)
class StaticQuantizer(Quantizer):
    """Plans and applies static quantization.

    Attributes:
        observers: how ranges of activations may be chosen: in the way in which the outputs lose least.
        round: how weights are rounded.
        weight_bits: of a weight.
        per_channel: whether each output of a layer has a scale of its own.
        ignore: patterns of layer paths that are left alone.
        equalize: "auto" scales channels where less is lost then, "off" nowhere.
        bias_correction: whether the bias takes up what rounding a weight loses on average; that of the last layers,
            what quantizing the program does.
        min_sqnr_db: ratio of signal to noise of the outputs that is reached by leaving the worst layers as they are.
    """

    observers: tuple[Observer, ...]
    round: Rounding
    weight_bits: int
    per_channel: bool
    ignore: tuple[str, ...]
    equalize: Equalize
    bias_correction: bool
    min_sqnr_db: float | None

    def candidates(self, program: Program) -> tuple[list[list[str]], list[Skip]]:
        weights, left = self._weights(program)
        products = self.products(program)
        return [*weights, *([name] for name in products.nodes)], [*left, *products.left]

    def products(self, program: Program) -> Products:
        """The products of activations."""
        return find_products(program, self.ignore)

    def plan(self, program: Program) -> Iterator[Rewrite | Skip]:
        """As all modes; the last layers keep the mean of what they give, which trials do without."""
        last = self._last_layers(program)
        kept = []
        for decision in super().plan(program):
            if isinstance(decision, Rewrite) and decision.node in last and "layers" in decision.params:
                text = f"{decision.what}, whose outputs keep their mean"
                kept.append(Rewrite(decision.node, text, {**decision.params, "keeps_mean": True}))
            else:
                yield decision
        # these see what has become of all others
        yield from kept

    def prepared(self, program: Program, units: Units) -> tuple[Program, list[Rewrite | Skip]]:
        """The program with its channels scaled, if that changes no output."""
        if self.equalize == "off":
            return program, []
        names = [name for names in units for name in names]
        decisions = [_decision(found) for found in equalizations(program, names, per_channel=self.per_channel)]
        if not decisions:
            return program, []
        reference = Reference.of(program)
        scaled = self._applied(program, decisions)
        if reference.difference(scaled).within(reference.tolerance):
            return scaled, [*decisions]
        found: list[Rewrite | Skip] = []
        scaled = program
        for decision in decisions:
            tried = self._applied(scaled, [decision])
            difference = reference.difference(tried)
            if difference.within(reference.tolerance):
                scaled = tried
                found.append(decision)
            else:
                why = f"its channels are not scaled, as that changes outputs: {difference}"
                found.append(Skip(decision.node, why))
        return scaled, found

    def _applied(self, program: Program, decisions: Iterable[Rewrite]) -> Program:
        """A copy with these carried out."""
        changed = program.copy()
        for decision in decisions:
            self.apply(changed, decision)
        return changed

    def round_ahead(self, program: Program) -> None:
        weights, _ = self._weights(program)
        self._rounding(program).of(program, weights[0], weights)

    def decisions(self, program: Program, units: Units) -> Iterator[Rewrite]:
        """One per value to quantize, then one per attention, then one per weight."""
        observer = self._observer(program)
        weights = [names for names in units if program.module_of(program.node(names[0])) is not None]
        others = [program.node(name) for names in units if names not in weights for name in names]
        attention = [node for node in others if program.op(node) == ATTENTION]
        reading = [name for names in units for name in names if program.node(name) not in attention]
        regions = integer_regions(program, reading)
        wanted = [name for name in regions.readers if name not in regions.same]
        wanted += [source.name for node in attention for source in operands(program, node).values()]
        spreads, shares = value_spreads(program, wanted), share_spreads(program, attention)
        affines: dict[str, Affine] = {}
        for name, readers in regions.readers.items():
            same = regions.same.get(name)
            scheme = program.scheme.activations
            affines[name] = affine_of(spreads[name], scheme, observer) if same is None else affines[same]
            low, high = affines[name].range
            yield Rewrite(
                name,
                f"{affines[name].type.name} from {low:.4g} to {high:.4g}, for {listed(readers)}",
                {"affine": affines[name].to_json(), "readers": list(readers), "same": same},
            )
        for node in attention:
            seen = {name: spreads[source.name] for name, source in operands(program, node).items()}
            seen["shares"] = shares[node.name]
            found = {
                operand: affine_of(spread, program.scheme.activations, observer) for operand, spread in seen.items()
            }
            yield Rewrite(
                node.name,
                f"{program.scheme.activations.name} in both products",
                {"attention": {operand: affine.to_json() for operand, affine in found.items()}},
            )
        for names in weights:
            paths = ", ".join(sorted({str(program.node(name).target) for name in names}))
            yield Rewrite(names[0], f"{self.weight_bits}-bit weights of {paths}", {"layers": list(names)})

    def _weights(self, program: Program) -> tuple[list[list[str]], list[Skip]]:
        if program.calibration is None:
            raise InputError("quantize takes ranges from data: pass calibration=, an iterable of batches")
        found = find_layers(program, KERNELS, self.ignore, fewest_terms=program.scheme.fewest_terms)
        return found.names, found.left

    def _observer(self, program: Program) -> Observer:
        """The way of choosing ranges with which the outputs lose least on calibration data; weights stay."""
        if len(self.observers) == 1:
            return self.observers[0]
        known = measured(program, _observers)
        if self not in known:
            units, _ = self.candidates(program)
            trials = [replace(self, observers=(observer,))._ranged for observer in self.observers]
            ratios = []
            with progress("choosing ranges", len(trials), "ways") as advance:
                for ratio in quantized_sqnr(program, units, trials):
                    ratios.append(ratio)
                    advance(1)
            known = {**known, self: self.observers[ratios.index(max(ratios))]}
            keep(program, _observers, cast("Mapping[StaticQuantizer, Observer]", known))
        return known[self]

    def _ranged(self, program: Program, units: Units) -> Program:
        """A copy of a prepared program in which values are quantized and weights are not."""
        return self._applied(program, (item for item in self.decisions(program, units) if "layers" not in item.params))

    def _last_layers(self, program: Program) -> set[str]:
        """The layers whose bias makes up for what all others lose on average."""
        if not self.bias_correction:
            return set()
        weights = self._weights(program)[0]
        shared = {name for names in weights if len(names) > 1 for name in names}
        return last_layers(program, [name for names in weights for name in names]) - shared

    def _rounding(self, program: Program) -> WeightRounding:
        return WeightRounding(
            self.weight_bits,
            self.round,
            self.per_channel,
            pairs=program.scheme.pairs,
            absorbed=self.bias_correction,
        )

    def apply(self, program: Program, rewrite: Rewrite) -> None:
        """Scales channels, writes out attention, or quantizes one value or one weight."""
        if "factors" in rewrite.params:
            factors = torch.tensor(rewrite.params["factors"], dtype=torch.float64)
            scale_channels(program, rewrite.node, rewrite.params["readers"], factors)
            return
        original = original_of(program)
        if "attention" in rewrite.params:
            affines = {name: Affine.from_json(data) for name, data in rewrite.params["attention"].items()}
            quantize_attention(program, program.node(rewrite.node), affines)
        elif "affine" in rewrite.params:
            self.quantize_value(program, program.node(rewrite.node), rewrite.params)
        else:
            self.quantize_weight(program, original, rewrite.params)
        keep_original(program, original)

    def quantize_value(self, program: Program, node: fx.Node, params: Mapping[str, Any]) -> None:
        """Has some readers of a value read what its integers stand for."""
        affine = Affine.from_json(params["affine"])
        readers = self.readers_of(program, node, params)
        name = f"{node.name}_quantized"
        codes = edit.insert_before(program, readers[0], quantize, (node, *affine.arguments), name=name)
        value = edit.insert_before(program, readers[0], dequantize, (codes, *affine.arguments))
        edit.set_operand(program, readers, node, value)

    def readers_of(self, program: Program, node: fx.Node, params: Mapping[str, Any]) -> list[fx.Node]:
        """Who reads a value as integers, in the order of the program."""
        wanted = set(params["readers"])
        readers = [item for item in program.nodes if item.name in wanted]
        if not readers:
            raise PassError("nothing reads it", pass_name="quantize", node=node.name)  # noqa: S106 (no secret)
        return readers

    def weight_codes(self, program: Program, original: Program, params: Mapping[str, Any]) -> WeightCodes:
        """A weight as integers, and what the bias takes up."""
        found = self._rounding(original).of(original, params["layers"], self._weights(original)[0])
        if not params.get("keeps_mean"):
            return found
        weight = QuantizedTensor(found.codes, found.scale)()
        return replace(found, offset=mean_loss(original, program, params["layers"][0], weight))

    def quantize_weight(self, program: Program, original: Program, params: Mapping[str, Any]) -> None:
        """Has layers that share a weight read integers."""
        layers = [program.node(name) for name in params["layers"]]
        first, layer = layers[0], cast("Any", program.module_of(layers[0]))
        found = self.weight_codes(program, original, params)
        found = found.with_room_for(_biases(program, layers, found))
        bias = None
        if len(layers) == 1:
            whole = found.bias(layer.bias)
            source = read_integers(program, first)
            if program.scheme.integer_biases and program.op(first) == "linear" and source is not None:
                # a linear layer that gives floating numbers has an integer kernel only with a bias of integers
                bias = integer_bias(whole, found.scale, source)
            if bias is None and (layer.bias is not None or bool(found.offset.any())):
                edit.set_tensor(program, first, "bias", whole.to(layer.weight.dtype))
        call_with(program, layers, QuantizedTensor(found.codes, found.scale), bias)


def _observers(_: Program) -> Mapping[StaticQuantizer, Observer]:
    """How ranges were chosen so far."""
    return {}


def _decision(found: Equalization) -> Rewrite:
    giver, _, readers = found.channels
    return Rewrite(
        giver,
        f"{len(found.factors)} channels scaled, for {listed(readers)}: {1 - found.noise:.0%} less noise is expected",
        {"factors": found.factors.tolist(), "readers": list(readers)},
    )


def _biases(program: Program, layers: Sequence[fx.Node], found: WeightCodes) -> Tensor:
    """Of layers that share a weight, the largest bias over the step of what its layer reads, float64[outputs]."""
    largest = torch.zeros_like(found.offset)
    for layer in layers:
        source = read_integers(program, layer)
        bias = found.bias(cast("Any", program.module_of(layer)).bias)
        if source is not None:
            largest = torch.maximum(largest, bias.abs() / source.scale)
    return largest


def read_integers(program: Program, layer: fx.Node) -> Affine | None:
    """How integers stand for what a layer reads; None if it does not read any."""
    source = cast("fx.Node", program.call(layer).arguments["input"])
    if program.op(source) != "dequantize":
        return None
    given: Any = program.call(source).arguments
    return Affine(program.scheme.activations, given["scale"], given["zero_point"])


def integer_bias(bias: Tensor, scale: Tensor, source: Affine) -> QuantizedTensor | None:
    """A bias with the scale that products of integers have; None if there is none, or it would not fit."""
    scales = scale * source.scale
    codes = (bias / scales.double()).round()
    if not bool(bias.any()) or bool((codes.abs() > INT32.high).any()) or bool((scales == 0).any()):
        return None
    return QuantizedTensor(codes.to(torch.int32), scales)
