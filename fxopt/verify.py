"""The proofs: that a program is well formed after a pass, and that an exact pass changed no output."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from fxopt.analysis.shapes import TensorSpec, record_shapes, shapes, specs_in
from fxopt.compare import Difference, compare, incomparable, rounding_tolerance, worst
from fxopt.errors import first_line
from fxopt.ops import cast
from fxopt.program import Program
from fxopt.randomness import fixed_random_state

__all__ = ["Reference", "check_shapes", "check_structure", "in_double", "other_batch_size", "seeded_run"]


class Reference(NamedTuple):
    """What a program answers on the inputs that it is judged by.

    Attributes:
        cases: flat inputs: the example's own, these at another size of free axes, and fresh random ones at another
            batch size.
        outputs: flat outputs for each case.
        tolerance: relative error that rounding may cause.
        notes: what could not be tried, and why.
    """

    cases: tuple[tuple[torch.Tensor, ...], ...]
    outputs: tuple[tuple[torch.Tensor, ...], ...]
    tolerance: float
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, program: Program) -> Reference:
        """Runs the program on the example inputs, at another size of free axes, and on random inputs."""
        fresh = program.inputs_with_batch(other_batch_size(program), seed=1)
        cases = [program.example_inputs]
        if program.free_axes:
            cases.append(program.inputs_at_other_sizes())
        outputs = [seeded_run(program, inputs) for inputs in cases]
        # by every value that the run gave: a product of float16 values may need no float16 parameter
        values = specs_in(tuple(program.analysis(shapes).values()))
        tolerance = rounding_tolerance((*program.module.parameters(), *values))
        try:
            return cls((*cases, fresh), (*outputs, seeded_run(program, fresh)), tolerance)
        except Exception as error:  # noqa: BLE001 (a model may refuse values in any way of its own: the reason is kept)
            note = f"random inputs were not tried: the model refuses them ({first_line(error)})"
            return cls(tuple(cases), tuple(outputs), tolerance, (note,))

    def after(self, program: Program) -> Reference:
        """The reference for the next pass: what `program` answers on the same inputs."""
        cases = (program.example_inputs, *map(program.in_io_dtype, self.cases[1:]))
        return self._replace(cases=cases, outputs=tuple(seeded_run(program, inputs) for inputs in cases))

    def difference(self, program: Program) -> Difference:
        """How far the program's outputs are from these, the worst over all cases."""
        return worst(self._differences(program))

    def loss(self, program: Program) -> Difference:
        """How far its outputs on the example inputs are from these; what cannot be compared counts in every case.

        What is lost on random numbers would say little of a pass that looks at data.
        """
        found = self._differences(program)
        return next((item for item in found if item.mismatch), found[0])

    def _differences(self, program: Program) -> list[Difference]:
        found = []
        for inputs, expected in zip(self.cases, self.outputs, strict=True):
            try:
                outputs = seeded_run(program, inputs if program.io_dtype is None else program.in_io_dtype(inputs))
            except Exception as error:  # noqa: BLE001 (operators refuse operands in their own ways: the reason is kept)
                return [incomparable(f"an operator refuses its operands: {first_line(error)}")]
            found.append(compare(program.in_io_dtype(expected), outputs))
        return found


def other_batch_size(program: Program) -> int | None:
    """A batch size other than the example's, larger where a sample holds few numbers; None if the batch is fixed."""
    if program.batch is None:
        return None
    numbers = sum(program.example_inputs[index][0].numel() for index in program.batch.inputs)
    size = min(8, max(2, 256 // max(1, numbers)))
    return size if size != program.batch.size else size + 1


def seeded_run(program: Program, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Runs the program with a fixed random state, so that two runs in training mode can be compared."""
    with fixed_random_state():
        return record_shapes(program) if inputs is program.example_inputs else program.run(*inputs)


def check_structure(before: Program, after: Program) -> str | None:
    """What is malformed in `after`, a rewritten `before`; None if nothing is.

    Checked: the graph's own rules, that inputs are unchanged, and that no new tensor holds NaN or infinity.
    """
    return next(_malformed(before, after), None)


def check_shapes(before: Program, after: Program) -> str | None:
    """Why `after` does not give outputs of the same shapes and types as `before`; None if it does."""
    try:
        known = after.analysis(shapes)
    except Exception as error:  # noqa: BLE001 (operators refuse operands in their own ways: the reason is kept)
        return f"an operator refuses its operands: {first_line(error)}"
    expected = _retyped(before.analysis(shapes)[_output(before)], after.io_dtype)
    if known[_output(after)] != expected:
        return f"the outputs became {known[_output(after)]}, they were {expected}"
    return None


def _retyped(spec: Any, dtype: torch.dtype | None) -> Any:
    """The outputs' specs with `dtype` in place of float32, as `Program.io_dtype` says."""
    if isinstance(spec, TensorSpec):
        return spec._replace(dtype=dtype) if dtype is not None and spec.dtype is torch.float32 else spec
    return tuple(_retyped(item, dtype) for item in spec) if isinstance(spec, tuple) else spec


def _malformed(before: Program, after: Program) -> Iterator[str]:
    try:
        after.graph.lint()
        # with the modules at hand, lint checks that every target exists
        after.module.graph.lint()
    except (AttributeError, RuntimeError) as error:
        yield f"the graph is not well formed: {error}"
        return
    if _inputs(after) != _inputs(before):
        yield f"the inputs became {_inputs(after)}, they were {_inputs(before)}"
    old = {id(tensor) for tensor in (*before.module.parameters(), *before.module.buffers())}
    for name, tensor in (*after.module.named_parameters(), *after.module.named_buffers()):
        if id(tensor) not in old and tensor.is_floating_point() and not _is_finite(tensor):
            yield f"{name} holds NaN or infinity"


def _is_finite(tensor: torch.Tensor) -> bool:
    # by the extremes, which are NaN if anything is: isfinite takes more than the tensor's memory besides
    return not tensor.numel() or all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor))


def in_double(program: Program) -> Program:
    """A copy in float64: there an exact rewrite is exact to 1e-9, and what float32 showed besides was rounding."""
    module = copy.deepcopy(program.module).double()
    for node in module.graph.find_nodes(op="call_function", target=cast):
        if node.args[1].is_floating_point:
            node.args = (node.args[0], torch.float64)
    inputs = tuple(item.double() if item.is_floating_point() else item for item in program.example_inputs)
    double = Program(
        module,
        program.signature,
        inputs,
        frontend=program.frontend,
        batch=program.batch,
        free_axes=program.free_axes,
        target=program.target,
    )
    double.properties = program.properties
    return double


def _inputs(program: Program) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "placeholder"]


def _output(program: Program) -> str:
    return program.nodes[-1].name
