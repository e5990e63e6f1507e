"""Capture: `nn.Module` -> `Program`, by the frontend asked for or the first one that gives the model's own answers."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import torch
from torch import fx, nn

from fxopt.compare import compare, rounding_tolerance
from fxopt.errors import CaptureError, InputError, first_line
from fxopt.frontends.captured import Captured
from fxopt.program import BatchAxis, Loss, Program
from fxopt.randomness import fixed_random_state
from fxopt.sharing import buffers_restored, share_module
from fxopt.signature import Signature
from fxopt.structure import Structure, flatten
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

    Raises:
        InputError: if the inputs do not fit the model.
        CaptureError: if no frontend can capture it, with the reason of each.
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
    with torch.inference_mode(False), fixed_random_state(), buffers_restored(_checked(model)):
        program = _capture(model, example_inputs, frontend, calibration, target)
    program.loss = loss
    return program


def _capture(
    model: nn.Module, example_inputs: Any, frontend: Frontend, calibration: Iterable[Any] | None, target: Target | None
) -> Program:
    subject = _Subject.of(model, example_inputs)
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
        except CaptureError as error:
            reasons.append(f"{name}: {error}")
            _log.info("capture by %s failed: %s", name, error)
            if name == "export" and subject.batch is not None:
                # what depends on the batch size in a way that a free one cannot express holds for the example's
                fixed = f"the batch size is {subject.batch.size} as in the example: {error}"
                subject = subject._replace(batch=None, cases=subject.cases[:1], fixed_batch=fixed)
                names.insert(0, name)
            continue
        program.report.notes += [f"captured by {name}: {'; '.join(reasons)}"] if reasons else []
        program.report.notes += [note for note in (captured.note, subject.fixed_batch, subject.state) if note]
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


class _Subject(NamedTuple):
    """A private copy of the model, how it is called, and what it answers."""

    model: nn.Module
    signature: Signature
    outputs: Structure
    inputs: tuple[torch.Tensor, ...]
    batch: BatchAxis | None
    cases: list[tuple[tuple[torch.Tensor, ...], list[torch.Tensor]]]
    fixed_batch: str | None
    state: str | None

    @classmethod
    def of(cls, model: nn.Module, example_inputs: Any) -> _Subject:
        private = _private_copy(model)
        signature, inputs = Signature.of(private, example_inputs)
        _check_devices(private, inputs)
        # a tensor of inference mode cannot take part in an export: what is no view of it can
        inputs = tuple(tensor.clone() if tensor.is_inference() else tensor.detach() for tensor in inputs)
        if next((tensor.shape[0] for tensor in inputs if tensor.ndim), 1) == 0:
            raise InputError("the example inputs hold no sample, so nothing could be checked: pass at least one")
        try:
            answers, outputs, written = _answers(private, signature, inputs)
        except InputError:
            raise
        except Exception as error:  # the model's own code refuses the inputs in its own way
            raise InputError(f"the model fails on the example inputs: {type(error).__name__}: {error}") from error
        if not answers:
            raise InputError("the model returns no tensor: there is nothing to compile")
        cases = [(inputs, answers)]
        batch = _guess_batch(inputs)
        fixed_batch = None
        if batch is not None:
            other = 3 if batch.size == 2 else 2
            resized = tuple(_resize(item, other) if at in batch.inputs else item for at, item in enumerate(inputs))
            try:
                cases.append((resized, _answers(private, signature, resized)[0]))
            except Exception as error:  # noqa: BLE001 (a model may refuse in any way; the reason is kept)
                fixed_batch = f"the model takes a batch of {batch.size} and fails on {other} ({first_line(error)})"
                batch = None
        state = _state(private, written)
        return cls(private, signature, outputs, inputs, batch, cases, fixed_batch, state)


def _trace(name: str, subject: _Subject) -> Captured:
    from fxopt.frontends.functionalize import functionalize
    from fxopt.frontends.raising import raise_to_modules
    from fxopt.frontends.standardize import standardize

    model = standardize(share_module(subject.model))
    if name == "export":
        from fxopt.frontends.export import trace_export

        captured = trace_export(model, subject.signature, subject.inputs, batch=subject.batch)
    else:
        from fxopt.frontends.symbolic import trace_symbolic

        captured = trace_symbolic(model, subject.signature)
        functionalize(captured.module)
        raise_to_modules(captured.module, training=model.training, original=model)
    return captured


def _program(
    name: str, captured: Captured, subject: _Subject, calibration: Iterable[Any] | None, target: Target | None
) -> Program:
    signature = subject.signature.with_outputs(captured.outputs)
    _check_outputs(captured, subject)
    program = Program(
        captured.module,
        signature,
        subject.inputs,
        frontend=name,
        batch=subject.batch if captured.dynamic_batch else None,
        calibration=calibration,
        target=target,
    )
    program.fixed_batch = subject.fixed_batch if captured.dynamic_batch else captured.note
    return program


def _check_outputs(captured: Captured, subject: _Subject) -> None:
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


def _check_answers(program: Program, subject: _Subject) -> None:
    """The captured graph must answer like the model, on the example inputs and on another batch size."""
    from fxopt.verify import seeded_run

    cases = subject.cases if program.batch is not None else subject.cases[:1]
    for inputs, expected in cases:
        try:
            outputs = seeded_run(program, inputs)
        except Exception as error:  # burnt-in sizes make operators fail in their own ways
            raise CaptureError(
                f"the captured graph fails on a batch of {_batch_size(inputs)}: {first_line(error)}"
            ) from error
        difference = compare(expected, outputs)
        tolerance = rounding_tolerance((*subject.model.parameters(), *expected)) / 10
        if not difference.within(tolerance):
            raise CaptureError(
                f"the captured graph answers differently on a batch of {_batch_size(inputs)}: {difference}"
            )


def _opaque(program: Program) -> list[str]:
    from fxopt.frontends.symbolic import opaque_calls

    return opaque_calls(program.module)


def _checked(model: nn.Module) -> nn.Module:
    """The module that is meant: what `torch.compile` and data parallelism wrap is looked into.

    Raises:
        InputError: if it is no module, or not initialised.
        CaptureError: if it holds no Python code.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError("a TorchScript module holds no Python code to trace: capture the nn.Module it was made from")
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be an nn.Module, not {type(model).__name__}")
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        model = model.module
    uninitialised = (nn.parameter.UninitializedParameter, nn.parameter.UninitializedBuffer)
    tensors = (*model.named_parameters(), *model.named_buffers())
    lazy = next((name for name, item in tensors if isinstance(item, uninitialised)), None)
    if lazy is not None:
        raise InputError(f"{lazy} is not initialised yet: call the model once, then capture it")
    empty = next((name for name, item in tensors if item.is_meta), None)
    if empty is not None:
        raise InputError(f"{empty} is on the meta device, where it has no values: load the model's weights first")
    return model


def _private_copy(model: nn.Module) -> nn.Module:
    model = _checked(model)
    # what a hook computed from parameters (weight_norm of old) is no leaf: deepcopy refuses it, the hook makes it anew
    attributes = [value for module in model.modules() for value in vars(module).values()]
    computed = [value for value in attributes if isinstance(value, torch.Tensor) and value.grad_fn is not None]
    try:
        return copy.deepcopy(model, {id(value): value.detach().clone() for value in computed})
    except Exception as error:  # what a model holds may refuse in any way: the reason is kept
        raise CaptureError(f"the model cannot be copied, and fxopt never works on yours: {error}") from error


def _check_devices(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    for tensor in inputs:
        if devices and tensor.ndim and tensor.device not in devices:
            held = ", ".join(sorted(map(str, devices)))
            raise InputError(f"an example input is on {tensor.device}, the model on {held}: move one to the other")


def _state(model: nn.Module, written: list[str]) -> str | None:
    """What is worth knowing about buffers that modules in evaluation mode write; in training many do, and may."""
    modules = dict(model.named_modules())
    kept = [name for name in written if not modules[name.rpartition(".")[0]].training]
    return f"the model keeps state in {', '.join(kept)}: an engine answers every call like the first" if kept else None


def _answers(
    model: nn.Module, signature: Signature, inputs: tuple[torch.Tensor, ...]
) -> tuple[list[torch.Tensor], Structure, list[str]]:
    """The model's flat outputs, their structure, and the buffers that it wrote, which is undone.

    The run starts from a fixed random state.
    """
    args, kwargs = signature.call_arguments([tensor.clone() for tensor in inputs])
    # attributes that the code assigns stay on the shared copy, buffers that it writes into are put back
    with torch.no_grad(), fixed_random_state(), buffers_restored(model) as written:
        answers, outputs = flatten(share_module(model)(*args, **kwargs))
    return answers, outputs, written


def _guess_batch(inputs: tuple[torch.Tensor, ...]) -> BatchAxis | None:
    """Axis 0 of the first input that has one, and of all inputs that agree with it in size."""
    size = next((tensor.shape[0] for tensor in inputs if tensor.ndim), 0)
    indices = tuple(index for index, tensor in enumerate(inputs) if tensor.ndim and tensor.shape[0] == size)
    return BatchAxis(indices, size) if size else None


def _resize(tensor: torch.Tensor, size: int) -> torch.Tensor:
    """The first `size` entries, repeated as needed, in another order: no answer may hang on a place."""
    picks = torch.arange(size, device=tensor.device) % tensor.shape[0]
    return tensor[picks.flip(0)]


def _batch_size(inputs: tuple[torch.Tensor, ...]) -> str:
    return str(next((tensor.shape[0] for tensor in inputs if tensor.ndim), "no axis"))
