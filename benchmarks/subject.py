"""A model of a suite as something to measure against: built, made a real test, with inputs and what it answers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.numerics import OutputMismatchError, double, leaves, random_inputs, randomise, relative_error, seed
from benchmarks.suites import Suite

BATCHES = (1, 2)

# a miss is rounding if in float64 the two agree to this, about 1e6 roundings of float64
EXACT_FLOAT64 = 1e-9
# and, for an engine, which has no float64 twin, if it is within this factor of the model's own float32 noise
NOISE_FACTOR = 10.0

Caller = Callable[..., Any]


class Judge:
    """Compares callables with a model, on one input for each batch size.

    Attributes:
        model: what is compared with.
        inputs: by batch size.
        references: what the model answers, by batch size.
    """

    def __init__(self, model: nn.Module, inputs: Mapping[int, tuple[Tensor, ...]]) -> None:
        self.model = model
        self.inputs = inputs
        self.references = {batch: call(model, each) for batch, each in inputs.items()}
        self._references64: dict[int, Any] = {}

    def measure(self, candidate: Caller, bar: float = math.inf) -> dict[str, Any]:
        """Errors against the model by batch size; for one over the bar, what float64 says about it.

        Returns:
            `errors` by batch size (None for one that is not finite), `failures` where there is no error, with the
            reason, and for a miss the `judgement`.
        """
        errors: dict[str, float | None] = {}
        failures: dict[str, str] = {}
        for batch in self.inputs:
            found = self._error(candidate, batch)
            if isinstance(found, str):
                failures[str(batch)] = found
            else:
                errors[str(batch)] = found if math.isfinite(found) else None
        measured: dict[str, Any] = {"errors": errors}
        if failures:
            measured["failures"] = failures
        missed = [error for error in errors.values() if error is not None and error > bar]
        if missed:
            measured["judgement"] = self._judge(candidate, max(missed))
        return measured

    def _error(self, candidate: Caller, batch: int) -> float | str:
        """The relative error against the model, or why there is none."""
        try:
            return relative_error(call(candidate, self.inputs[batch]), self.references[batch])
        except OutputMismatchError as mismatch:
            return str(mismatch)
        except Exception as failure:  # noqa: BLE001 (a program that cannot run this batch is a result)
            return f"{type(failure).__name__}: {failure}"

    def _judge(self, candidate: Caller, error: float) -> dict[str, Any]:
        """Whether an error over the bar is float32 rounding that this model amplifies."""
        own_noise = error_float64 = reason = None
        try:
            if not self._references64:
                model = double(self.model)
                self._references64 = {batch: call(model, _double(each)) for batch, each in self.inputs.items()}
            own_noise = max(relative_error(self.references[batch], self._references64[batch]) for batch in self.inputs)
            if isinstance(candidate, nn.Module):
                twin = double(candidate)
                error_float64 = max(
                    relative_error(call(twin, _double(each)), self._references64[batch])
                    for batch, each in self.inputs.items()
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


class Subject:
    """A model of a suite in evaluation mode, with seeded random weights and statistics.

    Attributes:
        model: the model.
        judge: its inputs, and what it answers.
        description: its parameters, input shapes, scale of the outputs, and how far the outputs of two inputs are
            apart, relative (near 0 an error could hide); JSON.
    """

    def __init__(self, name: str, suite: Suite) -> None:
        """Builds it.

        Raises:
            ValueError: its own outputs are not finite.
        """
        case = suite.build(name)
        self.model = case.model.eval()
        generator = torch.Generator().manual_seed(seed(name))
        randomise(self.model, generator)
        inputs = {batch: random_inputs(case.shapes, batch, generator) for batch in BATCHES}
        self.judge = Judge(self.model, inputs)
        outputs = leaves(self.judge.references[2])
        if not all(bool(torch.isfinite(tensor).all()) for tensor in outputs.values()):
            raise ValueError("the model's own outputs are not finite with these random weights")
        self.description: Mapping[str, Any] = {
            "params": sum(parameter.numel() for parameter in self.model.parameters()),
            "shapes": [list(shape) for shape in case.shapes],
            "output_scale": max((tensor.abs().max().item() for tensor in outputs.values()), default=0.0),
            "sensitivity": _sensitivity(outputs),
        }


@contextmanager
def recorded_warnings() -> Iterator[list[str]]:
    """Collects the text of fxopt's own warnings, each once; others, such as the exporter's, are dropped."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as records:
        warnings.simplefilter("always")
        yield messages
    own = (str(record.message) for record in records if record.category.__module__.startswith("fxopt"))
    messages += dict.fromkeys(own)


def call(function: Caller, inputs: tuple[Tensor, ...]) -> Any:
    """What a model answers to copies of the inputs, without gradients."""
    with torch.no_grad():
        return function(*(tensor.clone() for tensor in inputs))


def worst_error(stage: Mapping[str, Any]) -> float | None:
    """The larger of a stage's errors by batch size; infinite if an output was not finite; None if none was measured."""
    errors = stage.get("errors", {}).values()
    return max((float("inf") if error is None else float(error) for error in errors), default=None)


def is_rounding(stage: Mapping[str, Any]) -> bool:
    """Whether an error over the bar is the model amplifying float32 rounding, rather than a wrong graph."""
    judgement = stage.get("judgement")
    return bool(judgement and judgement["rounding"])


def misses(stage: Mapping[str, Any], bar: float) -> list[str]:
    """What a stage's measurement says against it: an error over the bar that is no rounding, batch sizes that fail."""
    missed = worst_error(stage)
    texts = []
    if missed is not None and missed > bar and not is_rounding(stage):
        texts.append(f"relative error {missed:.1e} over {bar:.0e} ({_judgement_text(stage)})")
    return texts + [f"batch {batch}: {reason}" for batch, reason in stage.get("failures", {}).items()]


def error_cell(stage: Mapping[str, Any] | None, bar: float) -> str:
    """A table cell: the worst error, marked `~` if it is over the bar by rounding, `!` if otherwise."""
    if stage is None:
        return "-"
    if not stage["ok"]:
        return "failed"
    error = worst_error(stage)
    if error is None:
        return "-"
    return f"{error:.1e}{'' if error <= bar else ' ~' if is_rounding(stage) else ' !'}"


def _judgement_text(stage: Mapping[str, Any]) -> str:
    judgement = stage.get("judgement")
    if judgement is None:
        return "not judged"
    own, exact = judgement["own_noise"], judgement["error_float64"]
    parts = [f"the model's own float32 noise {own:.1e}" if own is not None else "own noise unknown"]
    if exact is not None:
        parts.append(f"float64 error {exact:.1e}")
    if judgement["reason"]:
        parts.append(judgement["reason"])
    return ", ".join(parts)


def _double(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor.double() for tensor in inputs)


def _sensitivity(outputs: Mapping[str, Tensor]) -> float:
    pairs = [tensor for tensor in outputs.values() if tensor.ndim and tensor.shape[0] == 2]
    return max((relative_error(pair[0], pair[1]) for pair in pairs), default=0.0)
