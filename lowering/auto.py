"""The backend `auto`: every backend that can be used here, measured side by side; the fastest that answers right stays.

All are lowered from one program, compared with it, and take turns on the example inputs. The engine is that of the
backend that is kept, and is saved and loaded by it. What the others took, or why they are out, is in the report.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch

from fxopt.analysis.measurements import measured
from fxopt.backend import Backend, Engine, FixedBatchWarning, tensor_device
from fxopt.errors import ArtifactError, BackendError, BackendUnavailable, FxoptError, first_line
from fxopt.integer_scheme import Scheme
from fxopt.options import check_flag
from fxopt.parity import Expected, computes_otherwise, disagreement
from fxopt.progress import progress
from fxopt.registry import backends, make_backend
from fxopt.timing import Timing, measure, whole_call

if TYPE_CHECKING:
    from fxopt.artifact import Manifest
    from fxopt.program import Program
    from fxopt.target import Target

__all__ = ["AutoBackend"]

_log = logging.getLogger(__name__)

_KEPT = "kept"
_WRONG = "it answers wrongly"


@dataclass(frozen=True, kw_only=True)
class AutoBackend(Backend):
    """Measures every backend that can be used here, and keeps the fastest that answers right.

    Attributes:
        candidates: spec strings of the backends to try, such as ("onnx(num_threads=1)", "openvino"); None: all that are
            registered.
        rounds: of the measurement; in each every engine runs once.
        verify: whether engines are compared with the program; those that answer wrongly are out.
    """

    name: ClassVar[str] = "auto"
    # each engine was held to the tolerance of its own backend by then
    tolerance: ClassVar[float] = 1e-1

    candidates: tuple[str, ...] | None = None
    rounds: int = 30
    verify: bool = True

    def __post_init__(self) -> None:
        # a spec string may give values of any type
        wanted: object = self.candidates
        if isinstance(wanted, str):
            raise ValueError(f"candidates must be a tuple of specs: write ({wanted!r},) for this one alone")
        if wanted is not None and not (isinstance(wanted, tuple) and all(type(item) is str for item in wanted)):
            raise ValueError(f"candidates must be a tuple of specs, or None, not {wanted!r}")
        if self.candidates is not None:
            if not self.candidates:
                raise ValueError("candidates must name at least one backend, or be None for all")
            for spec in self.candidates:
                if make_backend(spec).name == self.name:
                    raise ValueError("auto cannot be a candidate of its own")
        check_flag("verify", self.verify)
        if type(self.rounds) is not int or self.rounds < 1:
            raise ValueError(f"rounds must be an integer of at least 1, not {self.rounds!r}")

    def unavailable(self) -> str | None:
        reasons = {backend.name: backend.unavailable() for backend in self._backends()}
        if None in reasons.values():
            return None
        return "none of its backends can be used: " + "; ".join(f"{name}: {why}" for name, why in reasons.items())

    def scheme(self, target: Target) -> Scheme:
        """The integers that suit the target, with weights that fit all of its backends."""
        usual = Scheme.of(target)
        found = [backend.scheme(target) for backend in self._backends() if _why_out(backend, target) is None]
        if len(set(found)) == 1:
            return found[0]
        pairs = {scheme.pairs for scheme in found if scheme.pairs is not None}
        return usual._replace(
            pairs="either" if len(pairs) > 1 else next(iter(pairs), usual.pairs),
            integer_biases=all(scheme.integer_biases for scheme in found),
        )

    def lower(self, program: Program, *, dynamic_batch: bool) -> Engine:
        trials: list[_Trial] = []
        # `compile` asks for the same
        expected = measured(program, Expected.of) if self.verify and computes_otherwise(program) is None else None
        chosen = self._backends()
        with progress("lowering to", len(chosen), "backends") as advance:
            for backend in chosen:
                _log.info("lowering by %s", backend)
                trials.append(_tried(backend, program, expected, dynamic_batch=dynamic_batch))
                advance(1)
        trials = _with_free_batch(trials)
        runs = {str(trial.backend): trial.engine for trial in trials if trial.engine is not None}
        if not runs:
            reasons = "; ".join(f"{trial.backend}: {trial.reason}" for trial in trials)
            wrong = any(trial.reason is not None and trial.reason.startswith(_WRONG) for trial in trials)
            advice = '. verify="structure" takes engines that answer otherwise, as random numbers make them do'
            raise BackendError(f"no backend gives an engine. {reasons}{advice if wrong else ''}")
        _log.info("measuring %s", ", ".join(runs))
        calls = {name: whole_call(engine, program.example_inputs) for name, engine in runs.items()}
        timings = measure(calls, rounds=self.rounds, warmup=3)
        fastest = min(timings, key=lambda name: timings[name].median)
        table = [_row(trial, timings.get(str(trial.backend))) for trial in trials]
        return _KeptEngine(runs[fastest], fastest, table)

    def unverified(self) -> Backend:
        return replace(self, verify=False)

    def load(self, directory: Path, manifest: Manifest) -> Engine:
        kept, table = manifest.info.get(_KEPT), manifest.info.get("candidates", [])
        if not isinstance(kept, str):
            raise ArtifactError(f"{directory} does not say which backend made its engine: save it again")
        backend = make_backend(kept)
        reason = backend.cannot_load()
        if reason is not None:
            raise BackendUnavailable(f"{directory} needs the backend {backend.name}: {reason}")
        return _KeptEngine(backend.load(directory, manifest), kept, table)

    def _backends(self) -> list[Backend]:
        if self.candidates is not None:
            return [make_backend(spec) for spec in self.candidates]
        return [kind() for name, kind in sorted(backends().items()) if name != self.name]


class _Trial(NamedTuple):
    """What came of a backend.

    Attributes:
        engine: None if it is out.
        reason: why it is out.
    """

    backend: Backend
    engine: Engine | None
    reason: str | None


class _KeptEngine(Engine):
    """The engine of another backend, which knows what it was chosen from."""

    def __init__(self, engine: Engine, spec: str, table: Sequence[Mapping[str, Any]]) -> None:
        self.inputs = engine.inputs
        self.limits = engine.limits
        self._engine = engine
        self._spec = spec
        self._table = list(table)

    @property
    def device(self) -> torch.device:
        return self._engine.device

    def cannot_run(self) -> str | None:
        return self._engine.cannot_run()

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self._engine(*inputs)

    def save(self, directory: Path) -> None:
        self._engine.save(directory)

    def layers(self) -> list[dict[str, str]]:
        return self._engine.layers()

    def info(self) -> Mapping[str, Any]:
        found = dict(self._engine.info())
        lines = [note for note in found.get("notes", ()) if not str(note).startswith("auto")]
        return {
            **found,
            "notes": [*lines, f"auto keeps {self._spec}", *(_line(row) for row in self._table)],
            _KEPT: self._spec,
            "candidates": self._table,
        }


def _why_out(backend: Backend, target: Target) -> str | None:
    """Why a backend is not even tried."""
    reason, device = backend.unavailable(), backend.device(target)
    if reason is None and device != tensor_device(target):
        return f"its engines run on {device}, and the target is {target.device}"
    return reason


def _tried(backend: Backend, program: Program, expected: Expected | None, *, dynamic_batch: bool) -> _Trial:
    reason = _why_out(backend, program.target)
    if reason is not None:
        return _Trial(backend, None, reason)
    try:
        with warnings.catch_warnings():
            # whether a fixed batch matters is known once all are there
            warnings.simplefilter("ignore", FixedBatchWarning)
            engine = backend.lower(program, dynamic_batch=dynamic_batch)
        reason = engine.cannot_run()
        if reason is not None:
            return _Trial(backend, None, reason)
        reason = None if expected is None else disagreement(program, engine, backend, expected)
    except FxoptError as error:
        return _Trial(backend, None, first_line(error))
    return _Trial(backend, engine, None) if reason is None else _Trial(backend, None, f"{_WRONG}: {reason}")


def _with_free_batch(trials: list[_Trial]) -> list[_Trial]:
    """Without the engines that have a fixed batch, if others have none."""

    def fixed(trial: _Trial) -> bool:
        return trial.engine is not None and not trial.engine.dynamic_batch

    if all(trial.engine is None or fixed(trial) for trial in trials):
        return trials
    return [_Trial(trial.backend, None, "its batch is fixed") if fixed(trial) else trial for trial in trials]


def _row(trial: _Trial, timing: Timing | None) -> dict[str, Any]:
    return {
        "backend": str(trial.backend),
        "milliseconds": None if timing is None else timing.milliseconds(),
        "reason": trial.reason,
    }


def _line(row: Mapping[str, Any]) -> str:
    times = row["milliseconds"]
    if times is None:
        return f"auto: {row['backend']} is out: {row['reason']}"
    return f"auto: {row['backend']} takes {times['median']:.2f} ms [{times['low']:.2f}, {times['high']:.2f}]"
