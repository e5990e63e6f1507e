"""Which layers lose what is lost: each is quantized by itself, and the outputs are compared with the program's own.

The noises of layers nearly add up, so that leaving out those that are worst by themselves is what helps the whole most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fxopt.compare import compare
from fxopt.errors import InputError
from fxopt.passes_base import Skip
from fxopt.progress import progress
from fxopt.randomness import fixed_random_state

if TYPE_CHECKING:
    from fxopt.program import Program

__all__ = ["LayerLoss", "Units", "layer_losses", "leave_out", "quantized_sqnr"]

Units = Sequence[Sequence[str]]
"""What is quantized or not as a whole: the nodes that call layers which share a weight, by name; or one product."""

Quantized = Callable[["Program", Units], "Program"]
"""A copy of a program in which some are quantized."""

_SAMPLES = 32  # that outputs are compared on


class LayerLoss(NamedTuple):
    """What it costs to quantize a layer alone.

    Attributes:
        layers: names of the nodes that call it, and those that share its weight.
        path: of the layer in the model; of a product, which has none, the node's name.
        sqnr_db: signal to quantization noise ratio of the program's outputs, in decibel.
    """

    layers: tuple[str, ...]
    path: str
    sqnr_db: float

    def __str__(self) -> str:
        return f"{self.path}: {self.sqnr_db:.1f} dB"


def quantized_sqnr(program: Program, units: Units, ways: Iterable[Quantized]) -> Iterator[float]:
    """Signal to quantization noise ratio of the outputs once layers are quantized, in decibel, for each way.

    Args:
        program: in floating point, with calibration data.
        units: the layers.
        ways: how they are quantized.
    """
    batches = _samples(program)
    expected = _outputs(program, batches)
    for quantized in ways:
        yield _sqnr(expected, _outputs(quantized(program, units), batches))


def layer_losses(program: Program, units: Units, quantized: Quantized) -> list[LayerLoss]:
    """What each layer costs, the worst first.

    Args:
        program: in floating point, with calibration data.
        units: the layers.
        quantized: how they are quantized.
    """
    batches = _samples(program)
    expected = _outputs(program, batches)
    found = []
    with progress("quantizing layers one by one", len(units), "layers") as advance:
        for names in units:
            noise = _sqnr(expected, _outputs(quantized(program, [names]), batches))
            node = program.node(names[0])
            path = str(node.target) if node.op == "call_module" else node.name
            found.append(LayerLoss(tuple(names), path, noise))
            advance(1)
    return sorted(found, key=lambda item: item.sqnr_db)


def leave_out(program: Program, units: list[list[str]], quantized: Quantized, floor: float) -> list[Skip]:
    """Takes as few layers, of the worst, out of those to quantize as it takes for the rest to reach a ratio.

    Args:
        program: in floating point, with calibration data.
        units: the layers; those that are left out are taken away.
        quantized: how they are quantized.
        floor: signal to quantization noise ratio of the outputs, in decibel.

    Returns:
        Why each is left out.

    Raises:
        InputError: if none could be quantized, or there are no calibration data.
    """
    left = _worst(program, units, quantized, floor)
    for item in left:
        units.remove(list(item.layers))
    why = "left in floating point for min_sqnr_db: it alone would leave"
    return [Skip(item.layers[0], f"{why} {item.sqnr_db:.1f} dB") for item in left]


def _worst(program: Program, units: Units, quantized: Quantized, floor: float) -> list[LayerLoss]:
    batches = _samples(program)
    expected = _outputs(program, batches)
    if not expected[0].is_floating_point():
        raise InputError("min_sqnr_db needs an output of floating-point numbers, and the program gives others alone")
    if _sqnr(expected, _outputs(quantized(program, units), batches)) >= floor:
        return []
    ranked = layer_losses(program, units, quantized)
    if ranked[-1].sqnr_db < floor:
        raise InputError(
            f"no layer can be quantized with min_sqnr_db={floor:g}: the best of them, {ranked[-1].path}, by itself "
            f"leaves {ranked[-1].sqnr_db:.1f} dB"
        )

    def reaches(count: int) -> bool:
        left = {names for item in ranked[:count] for names in item.layers}
        rest = [names for names in units if names[0] not in left]
        return _sqnr(expected, _outputs(quantized(program, rest), batches)) >= floor

    fails, holds = 0, len(ranked) - 1
    with progress(f"looking for {floor:g} dB", len(ranked).bit_length(), "trials") as advance:
        while holds - fails > 1:
            middle = (fails + holds) // 2
            fails, holds = (fails, middle) if reaches(middle) else (middle, holds)
            advance(1)
    return ranked[:holds]


def _samples(program: Program) -> list[tuple[Tensor, ...]]:
    """The first calibration samples."""
    batches: list[tuple[Tensor, ...]] = []
    left = _SAMPLES
    for inputs in program.calibration_inputs():
        axes = program.batch.inputs if program.batch is not None else ()
        cut = tuple(tensor[:left] if index in axes else tensor for index, tensor in enumerate(inputs))
        batches.append(cut)
        left -= len(cut[axes[0]]) if axes else 1
        if left <= 0:
            break
    return batches


def _outputs(program: Program, batches: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """The outputs for all batches, one tensor for each; of classes and the like there is no signal and no noise."""
    with fixed_random_state(), torch.no_grad():
        found = [program.run(*inputs) for inputs in batches]
    joined = tuple(torch.cat([each.reshape(-1) for each in parts]) for parts in zip(*found, strict=True))
    return tuple(tensor for tensor in joined if tensor.is_floating_point()) or joined


def _sqnr(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    difference = compare(expected, found)
    return float("-inf") if difference.mismatch else difference.sqnr_db
