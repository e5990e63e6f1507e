"""What is done with one model: build, capture, fold_batch_norm, the default pipeline, the engine; what is measured."""

from __future__ import annotations

import math
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from benchmarks.batch_norms import batch_norms, foldable
from benchmarks.coverage.numerics import (
    OutputMismatchError,
    double,
    leaves,
    random_inputs,
    randomise,
    relative_error,
    seed,
)
from benchmarks.coverage.row import BARS, EXACT_FLOAT64, NOISE_FACTOR
from benchmarks.suites import Suite

if TYPE_CHECKING:
    from fxopt.program import Program
    from fxopt.report import PassReport

BATCHES = (1, 2)

Caller = Callable[..., Any]


class Stages:
    """One model on its way; each method is a stage that builds on those before and returns what it measured."""

    def __init__(self, name: str, suite: Suite) -> None:
        self._name = name
        self._suite = suite
        self._model: nn.Module
        self._program: Program
        self._optimized: Program
        self._inputs: dict[int, tuple[Tensor, ...]] = {}
        self._references: dict[int, Any] = {}
        self._references64: dict[int, Any] = {}

    def build(self) -> Mapping[str, Any]:
        """The model with random weights and statistics, its inputs, and what it answers."""
        case = self._suite.build(self._name)
        self._model = case.model.eval()
        generator = torch.Generator().manual_seed(seed(self._name))
        randomise(self._model, generator)
        for batch in BATCHES:
            self._inputs[batch] = random_inputs(case.shapes, batch, generator)
            self._references[batch] = _call(self._model, self._inputs[batch])
        outputs = leaves(self._references[2])
        if not all(bool(torch.isfinite(tensor).all()) for tensor in outputs.values()):
            raise ValueError("the model's own outputs are not finite with these random weights")
        return {
            "params": sum(parameter.numel() for parameter in self._model.parameters()),
            "shapes": [list(shape) for shape in case.shapes],
            "output_scale": max((tensor.abs().max().item() for tensor in outputs.values()), default=0.0),
            "sensitivity": _sensitivity(outputs),
        }

    def capture(self) -> Mapping[str, Any]:
        """`fxopt.capture` on a batch of 1."""
        import fxopt

        with _recorded_warnings() as messages:
            start = time.perf_counter()
            self._program = fxopt.capture(self._model, self._inputs[1])
            seconds = time.perf_counter() - start
        return {
            "seconds": round(seconds, 2),
            "frontend": self._program.frontend,
            "macs": self._program.cost().macs,
            "nodes": len(self._program.nodes),
            "warnings": messages,
            "notes": list(self._program.report.notes),
            **self._measure(self._program.module, "capture"),
        }

    def fold_batch_norm(self) -> Mapping[str, Any]:
        """The pass alone, and the batch norms that it leaves."""
        before = len(batch_norms(self._program))
        program, report, seconds = self._optimize(["fold_batch_norm"])
        return {
            "seconds": seconds,
            "before": before,
            "rewrites": sum(len(each.rewrites) for each in report),
            "left": len(batch_norms(program)),
            "skips": dict(Counter(skip.why for each in report for skip in each.skips)),
            "foldable_left": foldable(program),
            **self._measure(program.module, "fold_batch_norm"),
        }

    def default(self) -> Mapping[str, Any]:
        """The default pipeline."""
        self._optimized, report, seconds = self._optimize(["default"])
        cost = self._optimized.cost()
        return {
            "seconds": seconds,
            "passes": {each.name: len(each.rewrites) for each in report},
            "rolled_back": [str(skip) for each in report for skip in each.skips if "rolled back" in skip.why],
            "params": cost.params,
            "macs": cost.macs,
            "nodes": len(self._optimized.nodes),
            "left": len(batch_norms(self._optimized)),
            "foldable_left": foldable(self._optimized),
            **self._measure(self._optimized.module, "default"),
        }

    def engine(self) -> Mapping[str, Any]:
        """The ONNX engine of the optimised program."""
        from fxopt.lowering import OnnxBackend

        with _recorded_warnings() as messages:
            start = time.perf_counter()
            engine = OnnxBackend(num_threads=torch.get_num_threads()).lower(self._optimized, dynamic_batch=True)
            seconds = time.perf_counter() - start
        info = engine.info()

        def call(*inputs: Tensor) -> Any:
            signature = self._optimized.signature
            return signature.unflatten_outputs(engine(*signature.flatten_inputs(inputs, {})))

        with tempfile.TemporaryDirectory(prefix="fxopt-coverage-") as folder:
            engine.save(Path(folder))
            size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
        return {
            "seconds": round(seconds, 2),
            "dynamic_batch": bool(info["dynamic_batch"]),
            "bytes": size,
            "warnings": messages,
            **self._measure(call, "engine"),
        }

    def _optimize(self, passes: list[str]) -> tuple[Program, list[PassReport], float]:
        """The captured program after these passes, their reports, and the seconds that passes and proofs took."""
        from fxopt.manager import PassManager

        start = time.perf_counter()
        with _recorded_warnings():
            program = PassManager(passes, on_no_match="ignore").run(self._program)
        return program, program.report.passes, round(time.perf_counter() - start, 2)

    def _measure(self, candidate: Caller, stage: str) -> dict[str, Any]:
        """Errors against the model by batch size; for one over the bar, what float64 says about it."""
        errors: dict[str, float | None] = {}
        failures: dict[str, str] = {}
        for batch in BATCHES:
            found = self._error(candidate, batch)
            if isinstance(found, str):
                failures[str(batch)] = found
            else:
                errors[str(batch)] = found if math.isfinite(found) else None
        measured: dict[str, Any] = {"errors": errors}
        if failures:
            measured["failures"] = failures
        missed = [error for error in errors.values() if error is not None and error > BARS[stage]]
        if missed:
            measured["judgement"] = self._judge(candidate, max(missed))
        return measured

    def _error(self, candidate: Caller, batch: int) -> float | str:
        """The relative error against the model, or why there is none."""
        try:
            return relative_error(_call(candidate, self._inputs[batch]), self._references[batch])
        except OutputMismatchError as mismatch:
            return str(mismatch)
        except Exception as failure:  # noqa: BLE001 (a program that cannot run this batch is a result)
            return f"{type(failure).__name__}: {failure}"

    def _judge(self, candidate: Caller, error: float) -> dict[str, Any]:
        """Whether an error over the bar is float32 rounding that this model amplifies."""
        own_noise = error_float64 = reason = None
        try:
            if not self._references64:
                model = double(self._model)
                self._references64 = {batch: _call(model, _double(self._inputs[batch])) for batch in BATCHES}
            own_noise = max(relative_error(self._references[batch], self._references64[batch]) for batch in BATCHES)
            if isinstance(candidate, nn.Module):
                twin = double(candidate)
                error_float64 = max(
                    relative_error(_call(twin, _double(self._inputs[batch])), self._references64[batch])
                    for batch in BATCHES
                )
        except Exception as failure:  # noqa: BLE001 (models with burnt-in float32 constants have no float64 twin)
            reason = f"no float64 twin: {type(failure).__name__}: {failure}"
        # an error below the model's own rounding is none that anybody could tell from it
        drowned = own_noise is not None and error <= own_noise
        if error_float64 is not None:
            rounding = error_float64 <= EXACT_FLOAT64 or drowned
        else:
            rounding = own_noise is not None and error <= NOISE_FACTOR * own_noise
        judgement: dict[str, Any] = {"own_noise": own_noise, "error_float64": error_float64}
        finite = {key: value if value is None or math.isfinite(value) else None for key, value in judgement.items()}
        return {**finite, "reason": reason, "rounding": rounding}


@contextmanager
def _recorded_warnings() -> Iterator[list[str]]:
    """Collects the text of fxopt's own warnings, each once; others, such as the exporter's, are dropped."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as records:
        warnings.simplefilter("always")
        yield messages
    own = (str(record.message) for record in records if record.category.__module__.startswith("fxopt"))
    messages += dict.fromkeys(own)


def _call(function: Caller, inputs: tuple[Tensor, ...]) -> Any:
    with torch.no_grad():
        return function(*(tensor.clone() for tensor in inputs))


def _double(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor.double() for tensor in inputs)


def _sensitivity(outputs: Mapping[str, Tensor]) -> float:
    """How far the outputs of two random inputs are apart, relative; near 0 an error could hide."""
    pairs = [tensor for tensor in outputs.values() if tensor.ndim and tensor.shape[0] == 2]
    return max((relative_error(pair[0], pair[1]) for pair in pairs), default=0.0)
