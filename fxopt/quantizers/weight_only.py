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
from fxopt.quantizers.base import Quantizer
from fxopt.quantizers.layers import Layers, find_layers
from fxopt.quantizers.sensitivity import Units
from fxopt.quantizers.weights import WeightCodes, WeightRounding
from fxopt.rounding import Rounding

if TYPE_CHECKING:
    from fxopt.program import Program

__all__ = ["WeightOnlyQuantizer"]

_KERNELS = frozenset({"conv1d", "conv2d", "conv3d", "linear"})
_OTHERS = "holds its weights in float32 only"


@dataclass(frozen=True)
class WeightOnlyQuantizer(Quantizer):
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

    def candidates(self, program: Program) -> tuple[list[list[str]], list[Skip]]:
        found = self._layers(program)
        embeddings = [node.name for node in program.nodes if program.op(node) == "embedding"]
        return found.names, [*found.left, *(Skip(name, f"embedding {_OTHERS}") for name in embeddings)]

    def decisions(self, program: Program, units: Units) -> Iterator[Rewrite]:
        """One per weight."""
        for names in units:
            paths = ", ".join(sorted({str(program.node(name).target) for name in names}))
            yield Rewrite(names[0], f"{self.weight_bits}-bit weights of {paths}", {"layers": list(names)})

    def round_ahead(self, program: Program) -> None:
        for names in self._layers(program).names:
            self._codes(program, names)

    def apply(self, program: Program, rewrite: Rewrite) -> None:
        """Has layers read one weight as integers."""
        original = original_of(program)
        self._quantize(program, original, rewrite.params)
        keep_original(program, original)

    def _quantize(self, program: Program, original: Program, params: Mapping[str, Any]) -> None:
        layers = [program.node(name) for name in params["layers"]]
        layer = cast("Any", program.module_of(layers[0]))
        found = self._codes(original, params["layers"])
        if len(layers) == 1 and bool(found.offset.any()):
            edit.set_tensor(program, layers[0], "bias", found.bias(layer.bias).to(layer.weight.dtype))
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
