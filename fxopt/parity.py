"""Whether an engine answers like the program that it was made from.

Of integers, an engine need not give each the program's: what lies in the middle between two goes to either, and the
layers behind amplify that, by how much depends on the network. So it is tried out: the program runs once more with a
little noise on what becomes integers, and each output of an engine may be some times as far off as that takes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import fx

from fxopt.compare import Difference, compare_each
from fxopt.edit import insert_before, set_operand
from fxopt.ops import DYNAMIC
from fxopt.randomness import fixed_random_state
from fxopt.sharing import buffers_restored
from fxopt.target import Target
from fxopt.verify import Reference, seeded_run

if TYPE_CHECKING:
    from fxopt.backend import Backend, Engine
    from fxopt.program import Program

__all__ = ["Expected", "computes_otherwise", "disagreement"]

_NOISE = 0.02
"""Of the step between two integers, at the most: one number in a hundred then goes to the other integer, which is what
`tests/test_integer_layers.py` allows a layer of ONNX Runtime."""
_ROUNDED = 0.5
"""The same for what reads packed weights: ONNX Runtime makes integers of it, by the row, and the program does not."""
_TIMES, _DECIBEL = 4.0, 6.0
"""By how much an engine may be further off than noise takes an output: the largest difference, and all of them. (A
spelled hardswish or SiLU gives three numbers in a hundred another integer.)"""
_LEAST_DECIBEL = 3.0
"""What an engine has to reach in any case: zeros have 0 dB."""
_LEAST_ERROR = 0.05
"""A relative error that is always allowed behind integers: noise may happen to move nothing."""
_MAKES_INTEGERS = DYNAMIC | {"quantize"}
_STEPS = 255
"""Of 8 bits, where the range is found as it runs."""


class Expected(NamedTuple):
    """What the engines of a program are held to.

    Attributes:
        reference: what the program answers.
        moved: how far noise takes each output, by case; nothing if the program has no integers.
    """

    reference: Reference
    moved: tuple[tuple[Difference, ...], ...] = ()

    @classmethod
    def of(cls, program: Program) -> Expected:
        """Runs the program on the example inputs and others, and once more with noise if it holds integers."""
        reference = Reference.of(program)
        noisy = _with_noise(program)
        if noisy is None:
            return cls(reference)
        pairs = zip(reference.cases, reference.outputs, strict=True)
        return cls(reference, tuple(tuple(compare_each(wanted, seeded_run(noisy, x))) for x, wanted in pairs))

    def objection(self, case: int, answers: Sequence[torch.Tensor], backend: Backend) -> str | None:
        """How an engine of that backend is further off than it may be; None if it is not.

        Args:
            case: which of the reference's cases it was.
            answers: of the engine.
            backend: that made it.
        """
        wanted = self.reference.outputs[case]
        for index, difference in enumerate(compare_each(wanted, answers)):
            if difference.within(max(backend.tolerance, self.reference.tolerance)):
                continue
            if difference.mismatch or not self.moved:
                return str(difference)
            moved = self.moved[case][index]
            whole = not (wanted[index].is_floating_point() or wanted[index].is_complex())
            if not _as_noise(difference, moved, whole=whole):
                return f"{difference}, and noise on the program's integers makes that {moved}"
        return None


def disagreement(program: Program, engine: Engine, backend: Backend, expected: Expected) -> str | None:
    """How an engine's answers differ from the program's by more than they may; None if they do not.

    They are compared on the example inputs, at other sizes of free axes, and on another batch size if the engine takes
    that.

    Args:
        program: what was lowered.
        engine: what came of it.
        backend: that made the engine.
        expected: of the program.

    Raises:
        BackendError: if the engine fails.
    """
    for case, inputs in enumerate(expected.reference.cases):
        if inputs is not program.example_inputs and not _takes(engine, inputs):
            continue
        with fixed_random_state(), buffers_restored(program.module):
            answers = engine(*(tensor.to(engine.device) for tensor in inputs))
        objection = expected.objection(case, answers, backend)
        if objection is not None:
            return objection
    return None


def computes_otherwise(program: Program) -> str | None:
    """Why an engine of that program answers otherwise on this machine than where it is for; None if it does not."""
    here = Target.detect()
    if program.target.device != "cpu" or not program.target.adds_products_in_32_bits or here.adds_products_in_32_bits:
        return None
    if not any(program.op(node) in _MAKES_INTEGERS for node in program.nodes):
        return None
    return f"it is for {program.target.instruction_set}, and {here.instruction_set} adds up its integers in 16 bits"


def _takes(engine: Engine, inputs: Sequence[torch.Tensor]) -> bool:
    """Whether an engine takes the sizes of these inputs, which are not those of its program's example."""
    for spec, tensor in zip(engine.inputs, inputs, strict=True):
        if not spec.takes(tensor.shape):
            return False
        for axis, size in enumerate(tensor.shape):
            low, high = engine.limits.get(spec.axis_name(axis), (size, size))
            if spec.shape[axis] is None and not low <= size <= high:
                return False
    return True


def _as_noise(difference: Difference, moved: Difference, *, whole: bool) -> bool:
    """Whether an output is about as near as noise leaves it; of whole numbers, whether as many are the same."""
    times = 0.0 if moved.mismatch else _TIMES * moved.relative
    if whole:
        return difference.within(times)
    if difference.within(_LEAST_ERROR):
        return True
    return difference.within(times) and difference.sqnr_db >= max(moved.sqnr_db - _DECIBEL, _LEAST_DECIBEL)


def _with_noise(program: Program) -> Program | None:
    """A copy of which what becomes integers is moved a little before it does; None if nothing does.

    States of recurrent layers stay as they are, and so does what only the first of their layers hands on.
    """
    noisy = program.copy()
    places = [(node, noise) for node in noisy.nodes if (noise := _noise(noisy, node))]
    for seed, (node, noise) in enumerate(places):
        arguments = noisy.call(node).arguments
        value = arguments["input"]
        moved = insert_before(noisy, node, _moved, (value, arguments.get("scale"), noise, seed))
        set_operand(noisy, [node], value, moved)
    return noisy if places else None


def _noise(program: Program, node: fx.Node) -> float:
    """How much is put on what a node reads, as a share of the step between two integers."""
    call = program.call(node)
    if call.op in _MAKES_INTEGERS:
        return _NOISE
    weight = call.arguments.get("weight")
    packed = call.op == "linear" and isinstance(weight, fx.Node) and program.op(weight) == "packed_weight"
    return _ROUNDED if packed else 0.0


def _moved(values: torch.Tensor, step: float | None, noise: float, seed: int) -> torch.Tensor:
    """Values with evenly distributed noise; the step is that of a range over all of them and zero if it is None."""
    if not values.numel():
        return values
    if step is None:
        step = float(values.amax().clamp(min=0) - values.amin().clamp(max=0)) / _STEPS
    # of its own: a model that draws random numbers must go on drawing the same ones
    generator = torch.Generator().manual_seed(seed)
    even = 2 * torch.rand(values.shape, generator=generator) - 1
    return values + (noise * step) * even.to(values.device, values.dtype)
