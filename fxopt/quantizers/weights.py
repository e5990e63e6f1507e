"""The weights of a program's layers as integers, rounded by what the layers read of the calibration data.

All that a pass asks for is rounded in one run, and kept with the program until its weights change.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from fxopt.analysis.layer_moments import Moments, patch_moments
from fxopt.analysis.measurements import keep, measured
from fxopt.analysis.patches import PatchLayer
from fxopt.integer_limits import IntegerLimits
from fxopt.integer_scheme import Pairs
from fxopt.masking import mask_of
from fxopt.progress import progress
from fxopt.rounding import Rounded, Rounding, rounded
from fxopt.substitution import LONGEST

if TYPE_CHECKING:
    from fxopt.program import Program

__all__ = ["WeightCodes", "WeightRounding", "round_weights"]


_LARGEST_BIAS = 2.0**30  # in steps: leaves as much room again for the products


@dataclass(frozen=True)
class WeightCodes:
    """A layer's weight as integers.

    Attributes:
        codes: int8, in the shape of the weight.
        scale: float32[outputs], or [outputs, blocks] where blocks of a row have scales of their own.
        offset: what the bias has to take up, float64[outputs].
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor

    def bias(self, old: Tensor | None) -> Tensor:
        """The bias that takes it up, float64[outputs], given the layer's own."""
        return self.offset if old is None else old.detach().double() + self.offset

    def with_room_for(self, biases: Tensor) -> WeightCodes:
        """The same with scales as large as it takes for biases to be counted in 32 bits.

        Where that changes a scale, all that its weights can give is less than a ten-thousandth of the bias.

        Args:
            biases: over the step of what the layer reads, float64[outputs], no negatives.
        """
        scale = torch.maximum(self.scale.double(), biases / _LARGEST_BIAS).float()
        if torch.equal(scale, self.scale):
            return self
        share = (self.scale.double() / scale).reshape(-1, *[1] * (self.codes.ndim - 1))
        return replace(self, codes=(self.codes * share).round().to(torch.int8), scale=scale)


@dataclass(frozen=True)
class WeightRounding:
    """How weights are rounded.

    Attributes:
        bits: of an integer.
        how: to the nearest, or with an eye on what the layer reads.
        per_channel: whether each output has a scale of its own.
        block: how many weights in a row share a scale; None: all.
        pairs: which two products the processor adds up in 16 bits; None: it has room for their sum.
        absorbed: whether the bias takes up what is lost on average.
    """

    bits: int
    how: Rounding
    per_channel: bool = True
    block: int | None = None
    pairs: Pairs | None = None
    absorbed: bool = True

    def of(self, original: Program, layers: Sequence[str], all_layers: Sequence[Sequence[str]]) -> WeightCodes:
        """The weight that some layers of a program read.

        Args:
            original: the program, in floating point; with calibration data where the rounding needs it.
            layers: names of the nodes that read the weight.
            all_layers: the same for every weight that will be asked for: one run serves them all.
        """
        key = tuple(layers), self
        if key not in measured(original, _roundings):
            round_weights(original, all_layers, [self])
        found = measured(original, _roundings)[key]
        return _codes(found, cast("Any", original.module_of(original.node(layers[0]))).weight.shape)


def round_weights(original: Program, all_layers: Sequence[Sequence[str]], roundings: Sequence[WeightRounding]) -> None:
    """Rounds weights in one or more ways, in one run over the calibration data, for `WeightRounding.of` to find.

    Args:
        original: the program, in floating point; with calibration data where a rounding needs it.
        all_layers: for every weight, the names of the nodes that read it.
        roundings: the ways.
    """
    found = dict(measured(original, _roundings))
    with progress("rounding weights", len(all_layers), "layers") as advance:
        for names, moments in _moments(original, all_layers):
            module = cast("nn.Module", original.module_of(original.node(names[0])))
            layer, mask = PatchLayer(module), mask_of(module)
            weight = layer.weight if mask is None else layer.weight * layer.as_matrix(mask)
            for each in roundings:
                found[names, each] = rounded(
                    weight,
                    IntegerLimits.of(layer, each.bits, pairs=each.pairs),
                    moments,
                    how=each.how,
                    per_channel=each.per_channel,
                    block=each.block,
                    absorbed=each.absorbed,
                )
            advance(1)
    keep(original, _roundings, cast("Mapping[Any, Rounded]", found))


def _codes(found: Rounded, shape: torch.Size) -> WeightCodes:
    codes = found.codes.transpose(1, 2).reshape(shape).to(torch.int8).contiguous()
    scale = found.scale.transpose(1, 2).flatten(0, 1).float()
    return WeightCodes(codes, scale.squeeze(1) if scale.shape[1] == 1 else scale, found.offset)


def _moments(
    original: Program, all_layers: Sequence[Sequence[str]]
) -> Iterator[tuple[tuple[str, ...], Moments | None]]:
    """For every weight, the moments of the patches that it is multiplied by; None where several layers read it."""
    if original.calibration is None:
        yield from ((tuple(names), None) for names in all_layers)
        return
    alone = [names[0] for names in all_layers if len(names) == 1]
    layers = {name: cast("Any", original.module_of(original.node(name))) for name in alone}
    known = [name for name in alone if layers[name].weight[0].numel() <= LONGEST]
    for name, moments in patch_moments(original, known):
        yield (name,), moments
    yield from ((tuple(names), None) for names in all_layers if names[0] not in known)


def _roundings(_: Program) -> Mapping[Any, Rounded]:
    """What was rounded so far."""
    return {}
