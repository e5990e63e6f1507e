"""Quantization-aware training: static quantization whose integers are simulated, so that the program trains.

The plan is that of static quantization. In the place of its integers stands fake quantization
(`fxopt/fake_quantization.py`). Besides weights and biases, which keep their names, `program.module` then has the steps
of values (`<value>_quantized.scale`, one number) and of weights (`<layer>.scale`, one for each output) among its
parameters. Batch normalisation is folded, that is, frozen. `freeze_quantization` makes integers of what was trained.

Training begins where static quantization ends: with its ranges, its scales and its biases, and with the weights next to
the old ones that are rounded as it rounds them.

All layers have `weight_bits`, the first and the last too: with four bits a MobileNet keeps 91.2 of 91.3 % after an
epoch, so nothing speaks for exceptions (`python -m benchmarks quantize --part aware`). Where a processor adds up two
products in 16 bits, 8 bits are 7: static quantization can tell whether two neighbours fit, but in training they change.
Values have 8 bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, fx, nn

from fxopt import edit
from fxopt.fake_quantization import FakeQuantize, FakeQuantizedWeight
from fxopt.held_weight import call_with
from fxopt.masking import mask_of
from fxopt.passes_base import Rewrite, Skip
from fxopt.quantization import Affine
from fxopt.quantizers.products import Products, find_products
from fxopt.quantizers.static import StaticQuantizer
from fxopt.quantizers.weights import WeightCodes, WeightRounding

if TYPE_CHECKING:
    from fxopt.program import Program

__all__ = ["AwareQuantizer"]

_WITHIN = 0.49  # of a step, on either side: what rounds to the integer for certain


@dataclass(frozen=True)
class AwareQuantizer(StaticQuantizer):
    """Plans static quantization and simulates it."""

    def plan(self, program: Program) -> Iterator[Rewrite | Skip]:
        """As static quantization; with weights that fit whatever their neighbours become in training."""
        yield from StaticQuantizer.plan(replace(self, weight_bits=self._bits(program)), program)

    def products(self, program: Program) -> Products:
        """None is quantized: they train in floating point."""
        found = find_products(program, self.ignore)
        return Products([], [*found.left, *(Skip(name, "products train in floating point") for name in found.nodes)])

    def quantize_value(self, program: Program, node: fx.Node, params: Mapping[str, Any]) -> None:
        """Has some readers of a value read it rounded; a value in the layout of another has its step."""
        readers = self.readers_of(program, node, params)
        like = None if params["same"] is None else _rounded(program, program.node(params["same"]))
        if like is not None:
            value = edit.insert_call(program, readers[0], like, (node,))
        else:
            fake = FakeQuantize(Affine.from_json(params["affine"]), program.example_inputs[0].device)
            value = edit.insert_before(program, readers[0], fake, (node,), name=f"{node.name}_quantized")
        edit.set_operand(program, readers, node, value)

    def quantize_weight(self, program: Program, original: Program, params: Mapping[str, Any]) -> None:
        """Has layers that share a weight read it rounded."""
        layers = [program.node(name) for name in params["layers"]]
        layer = cast("Any", program.module_of(layers[0]))
        found = self.weight_codes(program, original, params)
        if len(layers) == 1 and (layer.bias is not None or bool(found.offset.any())):
            edit.set_tensor(program, layers[0], "bias", found.bias(layer.bias).to(layer.weight.dtype))
        weight = nn.Parameter(_rounds_to(layer.weight.detach(), found), requires_grad=layer.weight.requires_grad)
        scale = (found.scale if self.per_channel else found.scale[:1]).to(weight.device)
        call_with(program, layers, FakeQuantizedWeight(weight, scale, self._bits(program), mask_of(layer)))

    def _rounding(self, program: Program) -> WeightRounding:
        return WeightRounding(self._bits(program), self.round, self.per_channel, absorbed=self.bias_correction)

    def _bits(self, program: Program) -> int:
        return min(self.weight_bits, program.scheme.weight_bits)


def _rounded(program: Program, node: fx.Node) -> fx.Node | None:
    """The node that rounds a value."""
    return next((user for user in node.users if program.op(user) == "fake_quantize"), None)


def _rounds_to(weight: Tensor, found: WeightCodes) -> Tensor:
    """The weight next to the given one that is rounded to these integers."""
    steps = found.scale.to(weight).reshape(-1, *[1] * (weight.ndim - 1))
    codes = found.codes.to(weight)
    return weight.clamp((codes - _WITHIN) * steps, (codes + _WITHIN) * steps)
