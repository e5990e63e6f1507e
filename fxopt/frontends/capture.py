"""Capture: `nn.Module` -> `Program`, by the frontend asked for or the first one that gives the model's own answers."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import fx, nn

from fxopt.compare import compare, rounding_tolerance
from fxopt.errors import CaptureError, InputError, first_line
from fxopt.free_axes import DynamicAxes
from fxopt.frontends.captured import Captured
from fxopt.frontends.subject import Case, Subject, checked
from fxopt.program import Loss, Program
from fxopt.randomness import fixed_random_state
from fxopt.sharing import buffers_restored, share_module
from fxopt.target import Target

__all__ = ["Frontend", "StateWarning", "capture"]

_log = logging.getLogger(__name__)

Frontend = Literal["auto", "symbolic", "export"]


class StateWarning(UserWarning):
    """The model writes into a buffer whenever it is called, and what is captured does not."""


def capture(
    model: nn.Module,
    example_inputs: Any,
    *,
    frontend: Frontend = "auto",
    calibration: Iterable[Any] | None = None,
    loss: Loss | None = None,
    target: Target | None = None,
    dynamic_axes: DynamicAxes | None = None,
) -> Program:
    """Captures a model as a `Program`. The model itself is neither changed nor run: a copy is.

    Args:
        model: the module to capture, in the mode (training or evaluation), dtype and device that it is in.
        example_inputs: a tuple of positional arguments, a mapping of keyword arguments, or one tensor.
        frontend: "symbolic" (torch.fx), "export" (torch.export), or "auto": symbolic, and export where that fails,
            answers differently, or leaves calls opaque.
        calibration: any iterable of batches, for passes that look at data.
        loss: for passes that look at its gradients, a function of the model's outputs and a batch's targets; see
            `Program.loss_of`.
        target: where the engine will run; this machine's CPU by default.
        dynamic_axes: axes beside the batch that are to have any size, by the name of the flat input: names by axis, as
            in {"x": {2: "height", 3: "width"}}, or the axes alone. Axes of one name have one size.

    Raises:
        InputError: if the inputs do not fit the model, or it takes no other size of an axis that is to be free.
        CaptureError: if no frontend can capture it, or none keeps these axes free, with the reason of each.
    """
    if frontend not in ("auto", "symbolic", "export"):
        raise InputError(f'frontend must be "auto", "symbolic" or "export", not {frontend!r}')
    if calibration is not None and not isinstance(calibration, Iterable):
        raise InputError(f"calibration must be an iterable of batches, not {type(calibration).__name__}")
    if loss is not None and not callable(loss):
        raise InputError(f"loss must be a function of the outputs and the targets, not {type(loss).__name__}")
    _log.info("capturing %s", type(model).__name__)
    if not isinstance(target, Target | None):
        raise InputError(f"target must be a fxopt.Target, such as Target.detect(), not {target!r}")
    with torch.inference_mode(False), fixed_random_state(), buffers_restored(checked(model)):
        subject = Subject.of(model, example_inputs, {} if dynamic_axes is None else dynamic_axes)
        program = _capture(model, subject, frontend, calibration, target)
    program.loss = loss
    return program


def _capture(
    model: nn.Module, subject: Subject, frontend: Frontend, calibration: Iterable[Any] | None, target: Target | None
) -> Program:
    reasons: list[str] = []
    opaque_choice: Program | None = None
    names: list[str] = ["symbolic", "export"] if frontend == "auto" else [frontend]
    while names:
        name = names.pop(0)
        try:
            captured = _trace(name, subject)
            program = _program(name, captured, subject, calibration, target)
            _check_private(program, model)
            _check_answers(program, subject)
            _check_edges(program, subject, captured)
        except CaptureError as error:
            reasons.append(f"{name}: {error}")
            _log.info("capture by %s failed: %s", name, error)
            if name == "export" and subject.batch is not None:
                # what depends on the batch size in a way that a free one cannot express holds for the example's
                fixed = f"the batch size is {subject.batch.size} as in the example: {error}"
                subject = subject.with_fixed_batch(fixed)
                names.insert(0, name)
            continue
        program.report.notes += [f"captured by {name}: {'; '.join(reasons)}"] if reasons else []
        program.report.notes += [
            note
            for note in (captured.note, captured.limits, subject.fixed_batch, subject.state, subject.padding)
            if note
        ]
        if subject.state is not None:
            warnings.warn(subject.state, StateWarning, stacklevel=4)
        opaque = _opaque(program)
        if frontend == "auto" and name == "symbolic" and opaque:
            opaque_choice = program
            reasons.append(f"symbolic leaves {', '.join(opaque)} opaque")
            continue
        return program
    if opaque_choice is not None:
        opaque_choice.report.notes.append(f"captured by symbolic with opaque calls: {'; '.join(reasons)}")
        return opaque_choice
    raise CaptureError("the model could not be captured. " + "; ".join(dict.fromkeys(reasons)))


def _trace(name: str, subject: Subject) -> Captured:
    from fxopt.frontends.functionalize import functionalize
    from fxopt.frontends.raising import raise_to_modules
    from fxopt.frontends.standardize import standardize

    model = standardize(share_module(subject.model))
    if name == "export":
        from fxopt.frontends.export import trace_export

        captured = trace_export(
            model, subject.signature, subject.inputs, batch=subject.batch, free_axes=subject.free_axes
        )
    else:
        from fxopt.frontends.symbolic import trace_symbolic

        captured = trace_symbolic(model, subject.signature)
        functionalize(captured.module)
        raise_to_modules(captured.module, training=model.training, original=model)
    return captured


def _program(
    name: str, captured: Captured, subject: Subject, calibration: Iterable[Any] | None, target: Target | None
) -> Program:
    signature = subject.signature.with_outputs(captured.outputs)
    _check_outputs(captured, subject)
    program = Program(
        captured.module,
        signature,
        subject.inputs,
        frontend=name,
        batch=subject.batch if captured.dynamic_batch else None,
        free_axes=subject.free_axes,
        calibration=calibration,
        target=target,
    )
    program.fixed_batch = subject.fixed_batch if captured.dynamic_batch else captured.note
    return program


def _check_outputs(captured: Captured, subject: Subject) -> None:
    """The captured outputs must be tensors, nested as the model nests them, with the same constants between them."""
    output = next(node for node in reversed(captured.module.graph.nodes) if node.op == "output")
    if not isinstance(output.args[0], tuple | list) or not all(isinstance(item, fx.Node) for item in output.args[0]):
        raise CaptureError(f"the outputs are not all tensors computed from the inputs: {output.args[0]!r}")
    if captured.outputs.to_json() != subject.outputs.to_json():
        raise CaptureError("among the outputs is a number that depends on the sizes or values of the inputs")


def _check_private(program: Program, model: nn.Module) -> None:
    """Nothing in the program may be the caller's: a replaced `forward` or a hook can reach around the copy."""
    own = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers()) if tensor.numel()}
    for name, tensor in (*program.module.named_parameters(), *program.module.named_buffers()):
        if tensor.numel() and tensor.data_ptr() in own:
            raise CaptureError(
                f"{name} of the program is your model's own tensor: a replaced forward, or a hook, refers to the model "
                "itself and not to its argument"
            )


def _check_answers(program: Program, subject: Subject) -> None:
    """The captured graph must answer like the model: the example, another batch size, another size of free axes."""
    for case in subject.cases:
        if program.batch is not None or not case.of_batch:
            _check_case(program, subject, case)


def _check_edges(program: Program, subject: Subject, captured: Captured) -> None:
    """Where what was traced may not hold any more, the model must refuse the size, or the graph answer like it."""
    for name, size in captured.edges:
        case = subject.case_at(name, size)
        if case is not None:
            _check_case(program, subject, case)


def _check_case(program: Program, subject: Subject, case: Case) -> None:
    from fxopt.verify import seeded_run

    try:
        outputs = seeded_run(program, case.inputs)
    except Exception as error:  # burnt-in sizes make operators fail in their own ways
        raise CaptureError(f"the captured graph fails on {case.what}: {first_line(error)}") from error
    difference = compare(case.answers, outputs)
    tolerance = rounding_tolerance((*subject.model.parameters(), *case.answers)) / 10
    if not difference.within(tolerance):
        raise CaptureError(f"the captured graph answers differently on {case.what}: {difference}")


def _opaque(program: Program) -> list[str]:
    from fxopt.frontends.symbolic import opaque_calls

    return opaque_calls(program.module)
