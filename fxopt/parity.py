"""Whether an engine answers like the program that it was made from.

Of integers, an engine need not give each the program's: what lies in the middle between two goes to either, and the
layers behind amplify that, by how much depends on the network. So it is tried out: the program runs once more with a
little noise on all that becomes integers, and an engine may be some times as far off as that takes the outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from fxopt.compare import Difference, compare
from fxopt.edit import insert_before, set_operand
from fxopt.randomness import fixed_random_state
from fxopt.sharing import buffers_restored
from fxopt.verify import Reference

if TYPE_CHECKING:
    from fxopt.backend import Backend, Engine
    from fxopt.program import Program

__all__ = ["Expected", "disagreement"]

_NOISE = 0.02
"""Of the step between two integers, at the most: one number in a hundred then goes to the other integer, which is what
`tests/test_integer_layers.py` allows a layer of ONNX Runtime."""
_TIMES, _DECIBEL = 4.0, 6.0
"""By how much an engine may be further off than noise takes the outputs: the largest difference, and all of them."""
_LEAST_OF_INTEGERS = 0.05
"""A relative error that a program of integers is always allowed: noise may happen to move nothing."""


class Expected(NamedTuple):
    """What the engines of a program are held to.

    Attributes:
        reference: what the program answers.
        tolerance: relative error that they may have.
        moved: how far noise takes a program of integers, which they may be off by too; None for other programs.
    """

    reference: Reference
    tolerance: float
    moved: Difference | None = None

    @classmethod
    def of(cls, program: Program) -> Expected:
        """Runs the program on the example inputs and others, and once more with noise if it holds integers."""
        reference = Reference.of(program)
        if "quantized" not in program.properties:
            return cls(reference, reference.tolerance)
        moved = reference.difference(_with_noise(program))
        return cls(reference, max(reference.tolerance, _LEAST_OF_INTEGERS), None if moved.mismatch else moved)

    def allows(self, difference: Difference, backend: Backend) -> bool:
        """Whether an engine of that backend may be so far off."""
        if difference.within(max(backend.tolerance, self.tolerance)):
            return True
        if self.moved is None:
            return False
        return difference.within(_TIMES * self.moved.relative) and difference.sqnr_db >= self.moved.sqnr_db - _DECIBEL


def disagreement(program: Program, engine: Engine, backend: Backend, expected: Expected) -> str | None:
    """How an engine's answers differ from the program's by more than rounding explains; None if they do not.

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
    reference = expected.reference
    for inputs, outputs in zip(reference.cases, reference.outputs, strict=True):
        if inputs is not program.example_inputs and not _takes(engine, inputs):
            continue
        with fixed_random_state(), buffers_restored(program.module):
            answers = engine(*(tensor.to(engine.device) for tensor in inputs))
        difference = compare(outputs, [answer.to(inputs[0].device) for answer in answers])
        if not expected.allows(difference, backend):
            return str(difference)
    return None


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


def _with_noise(program: Program) -> Program:
    """A copy of which all that becomes integers is moved a little before it does."""
    noisy = program.copy()
    for node in noisy.nodes:
        call = noisy.call(node)
        if call.op in ("quantize", "dynamic_linear", "dynamic_lstm"):
            value = call.arguments["input"]
            moved = insert_before(noisy, node, _moved, (value, call.arguments.get("scale")))
            set_operand(noisy, [node], value, moved)
    return noisy


def _moved(values: torch.Tensor, step: float | None) -> torch.Tensor:
    """Values with noise, evenly distributed; the step between integers is that of 8 bits over their range if None."""
    if step is None:
        step = float(values.max() - values.min()) / 255 if values.numel() else 0.0
    return values + (2 * torch.rand_like(values) - 1) * (_NOISE * step)
