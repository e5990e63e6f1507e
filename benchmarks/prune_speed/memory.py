"""Peak memory of capturing and pruning a model, beyond what the process held, as a multiple of the model's bytes.

One process per measurement. Before it, everything that is imported or made once is there: the modules, the thread
pools, a small model was pruned, and the model itself ran on the batches that it is verified on. The peak is the
kernel's, of resident memory, and is reset at the start: what the allocator keeps of freed memory counts as it does for
users. The activations of the proofs count too: the peak of the model's own forward on the larger batch is given beside
it, and the peak without the proof of the pruned program (verify="structure").
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import re
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.errors import BenchmarkError
from benchmarks.networks import load_network
from benchmarks.prune_speed.child import in_child
from benchmarks.prune_speed.part import Found, found, met
from benchmarks.results import number_text

NETWORKS = ("torchvision:resnet50", "torchvision:vgg16", "torchvision:vit_b_16", "torchvision:mobilenet_v2")
BAR = 2.5
WHAT = ("capture", "structure", "numerics")
"""Capture alone, and pruning too, by how it is verified."""

_VERIFIED_BATCH = 2
_MIB = 2**20


def measure_all(names: Sequence[str], arguments: argparse.Namespace) -> Found:
    """One row per network."""
    if not Path("/proc/self/clear_refs").exists():
        raise BenchmarkError("part memory reads the peak of resident memory from /proc, which Linux alone has")
    rows, networks, missed = [], [], []
    for name in names:
        results = {
            what: in_child("benchmarks.prune_speed.memory:measure", name=name, size=arguments.size, what=what)
            for what in WHAT
        }
        networks.append({"network": name, "bar": BAR, **results})
        failures = {what: each["failure"] for what, each in results.items() if "failure" in each}
        if failures:
            missed += [f"{name}, {what}: {why}" for what, why in failures.items()]
            rows.append([name, *["failed"] * (len(_COLUMNS) - 1)])
            continue
        judged = results["numerics"]
        size = judged["bytes"]
        times = judged["peak"] / size
        if times > BAR:
            missed.append(f"{name}: {times:.2f} times the model's bytes, bar {BAR}")
        peaks = [f"x {results[what]['peak'] / size:.2f}" for what in WHAT]
        rows.append(
            [
                name,
                number_text(size, _MIB, 1),
                *peaks,
                f"x {judged['forward'] / size:.2f}",
                f"x {BAR}",
                met(times <= BAR),
                number_text(judged["seconds"]),
            ]
        )
    notes = [
        "peak of resident memory beyond what the process held, over the bytes of parameters and buffers; macs=0.5, "
        "without calibration data",
        f"forward: of the model itself on a batch of {_VERIFIED_BATCH}, the larger that it is verified on; the bar "
        'is for verify="numerics", the default',
    ]
    return found("Peak memory of pruning", _COLUMNS, rows, notes, networks, missed)


_COLUMNS = (
    "network",
    "MiB",
    "captured",
    'pruned, "structure"',
    'pruned, "numerics"',
    "forward",
    "bar",
    "met",
    "seconds",
)


def measure(name: str, size: int | None, what: str) -> dict[str, Any]:
    """The measurement, in a process of its own.

    Args:
        name: of the network.
        size: of its inputs, as for `load_network`.
        what: one of `WHAT`.
    """
    import fxopt
    from fxopt.passes import PruneChannels

    warnings.simplefilter("ignore")
    small = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    fxopt.optimize(small, (torch.randn(1, 3, 8, 8),), [PruneChannels(macs=0.5)])
    network = load_network(name, size=size)
    model, inputs = network.model, network.inputs
    larger = tuple(torch.cat([tensor] * _VERIFIED_BATCH) for tensor in inputs)

    def forward() -> None:
        with torch.no_grad():
            model(*larger)

    forward()

    def work() -> None:
        if what == "capture":
            fxopt.capture(model, inputs)
        else:
            fxopt.optimize(
                model, inputs, [PruneChannels(macs=0.5)], verify="numerics" if what == "numerics" else "structure"
            )

    activations = peak_beyond(forward)
    tensors = (*model.parameters(), *model.buffers())
    start = time.perf_counter()
    return {
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        "forward": activations,
        "peak": peak_beyond(work),
        "seconds": round(time.perf_counter() - start, 2),
    }


def peak_beyond(work: Callable[[], object]) -> int:
    """Bytes of resident memory that a piece of work took at its peak, beyond what the process held before."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that the allocator still holds would hide what is taken anew
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    text = Path("/proc/self/status").read_text()
    (kib,) = re.findall(rf"^{key}:\s+(\d+) kB$", text, re.MULTILINE)
    return int(kib) * 1024
