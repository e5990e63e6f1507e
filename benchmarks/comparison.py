"""Several transformed versions of one network side by side: operators that run, error against the network, time."""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.networks import Network
from benchmarks.numerics import OutputMismatchError, relative_error
from benchmarks.timing import Spread, Timings, interleave

NORM_OPS = ("native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm")
CONV_OPS = ("convolution",)


@dataclass(frozen=True)
class Version:
    """A transformed network.

    Attributes:
        seconds: time of the whole transformation, from the caller's model.
        ops: how often each ATen operator runs in one forward.
        error: relative error of the outputs against the network's; None if it could not be computed.
        module: what to call; None if the transformation failed.
        failure: why it did.
    """

    seconds: float
    ops: Mapping[str, int]
    error: float | None
    module: nn.Module | None
    failure: str | None = None

    def count(self, names: Sequence[str]) -> int | None:
        """How often any of these operators runs."""
        return None if self.module is None else sum(self.ops.get(name, 0) for name in names)


@dataclass(frozen=True)
class Comparison:
    """A network (`"model"`) and its versions by name; timings hold those that run."""

    network: Network
    versions: Mapping[str, Version]
    timings: Timings

    def speed(self, name: str) -> Spread | None:
        """Latency of a version over the network's."""
        return self.timings.ratio(name, "model") if name in self.timings.seconds else None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "network": self.network.name,
            "input": [list(tensor.shape) for tensor in self.network.inputs],
            "versions": {
                name: {
                    "seconds": version.seconds,
                    "ops": dict(version.ops),
                    "error": version.error if version.error is None or math.isfinite(version.error) else "inf",
                    "failure": version.failure,
                    "latency_ms": self.timings.per_call(name).median * 1e3 if name in self.timings.seconds else None,
                    "latency_ratio": self.speed(name),
                }
                for name, version in self.versions.items()
            },
        }


def compare(network: Network, transforms: Mapping[str, Callable[[], nn.Module]], *, rounds: int) -> Comparison:
    """Transforms the network in every way, and measures. The network itself is version `"model"`.

    Args:
        network: left as it is by the transforms.
        transforms: by name; each returns a module called like the network.
        rounds: of the interleaved timing.
    """
    with torch.no_grad():
        expected = network.model(*network.inputs)
        versions = {"model": _measure(lambda: network.model, network, expected)}
        versions |= {name: _measure(transform, network, expected) for name, transform in transforms.items()}
        running = {
            name: _caller(each.module, network.inputs) for name, each in versions.items() if each.module is not None
        }
        timings = interleave(running, rounds=rounds, warmup=2)
    return Comparison(network, versions, timings)


def add_network_arguments(parser: argparse.ArgumentParser, default: Sequence[str]) -> None:
    """The options that all pass benchmarks share."""
    parser.add_argument(
        "--networks", nargs="+", default=list(default), metavar="NAME", help="torchvision:NAME, timm:NAME"
    )
    parser.add_argument("--size", type=int, default=None, help="height and width of the inputs [each network's own]")
    parser.add_argument("--out", type=Path, default=None, help="JSON file [benchmarks/results/NAME.json]")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of the interleaved timing")


def count_ops(module: nn.Module, inputs: tuple[Tensor, ...]) -> Counter[str]:
    """How often each ATen operator runs in one forward, by name without overload."""
    counter = _OpCounter()
    with counter, torch.no_grad():
        module(*inputs)
    return counter.counts


def error_text(error: float | None) -> str:
    """A table cell."""
    return "-" if error is None else f"{error:.1e}"


def count_text(count: int | None) -> str:
    """A table cell."""
    return "-" if count is None else str(count)


def seconds_text(seconds: float) -> str:
    """A table cell."""
    return f"{seconds:.2f}"


def spread_text(value: Spread | None) -> str:
    """A table cell."""
    return "-" if value is None else value.text(2)


class _OpCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def _measure(transform: Callable[[], nn.Module], network: Network, expected: Any) -> Version:
    start = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peers warn of their own deprecation
            module = transform()
        seconds = time.perf_counter() - start
        error = relative_error(module(*network.inputs), expected)
        return Version(seconds, count_ops(module, network.inputs), error, module)
    except OutputMismatchError as mismatch:
        return Version(time.perf_counter() - start, {}, None, None, f"other outputs: {mismatch}")
    except Exception as error:  # noqa: BLE001 (a peer that fails on a network is a result)
        return Version(time.perf_counter() - start, {}, None, None, f"{type(error).__name__}: {error}".splitlines()[0])


def _caller(module: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    return lambda: module(*inputs)
