"""Weight-only quantization: weights of 8 or 4 bits, and everything else in float32. It takes no data.

    W[o, d] about scale[o, d // block] q[o, d]        linear layers; of convolutions an output has one scale

Fewer bytes to keep, and to read: linear layers of a few rows wait for their weights. What engines make of it is said in
`docs/architecture.md`, under Integers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from fxopt import edit
from fxopt.analysis.originals import keep_original, original_of
from fxopt.held_weight import call_with
from fxopt.packed_weight import PackedWeight
from fxopt.passes_base import Rewrite, Skip
from fxopt.quantizers.layers import Layers, find_layers
from fxopt.quantizers.sensitivity import LayerLoss, Weights, layer_losses, leave_out
from fxopt.quantizers.weights import WeightCodes, WeightRounding
from fxopt.rounding import Rounding

if TYPE_CHECKING:
    from fxopt.program import Program

__all__ = ["WeightOnlyQuantizer"]

_KERNELS = frozenset({"conv1d", "conv2d", "conv3d", "linear"})
_OTHERS = "holds its weights in float32 only"


@dataclass(frozen=True)
class WeightOnlyQuantizer:
    """Plans and applies weight-only quantization.

    Attributes:
        round: how weights are rounded; it takes calibration data to round by anything but the nearest.
        weight_bits: of a weight, 8 or 4.
        group_size: how many input places of an output of a linear layer share a scale; None: all.
        bias_correction: whether the bias takes up what rounding a weight loses on average.
        min_sqnr_db: ratio of signal to noise of the outputs that is reached by leaving the worst layers as they are.
        ignore: patterns of layer paths that are left alone.
    """

    round: Rounding
    weight_bits: int
    group_size: int | None
    bias_correction: bool
    min_sqnr_db: float | None
    ignore: tuple[str, ...]

    def plan(self, program: Program) -> Iterator[Rewrite | Skip]:
        """One decision per weight.

        Raises:
            InputError: if no weight can be held as integers.
        """
        found = self._layers(program)
        yield from found.left
        for node in program.nodes:
            if program.op(node) == "embedding":
                yield Skip(node.name, f"embedding {_OTHERS}")
        weights = found.names
        if self.min_sqnr_db is not None:
            yield from leave_out(program, weights, self._quantized, self.min_sqnr_db)
        yield from self._decisions(program, weights)

    def losses(self, program: Program) -> list[LayerLoss]:
        """What each layer costs when it alone is quantized, the worst first.

        Raises:
            InputError: as `plan`, or if there are no calibration data.
        """
        return layer_losses(program, self._layers(program).names, self._quantized)

    def _decisions(self, program: Program, weights: Weights) -> Iterator[Rewrite]:
        for names in weights:
            paths = ", ".join(sorted({str(program.node(name).target) for name in names}))
            yield Rewrite(names[0], f"{self.weight_bits}-bit weights of {paths}", {"layers": list(names)})

    def _quantized(self, program: Program, weights: Weights) -> Program:
        """A copy in which layers with some weights are quantized."""
        for names in weights:
            # in two runs for all; copies know what their original knew
            self._codes(program, names)
        found = program.copy()
        for decision in self._decisions(program, weights):
            self.apply(found, decision)
        return found

    def apply(self, program: Program, rewrite: Rewrite) -> None:
        """Has layers read one weight as integers; what it becomes is no part of the plan."""
        original = original_of(program)
        self._quantize(program, original, rewrite.params)
        keep_original(program, original)

    def _quantize(self, program: Program, original: Program, params: Mapping[str, Any]) -> None:
        layers = [program.node(name) for name in params["layers"]]
        layer = cast("Any", program.module_of(layers[0]))
        found = self._codes(original, params["layers"])
        if len(layers) == 1 and bool(found.offset.any()):
            bias = found.offset if layer.bias is None else layer.bias.detach().double() + found.offset
            edit.set_tensor(program, layers[0], "bias", bias.to(layer.weight.dtype))
        call_with(
            program,
            layers,
            PackedWeight(found.codes, found.scale, self.weight_bits, self._block(original, params["layers"])),
        )

    def _block(self, original: Program, names: Sequence[str]) -> int | None:
        return self.group_size if original.op(original.node(names[0])) == "linear" else None

    def _codes(self, original: Program, names: Sequence[str]) -> WeightCodes:
        block = self._block(original, names)
        alike = [each for each in self._layers(original).names if self._block(original, each) == block]
        rounding = WeightRounding(self.weight_bits, self.round, block=block, absorbed=self.bias_correction)
        return rounding.of(original, names, alike)

    def _layers(self, program: Program) -> Layers:
        return find_layers(program, _KERNELS, self.ignore, others=_OTHERS, pads_zeros_only=False)
