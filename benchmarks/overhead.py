"""What fxopt costs beyond what it stands on: compiling, calling and importing, each next to the bare thing.

compile: `fxopt.compile` next to `torch.onnx.export` and an ONNX Runtime session of the same model, both with a dynamic
batch. call: `compiled(x)` next to `session.run` of the same file on a numpy array, and next to the least that a caller
with tensors does by hand, `torch.from_numpy(session.run(None, {name: x.numpy()})[0])`. After a network that runs for
milliseconds the caches are cold, and whatever runs around it costs several times as much: the call by hand shows how
much of that is nobody's to save. import: `import fxopt` after `import torch`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.networks import Network, load_network
from benchmarks.results import RESULTS, Table, save
from benchmarks.timing import Spread, interleave

COMPILE_BAR = 1.2
CALL_BAR = 50e-6
IMPORT_BAR = 0.1
PARTS = ("compile", "call", "import")

_TINY_CALLS = 50


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--out", type=Path, default=None, help="JSON file [benchmarks/results/overhead.json]")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    parser.add_argument("--passes", nargs="*", default=["default"], help="of fxopt.compile")
    parser.add_argument("--network", default="torchvision:resnet50", help="network of part compile")
    parser.add_argument("--compile-rounds", type=int, default=3, help="rounds of part compile")
    parser.add_argument("--call-network", default="torchvision:resnet18", help="large network of part call")
    parser.add_argument("--call-rounds", type=int, default=300, help="rounds of part call")
    parser.add_argument("--import-rounds", type=int, default=10, help="rounds of part import")


def run(arguments: argparse.Namespace) -> int:
    """Measures the chosen parts.

    Returns:
        0 if every bar is met, else 1.
    """
    rows: list[list[str]] = []
    data: dict[str, Any] = {}
    met = []
    if "compile" in arguments.parts:
        ratio, seconds = _compile(arguments.network, arguments.passes, rounds=arguments.compile_rounds)
        met.append(ratio.median <= COMPILE_BAR)
        data["compile"] = {
            "network": arguments.network,
            "passes": arguments.passes,
            "ratio": ratio,
            "seconds": seconds,
            "bar": COMPILE_BAR,
        }
        rows.append(
            [
                f"compile {arguments.network}",
                _listed(seconds["bare"], " s"),
                _listed(seconds["fxopt"], " s"),
                f"x {ratio.text(2)}",
                "",
                f"x {COMPILE_BAR}",
                _word(met[-1]),
            ]
        )
    if "call" in arguments.parts:
        small = [(network, _TINY_CALLS, 200) for network in _small_networks()]
        for network, calls, rounds in (*small, (load_network(arguments.call_network), 1, arguments.call_rounds)):
            bare, ours, extra, by_hand = _call(network, arguments.passes, calls=calls, rounds=rounds)
            name = network.name
            met.append(extra.median <= CALL_BAR)
            data[f"call {name}"] = {"bare": bare, "fxopt": ours, "extra": extra, "by_hand": by_hand, "bar": CALL_BAR}
            texts = [f"{each.text(1, 1e6)} us" for each in (bare, ours, extra, by_hand)]
            rows.append([f"call {name}", *texts, f"{CALL_BAR * 1e6:.0f} us", _word(met[-1])])
    if "import" in arguments.parts:
        bare, ours, extra = _import(arguments.import_rounds)
        met.append(extra.median < IMPORT_BAR)
        data["import"] = {"bare": bare, "fxopt": ours, "extra": extra, "bar": IMPORT_BAR}
        rows.append(
            ["import", *(f"{each.text(3)} s" for each in (bare, ours, extra)), "", f"{IMPORT_BAR} s", _word(met[-1])]
        )
    notes = ["medians of interleaved rounds with quartiles; beyond: of the rounds' ratios or differences"]
    columns = ("what", "bare", "fxopt", "beyond", "by hand beyond", "bar", "met")
    save(arguments.out or RESULTS / "overhead.json", Table("Overhead", columns, rows, notes), data)
    return int(not all(met))


def _compile(name: str, passes: list[str], *, rounds: int) -> tuple[Spread, dict[str, list[float]]]:
    import fxopt

    network = load_network(name)
    (x,) = network.inputs

    def bare(model: nn.Module = network.model, x: torch.Tensor = x) -> object:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            path = Path(folder) / "model.onnx"
            batch = torch.export.Dim("batch")
            torch.onnx.export(model, (x,), path, dynamo=True, dynamic_shapes=({0: batch},), verbose=False)
            return _session(path, torch.get_num_threads())

    def ours(model: nn.Module = network.model, x: torch.Tensor = x) -> object:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return fxopt.compile(model, (x,), passes=passes, on_no_match="ignore")

    # the first export of a process imports the exporter and fills its caches
    small = _Tiny().eval()
    bare(small, torch.randn(2, 8, 8, 8))
    ours(small, torch.randn(2, 8, 8, 8))
    timings = interleave({"bare": bare, "fxopt": ours}, rounds=rounds, warmup=0)
    return timings.ratio("fxopt", "bare"), {key: list(values) for key, values in timings.seconds.items()}


def _call(network: Network, passes: list[str], *, calls: int, rounds: int) -> tuple[Spread, Spread, Spread, Spread]:
    import fxopt

    # one thread each: the idle threads of one session spin, and would slow the other's turn
    model, (x,) = network.model, network.inputs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = fxopt.compile(model, (x,), passes=passes, backend="onnx(num_threads=1)", on_no_match="ignore")
    with tempfile.TemporaryDirectory() as folder:
        compiled.save(Path(folder) / "saved")
        session = _session(Path(folder) / "saved" / "model.onnx", threads=1)
    array = x.numpy()
    name = session.get_inputs()[0].name
    feed = {name: array}
    candidates = {
        "bare": lambda: session.run(None, feed),
        "fxopt": lambda: compiled(x),
        "by hand": lambda: torch.from_numpy(session.run(None, {name: x.numpy()})[0]),
    }
    timings = interleave(candidates, rounds=rounds, warmup=5, calls=calls)
    beyond = (timings.difference(candidate, "bare") for candidate in ("fxopt", "by hand"))
    return timings.per_call("bare"), timings.per_call("fxopt"), *beyond


def _session(path: Path, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _import(rounds: int) -> tuple[Spread, Spread, Spread]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}

    def process(code: str) -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, env=environment)
        return time.perf_counter() - start

    timings = interleave(
        {"bare": lambda: process("import torch"), "fxopt": lambda: process("import torch; import fxopt")},
        rounds=rounds,
        warmup=1,
    )
    return timings.per_call("bare"), timings.per_call("fxopt"), timings.difference("fxopt", "bare")


def _small_networks() -> list[Network]:
    """Networks with next to nothing to compute: the call itself, and the call with an image to hand over."""
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 10)).eval()
    return [
        Network("tiny", _Tiny().eval(), (torch.randn(1, 8, 8, 8),)),
        Network("pooled image", pool, (torch.randn(1, 3, 224, 224),)),
    ]


class _Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3)
        self.bn = nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.bn(self.conv(x)).relu()
        return y


def _listed(values: list[float], unit: str) -> str:
    return ", ".join(f"{value:.1f}" for value in values) + unit


def _word(met: bool) -> str:
    return "yes" if met else "no"
