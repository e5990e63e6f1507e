"""Weight-only quantization: weights of 8 or 4 bits, and everything else in float32. It takes no data.

    W[o, d] about scale[o, d // block] q[o, d]        linear layers; of convolutions an output has one scale

Fewer bytes to keep, and to read: linear layers of a few rows wait for their weights. What engines make of it is said in
`docs/architecture.md`, under Integers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from fxopt import edit
from fxopt.analysis.originals import keep_original, original_of
from fxopt.held_weight import call_with
from fxopt.packed_weight import PackedWeight
from fxopt.passes_base import Rewrite, Skip
from fxopt.quantizers.layers import Layers, find_layers
from fxopt.quantizers.weights import WeightRounding
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
        ignore: patterns of layer paths that are left alone.
    """

    round: Rounding
    weight_bits: int
    group_size: int | None
    ignore: tuple[str, ...]

    def plan(self, program: Program) -> Iterator[Rewrite | Skip]:
        """One decision per weight.

        Raises:
            InputError: if no weight can be held as integers.
        """
        weights, left = self._layers(program)
        yield from left
        for node in program.nodes:
            if program.op(node) == "embedding":
                yield Skip(node.name, f"embedding {_OTHERS}")
        for layers in weights:
            paths = ", ".join(sorted({str(layer.target) for layer in layers}))
            yield Rewrite(
                layers[0].name,
                f"{self.weight_bits}-bit weights of {paths}",
                {"layers": [layer.name for layer in layers], "bits": self.weight_bits},
            )

    def apply(self, program: Program, rewrite: Rewrite) -> None:
        """Has layers read one weight as integers; what it becomes is no part of the plan."""
        original = original_of(program)
        self._quantize(program, original, rewrite.params)
        keep_original(program, original)

    def _quantize(self, program: Program, original: Program, params: Mapping[str, Any]) -> None:
        layers = [program.node(name) for name in params["layers"]]
        op, layer = program.op(layers[0]), cast("Any", program.module_of(layers[0]))
        block = self.group_size if op == "linear" else None
        alike = [
            [item.name for item in group]
            for group in self._layers(original).weights
            if (original.op(group[0]) == "linear") == (op == "linear")
        ]
        found = WeightRounding(params["bits"], self.round, block=block).of(original, params["layers"], alike)
        if len(layers) == 1 and bool(found.offset.any()):
            bias = found.offset if layer.bias is None else layer.bias.detach().double() + found.offset
            edit.set_tensor(program, layers[0], "bias", bias.to(layer.weight.dtype))
        call_with(program, layers, PackedWeight(found.codes, found.scale, params["bits"], block))

    def _layers(self, program: Program) -> Layers:
        return find_layers(program, _KERNELS, self.ignore, others=_OTHERS, pads_zeros_only=False)
