"""Whether an engine answers like the program that it was made from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fxopt.compare import compare
from fxopt.randomness import fixed_random_state
from fxopt.sharing import buffers_restored

if TYPE_CHECKING:
    import torch

    from fxopt.backend import Backend, Engine
    from fxopt.program import Program
    from fxopt.verify import Reference

__all__ = ["disagreement"]

_QUANTIZED_TOLERANCE = 0.2
"""A number in the middle between two integers goes to either in an engine, which the layers behind amplify: measured on
EfficientNet-Lite0, whose outputs are off by as much as 0.08 for being quantized, 0.02."""


def disagreement(program: Program, engine: Engine, backend: Backend, reference: Reference) -> str | None:
    """How an engine's answers differ from the program's by more than rounding explains; None if they do not.

    They are compared on the example inputs, at other sizes of free axes, and on another batch size if the engine takes
    that.

    Args:
        program: what was lowered.
        engine: what came of it.
        backend: that made the engine.
        reference: what the program answers.

    Raises:
        BackendError: if the engine fails.
    """
    steps = _QUANTIZED_TOLERANCE if "quantized" in program.properties else 0.0
    for inputs, expected in zip(reference.cases, reference.outputs, strict=True):
        if inputs is not program.example_inputs and not _takes(engine, inputs):
            continue
        with fixed_random_state(), buffers_restored(program.module):
            answers = engine(*(tensor.to(engine.device) for tensor in inputs))
        difference = compare(expected, [answer.to(inputs[0].device) for answer in answers])
        if not difference.within(max(backend.tolerance, reference.tolerance, steps)):
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
