"""The whole flow on one page: capture, passes, lowering, engine."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fxopt import artifact
from fxopt.backend import Backend, Engine, FixedBatchWarning
from fxopt.errors import BackendUnavailable, InputError
from fxopt.free_axes import DynamicAxes
from fxopt.frontends.capture import Frontend
from fxopt.frontends.capture import capture as _capture
from fxopt.layer_times import LayerTimes
from fxopt.lowering_checks import check_free_axes, check_parity, refuse_fake_quantization, refuse_training
from fxopt.manager import OnFailure, OnNoMatch, PassManager, Verify
from fxopt.parity import computes_otherwise
from fxopt.passes_base import Pass, Plan
from fxopt.program import Loss, Program
from fxopt.registry import make_backend
from fxopt.report import Report
from fxopt.signature import CallArguments, Signature
from fxopt.target import Target

__all__ = ["Compiled", "capture", "compile", "explain", "load", "lower", "optimize"]

_log = logging.getLogger(__name__)

Passes = str | Pass | Sequence[str | Pass]


class Compiled:
    """A compiled model: called like the model, answers in the model's own output structure.

    Made by `compile` and `load`. When `compile` was given no example inputs, the first call captures and compiles with
    the inputs of that call.
    """

    def __init__(self, finished: _Finished | None, pending: _Pending | None = None) -> None:
        self._finished = finished
        self._pending = pending
        self._lock = threading.Lock()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the engine on what the model is called with.

        Raises:
            InputError: if the inputs do not have the structure, data types or shapes that were compiled for.
        """
        finished = self._finished or self._compile_for(args, kwargs)
        return finished.signature.unflatten_outputs(finished.engine(*finished.signature.flatten_inputs(args, kwargs)))

    @property
    def report(self) -> Report:
        """What happened between the model and the engine; prints as a table."""
        return self._ready().report

    @property
    def engine(self) -> Engine:
        """The engine itself: flat tensors in, flat tensors out."""
        return self._ready().engine

    @property
    def signature(self) -> Signature:
        """How it is called."""
        return self._ready().signature

    def save(self, directory: str | Path, *, compress: bool = False) -> None:
        """Writes the engine, its manifest and the report into a folder, for `fxopt.load`.

        Args:
            directory: the folder; made, or replaced if fxopt wrote it.
            compress: whether the engine's files are compressed (xz, without loss): of a weight that is zero next to
                nothing is left. Saving takes a second or so per megabyte.

        Raises:
            ArtifactError: if the folder holds something else.
        """
        ready = self._ready()
        artifact.write(
            Path(directory),
            engine=ready.engine,
            backend=ready.backend,
            signature=ready.signature,
            report=ready.report,
            target=ready.target,
            compress=compress,
        )

    def __reduce__(self) -> str:
        raise TypeError("a compiled model is not pickled: save it with compiled.save(folder), load it with fxopt.load")

    def __repr__(self) -> str:
        if self._finished is None:
            return "<Compiled: captured at the first call>"
        return f"<Compiled({', '.join(self._finished.signature.names)}) by {self._finished.backend}>"

    def _ready(self) -> _Finished:
        if self._finished is None:
            raise InputError("not compiled yet: call it once, or pass example inputs to fxopt.compile")
        return self._finished

    def _compile_for(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Finished:
        with self._lock:
            if self._pending is not None:
                self._finished, self._pending = self._pending.finish(CallArguments(args, kwargs)), None
            return self._ready()


def compile(  # noqa: A001 (the name users know from torch)
    model: nn.Module,
    example_inputs: Any = None,
    *,
    passes: Passes = "default",
    backend: str | Backend = "onnx",
    calibration: Iterable[Any] | None = None,
    loss: Loss | None = None,
    dynamic_batch: bool = True,
    dynamic_axes: DynamicAxes | None = None,
    verify: Verify = "numerics",
    on_no_match: OnNoMatch = "warn",
    on_failure: OnFailure = "rollback",
    frontend: Frontend = "auto",
    target: Target | None = None,
) -> Compiled:
    """Compiles a model: captures it, runs the passes, and lowers the result to an engine.

    Args:
        model: the trained module. It is never changed.
        example_inputs: a tuple of positional arguments, a mapping of keyword arguments, or one tensor. None captures at
            the first call, as `torch.compile` does.
        passes: a pass, a spec string, or a sequence of these; "default" stands for the exact passes.
        backend: a backend or its spec string, such as "onnx(num_threads=2)".
        calibration: any iterable of batches; of each the first N entries are the model's N inputs.
        loss: for passes that look at its gradients: a function of the model's outputs and the rest of a calibration
            batch. None is cross-entropy for targets of integers, mean squared error for others.
        dynamic_batch: whether the engine takes any batch size.
        dynamic_axes: axes beside the batch of which it takes any size, by the name of the flat input: names by axis, as
            in {"x": {2: "height", 3: "width"}}, or the axes alone, as in {"x": (2, 3)}. Axes of one name have one size.
            What the model, the passes or the backend cannot keep free is an error.
        verify: "numerics" proves exact passes and compares the engine with the program; "structure" checks the graph
            alone.
        on_no_match: what to do when a pass that was asked for changes nothing: "warn", "error" or "ignore".
        on_failure: "rollback" leaves out and reports rewrites that fail a check; "raise" raises.
        frontend: "auto", "symbolic" or "export".
        target: where the engine will run; this machine's CPU by default.

    Returns:
        The compiled model: call it, print its `report`, `save` it.

    Raises:
        InputError: if the inputs or options do not fit, or the model takes no other size of a dynamic axis.
        CaptureError: if the model cannot be captured, or not with these axes free.
        PipelineError, PassError, VerificationError: if the passes cannot be run.
        BackendError: if lowering failed, or the engine's answers differ from the program's.
    """
    chosen = _available(backend)
    manager = PassManager(passes, verify=verify, on_no_match=on_no_match, on_failure=on_failure)
    pending = _Pending(model, manager, chosen, calibration, loss, dynamic_batch, dynamic_axes, frontend, target)
    if example_inputs is None:
        return Compiled(None, pending)
    return Compiled(pending.finish(example_inputs))


def optimize(
    model: nn.Module,
    example_inputs: Any,
    passes: Passes,
    *,
    calibration: Iterable[Any] | None = None,
    loss: Loss | None = None,
    target: Target | None = None,
    backend: str | Backend | None = None,
    dynamic_axes: DynamicAxes | None = None,
    verify: Verify = "numerics",
    on_no_match: OnNoMatch = "warn",
    on_failure: OnFailure = "rollback",
    frontend: Frontend = "auto",
) -> Program:
    """Captures a model and runs the passes, without lowering: `program.module` is an `nn.Module` that trains.

    Arguments and errors are those of `compile`, but that `backend` is asked only how fast layers are on it, by passes
    with `gate="time"`.
    """
    manager = PassManager(passes, verify=verify, on_no_match=on_no_match, on_failure=on_failure)
    program = _capture(
        model,
        example_inputs,
        frontend=frontend,
        calibration=calibration,
        loss=loss,
        target=target,
        dynamic_axes=dynamic_axes,
    )
    if backend is not None:
        _aim(program, make_backend(backend))
    return manager.run(program)


def capture(
    model: nn.Module,
    example_inputs: Any,
    *,
    dynamic_axes: DynamicAxes | None = None,
    frontend: Frontend = "auto",
) -> Program:
    """Captures a model as a `Program`, and does nothing to it. Arguments are those of `compile`.

    Raises:
        InputError: if the inputs do not fit the model, or it takes no other size of a dynamic axis.
        CaptureError: if no frontend can capture it, with the reason of each.
    """
    return _capture(model, example_inputs, frontend=frontend, dynamic_axes=dynamic_axes)


def explain(
    model: nn.Module | Program,
    example_inputs: Any = None,
    passes: Passes = "default",
    *,
    calibration: Iterable[Any] | None = None,
    loss: Loss | None = None,
    target: Target | None = None,
    backend: str | Backend | None = None,
    frontend: Frontend = "auto",
) -> list[Plan]:
    """What each pass would do and what it would leave alone, with reasons. Nothing is applied to the model or program.

    Args:
        model: the module, with its example inputs; or a captured program, without.
        example_inputs: as for `compile`.
        passes: as for `compile`.
        calibration: as for `compile`.
        loss: as for `compile`.
        target: as for `compile`.
        backend: what engine is meant, for passes with `gate="time"`.
        frontend: as for `compile`.
    """
    manager = PassManager(passes)
    if isinstance(model, Program):
        if example_inputs is not None:
            raise InputError("a program has its example inputs: write explain(program, passes=...)")
        program = model.copy()
    else:
        program = _capture(model, example_inputs, frontend=frontend, calibration=calibration, loss=loss, target=target)
    if backend is not None:
        _aim(program, make_backend(backend))
    return manager.explain(program)


def lower(
    program: Program, *, backend: str | Backend = "onnx", dynamic_batch: bool = True, verify: Verify = "numerics"
) -> Compiled:
    """Lowers a program that was optimized before: one program, as many engines as wanted.

    Args:
        program: what `optimize` or `capture` gave; left unchanged. One that `quantize` made should have been optimized
            for this backend or one with the same integers: `optimize(..., backend=...)`.
        backend: as for `compile`.
        dynamic_batch: as for `compile`.
        verify: "numerics" compares the engine with the program, "structure" does not.

    Returns:
        The compiled program: call it, print its `report`, `save` it.

    Raises:
        BackendError: if lowering failed, or the engine's answers differ from the program's.
        BackendUnavailable: if the backend cannot be used here.
    """
    chosen = _available(backend)
    if not chosen.runs_training:
        refuse_training(program, chosen)
    return Compiled(_lowered(program, chosen, dynamic_batch, verify, stacklevel=3))


def load(path: str | Path) -> Compiled:
    """Loads what `Compiled.save` wrote. Needs neither the model's class nor pickle.

    Raises:
        ArtifactError: if the folder is incomplete, altered, or not written by fxopt.
        BackendUnavailable: if its backend cannot be used here.
    """
    directory = Path(path)
    manifest = artifact.read(directory)
    backend = make_backend(manifest.backend)
    reason = backend.cannot_load()
    if reason is not None:
        raise BackendUnavailable(f"{directory} needs the backend {backend.name}: {reason}")
    with artifact.unpacked(directory, manifest) as folder:
        engine = backend.load(folder, manifest)
    return Compiled(_Finished(engine, backend, manifest.signature, manifest.report, manifest.target))


@dataclass(frozen=True)
class _Finished:
    """An engine and all that is known about it."""

    engine: Engine
    backend: Backend
    signature: Signature
    report: Report
    target: Target


@dataclass(frozen=True)
class _Pending:
    """A compilation that has everything but its inputs."""

    model: nn.Module
    manager: PassManager
    backend: Backend
    calibration: Iterable[Any] | None
    loss: Loss | None
    dynamic_batch: bool
    dynamic_axes: DynamicAxes | None
    frontend: Frontend
    target: Target | None

    def finish(self, example_inputs: Any) -> _Finished:
        """Captures, rewrites, lowers, and compares the engine with the program."""
        program = _capture(
            self.model,
            example_inputs,
            frontend=self.frontend,
            calibration=self.calibration,
            loss=self.loss,
            target=self.target,
            dynamic_axes=self.dynamic_axes,
        )
        if not self.backend.runs_training:
            refuse_training(program, self.backend)
        _aim(program, self.backend)
        return _lowered(self.manager.run(program), self.backend, self.dynamic_batch, self.manager.verify)


def _lowered(
    program: Program, backend: Backend, dynamic_batch: bool, verify: Verify, *, stacklevel: int = 4
) -> _Finished:
    """The engine of a program, compared with it. The user's call is `stacklevel` frames up, for warnings."""
    if dynamic_batch and program.fixed_batch is not None:
        batch_warning = f"the engine takes the batch size of the example inputs only: {program.fixed_batch}"
        warnings.warn(batch_warning, FixedBatchWarning, stacklevel=stacklevel)
    if not backend.runs_training:
        refuse_fake_quantization(program, backend)
    _log.info("lowering by %s", backend)
    chosen = backend if verify == "numerics" else backend.unverified()
    engine = chosen.lower(program, dynamic_batch=dynamic_batch)
    check_free_axes(program, engine, backend)
    report = program.report.copy()
    report.notes += [str(note) for note in engine.info().get("notes", ())]
    if verify == "numerics":
        reason = engine.cannot_run() or computes_otherwise(program)
        if reason is None:
            check_parity(program, engine, backend)
        else:
            report.notes.append(f"the engine was not compared with the program: {reason}")
    return _Finished(engine, backend, program.signature, report, program.target)


def _available(wanted: str | Backend) -> Backend:
    backend = make_backend(wanted)
    reason = backend.unavailable()
    if reason is not None:
        raise BackendUnavailable(f"{backend.name}: {reason}")
    return backend


def _aim(program: Program, backend: Backend) -> None:
    """Tells a program what it is for."""
    program.layer_times = LayerTimes(backend, program.target)
    program.scheme = backend.scheme(program.target)
