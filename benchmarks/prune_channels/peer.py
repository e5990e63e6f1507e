"""What Torch-Pruning does with one model, used as its readme says: magnitude of groups, the classifier left whole."""

from __future__ import annotations

import signal
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from benchmarks.numerics import count_macs, leaves
from benchmarks.prune_channels.row import PEER, PEER_SECONDS, RATIO
from benchmarks.subject import Subject
from benchmarks.suites import Suite
from benchmarks.sweep.worker import Stage

PROCESS_SECONDS = 600.0
"""For importing, building and measuring too, and should the limit for pruning itself not be able to interrupt it."""


def stages(name: str, suite: Suite) -> Mapping[str, Stage]:
    """The one stage."""
    return {PEER: Stage(lambda: _prune(Subject(name, suite)))}


def _prune(subject: Subject) -> Mapping[str, Any]:
    import torch_pruning as tp

    model, inputs = subject.model, subject.judge.inputs
    before = count_macs(model, inputs[1])
    start = time.perf_counter()
    with time_limit(PEER_SECONDS), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of parameters that it leaves alone, and its own deprecations
        pruner = tp.pruner.BasePruner(
            model,
            inputs[1],
            importance=tp.importance.GroupMagnitudeImportance(),
            pruning_ratio=RATIO,
            ignored_layers=classifiers(model, subject.judge.references[1]),
        )
        pruner.step()
    seconds = time.perf_counter() - start
    return {
        "seconds": round(seconds, 2),
        "macs_before": before,
        "macs": count_macs(model, inputs[1]),
        **subject.judge.measure(model),
    }


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in the block after that time."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"more than {seconds:g} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, previous)


def classifiers(model: nn.Module, outputs: Any) -> list[nn.Module]:
    """The layers as wide as the outputs, which Torch-Pruning must be told to leave whole."""
    widths = {tensor.shape[1] for tensor in leaves(outputs).values() if tensor.ndim > 1}
    layers = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return [module for module in model.modules() if isinstance(module, layers) and module.weight.shape[0] in widths]
