"""Whether a rewritten layer is faster than the layer was: measured, on the backend that the program is compiled for.

Fewer multiply-accumulates are not always less time: narrow layers leave vector units idle, and each layer more reads
and writes its activations. So both variants become small engines, which take turns on random inputs of the layer's own
shape. What was measured is kept by what the layers are, so that layers of one shape are measured once.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from fxopt.analysis.shapes import TensorSpec
from fxopt.errors import BackendUnavailable, InputError
from fxopt.frontends.capture import capture
from fxopt.sharing import share_module
from fxopt.timing import measure

if TYPE_CHECKING:
    from fxopt.backend import Backend
    from fxopt.program import Program
    from fxopt.target import Target

__all__ = ["WORTH", "Gate", "LayerTimes", "time_ratio"]

Gate = Literal["macs", "time"]
"""What a rewrite has to save: multiply-accumulates, or time as it is measured."""

WORTH = 0.95
"""The share of a layer's time that a rewrite may take at most: less of a gain may be noise."""

_SECONDS = 0.3  # of measuring a pair
_ROUNDS = (10, 100)


class LayerTimes:
    """Measures layers on a backend, and remembers what it measured.

    Args:
        backend: what makes the engines.
        target: where they run.

    Raises:
        BackendUnavailable: if the backend cannot be used here.
    """

    def __init__(self, backend: Backend, target: Target) -> None:
        reason = backend.unavailable()
        if reason is not None:
            raise BackendUnavailable(f"{backend.name}: {reason}")
        self._backend = backend
        self._target = target
        self._known: dict[tuple[str, str], float] = {}

    def ratio(self, before: nn.Module, after: nn.Module, source: TensorSpec) -> float:
        """The time of `after` over that of `before`: below 1 it is faster. The median over rounds in which both run.

        Args:
            before: takes one tensor, gives one.
            after: the same.
            source: what both read.

        Raises:
            BackendError: if the backend cannot lower one of them.
            BackendUnavailable: if its engines cannot run here.
        """
        inputs = torch.randn(source.shape, generator=torch.Generator().manual_seed(0)).to(source.dtype)
        whole, rewritten = (self._program(layer, inputs) for layer in (before, after))
        # all that the time depends on: shapes, types and how layers are configured, but for the values of weights
        key = whole.text(), rewritten.text()
        if key not in self._known:
            self._known[key] = self._measured(whole, rewritten, inputs)
        return self._known[key]

    def _program(self, layer: nn.Module, inputs: torch.Tensor) -> Program:
        own = next((tensor.device for tensor in layer.parameters()), inputs.device)
        return capture(share_module(nn.Sequential(layer)).eval(), (inputs.to(own),), target=self._target)

    def _measured(self, before: Program, after: Program, inputs: torch.Tensor) -> float:
        turns = {"before": self._turn(before, inputs), "after": self._turn(after, inputs)}
        least, most = _ROUNDS
        trial = measure(turns, rounds=3, warmup=2)
        rounds = int(_SECONDS / max(1e-9, sum(timing.median for timing in trial.values())))
        timings = measure(turns, rounds=min(most, max(least, rounds)), warmup=0)
        pairs = zip(timings["after"].seconds, timings["before"].seconds, strict=True)
        return statistics.median(after / before for after, before in pairs)

    def _turn(self, program: Program, inputs: torch.Tensor) -> Callable[[], object]:
        """Runs the engine of a program once, to the end."""
        engine = self._backend.lower(program, dynamic_batch=False)
        reason = engine.cannot_run()
        if reason is not None:
            raise BackendUnavailable(f"{self._backend.name} cannot measure layers here: {reason}")
        given, device = inputs.to(engine.device), engine.device
        if device.type != "cuda":
            return lambda: engine(given)

        def waiting() -> None:
            engine(given)
            torch.cuda.synchronize(device)

        return waiting


def time_ratio(program: Program, before: nn.Module, after: Sequence[nn.Module], source: TensorSpec) -> float:
    """The time of what would run in place of a layer, over that of the layer, on the backend that the program is for.

    Args:
        program: which the layer is in.
        before: the layer.
        after: what would run in its place, one after the other.
        source: what the layer reads.

    Raises:
        InputError: if it is not known which backend the program is for.
        BackendError: if the backend cannot lower them.
        BackendUnavailable: if its engines cannot run here.
    """
    if program.layer_times is None:
        raise InputError(
            'gate="time" measures layers on the backend that they are for: pass backend=, such as backend="onnx"'
        )
    return program.layer_times.ratio(before, nn.Sequential(*after), source)
