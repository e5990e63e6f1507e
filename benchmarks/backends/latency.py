"""The part `latency`: every backend, float32 and int8, against its bare runtime on the same model, in turns."""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fxopt
from benchmarks.backends.subjects import SUBJECTS, Subject
from benchmarks.kept import kept
from benchmarks.results import Table, save, shorten, verdict_data, verdict_lines
from benchmarks.timing import Timings, interleave
from fxopt import Program
from fxopt.errors import FxoptError, first_line
from fxopt.manager import PassManager
from fxopt.progress import progress
from fxopt.registry import make_backend
from fxopt.timing import measure

__all__ = ["run", "verdicts"]

BARE = {"onnx": "bare ONNX Runtime", "openvino": "bare OpenVINO", "inductor": "bare torch.compile"}
"""What each backend is compared with."""

SLOWER = 1.03
FASTER = 1.5
TURN = 0.02
"""Seconds that a turn of the fastest engine takes at least: as in use, an engine finds the caches as it left them."""

AUTO = "auto"

Call = Callable[[], object]
Result = dict[str, Any]


def run(arguments: argparse.Namespace) -> bool:
    """Measures every network at every batch size.

    Returns:
        whether every bar is met.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(arguments.threads)
    backends = [name for name in arguments.backends if name in BARE]
    path = arguments.out / "latency.json"
    measured = {"network": arguments.networks, "batch": arguments.batches}
    results: list[Result] = kept(path, measured, wanted=arguments.keep, key="results")
    try:
        with progress("measuring networks", len(arguments.networks) * len(arguments.batches), "runs") as advance:
            for name in arguments.networks:
                subject = SUBJECTS[name]()
                for batch in arguments.batches:
                    results.append(_measured(subject, batch, backends, arguments))
                    data = {"bars": verdict_data(verdicts(results)), "results": results}
                    save(path, _table(results), data)
                    advance(1)
    finally:
        torch.set_num_threads(before)
    return all(met for _, met in verdicts(results))


def verdicts(results: list[Result]) -> list[tuple[str, bool]]:
    """Each bar in words with its numbers, and whether it is met."""
    found = []
    gains = []
    for result in results:
        rows = {row["engine"]: row for row in result["rows"]}
        subject = f"{result['network']}, batch {result['batch']}"
        for backend, bare in BARE.items():
            ratio = rows.get(backend, {}).get("to_bare")
            if ratio is not None:
                text = f"{subject}: {backend} over {bare} {_text(ratio)}; bar {SLOWER}"
                found.append((text, ratio[1] <= SLOWER))
        for precision in ("fp32", "int8"):
            ratio = rows.get(_auto(precision), {}).get("to_best")
            if ratio is not None:
                text = f"{subject}: {precision} auto over the fastest of ours {_text(ratio)}; bar {SLOWER}"
                found.append((text, ratio[1] <= SLOWER))
        if result["gain"] is not None:
            gains.append(result["gain"])
    if gains:
        mean = statistics.geometric_mean(gains)
        found.append((f"int8 {mean:.2f} times as fast as the best bare float32, geometric mean", mean >= FASTER))
    return found


def _measured(subject: Subject, batch: int, backends: list[str], arguments: argparse.Namespace) -> Result:
    inputs = tuple(torch.cat([tensor] * batch)[:batch].contiguous() for tensor in subject.inputs)
    failures: dict[str, str] = {}
    calls: dict[str, Call] = {}

    def add(name: str, make: Callable[[], Call]) -> None:
        try:
            calls[name] = make()
            calls[name]()
        except Exception as error:  # noqa: BLE001 (a runtime that fails on a network is a result)
            calls.pop(name, None)
            reason = first_line(error) if isinstance(error, FxoptError) else f"{type(error).__name__}: {error}"
            failures[name] = reason.splitlines()[0]

    with torch.no_grad(), warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        for backend in backends:
            add(BARE[backend], partial(_bare, backend, subject.model, inputs, arguments.threads, Path(folder)))
        whole = fxopt.optimize(
            subject.model, inputs, ["default"], calibration=subject.calibration, on_no_match="ignore"
        )
        fitting = whole.copy()
        fitting.scheme = make_backend(AUTO).scheme(whole.target)  # weights that fit all of them
        for precision, program in (
            ("fp32", whole),
            ("int8", PassManager([subject.integers], verify="structure").run(fitting)),
        ):
            specs = [_spec(backend, arguments.threads) for backend in backends]
            for backend, spec in zip(backends, specs, strict=True):
                name = backend if precision == "fp32" else f"{backend} int8"
                add(name, partial(_ours, program, spec, inputs))
            add(_auto(precision), partial(_ours, program, f"auto(candidates={tuple(specs)!r})", inputs))
        timings = interleave(calls, rounds=arguments.rounds, warmup=3, calls=_calls_of_a_turn(calls))
    rows = [_row(name, timings) for name in calls]
    rows += [{"engine": name, "reason": reason} for name, reason in failures.items()]
    bare = [name for name in calls if name in BARE.values()]
    integers = [name for name in calls if name.endswith(" int8")]
    _add_best(rows, timings, backends)
    gain = None
    if bare and integers:
        medians = {name: timings.per_call(name).median for name in calls}
        gain = min(medians[name] for name in bare) / min(medians[name] for name in integers)
    return {"network": subject.name, "batch": batch, "integers": subject.integers, "gain": gain, "rows": rows}


def _bare(backend: str, model: nn.Module, inputs: tuple[Tensor, ...], threads: int, folder: Path) -> Call:
    """A runtime as its own users have it, without fxopt."""
    if backend == "inductor":
        torch.compiler.reset()
        compiled = torch.compile(model)
        return lambda: compiled(*inputs)
    path = folder / "bare.onnx"
    if not path.exists():
        torch.onnx.export(model, inputs, path, dynamo=True, verbose=False, external_data=False)
    arrays = [tensor.numpy() for tensor in inputs]
    if backend == "onnx":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = threads
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        feeds = {item.name: array for item, array in zip(session.get_inputs(), arrays, strict=True)}
        return lambda: torch.from_numpy(session.run(None, feeds)[0])
    import openvino

    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    request = openvino.Core().compile_model(str(path), "CPU", settings).create_infer_request()
    return lambda: torch.tensor(request.infer(arrays)[0])


def _ours(program: Program, spec: str, inputs: tuple[Tensor, ...]) -> Call:
    backend = make_backend(spec)
    reason = backend.unavailable()
    if reason is not None:
        raise FxoptError(reason)
    engine = fxopt.lower(program, backend=backend, dynamic_batch=False).engine
    return lambda: engine(*inputs)


def _calls_of_a_turn(calls: dict[str, Call]) -> int:
    fastest = min(timing.median for timing in measure(calls, rounds=3, warmup=1).values())
    return max(1, math.ceil(TURN / fastest))


def _spec(backend: str, threads: int) -> str:
    return backend if backend == "inductor" else f"{backend}(num_threads={threads})"


def _auto(precision: str) -> str:
    return AUTO if precision == "fp32" else f"{AUTO} int8"


def _row(name: str, timings: Timings) -> dict[str, Any]:
    bare = BARE.get(name)
    return {
        "engine": name,
        "reason": None,
        "milliseconds": timings.per_call(name).median * 1e3,
        "to_bare": None if bare not in timings.seconds else list(timings.ratio(name, bare)),
        "to_best": None,
    }


def _add_best(rows: list[dict[str, Any]], timings: Timings, backends: list[str]) -> None:
    """The time of `auto` over that of the fastest of the backends that it chose from."""
    by_name = {row["engine"]: row for row in rows}
    for precision, suffix in (("fp32", ""), ("int8", " int8")):
        own = [name for backend in backends if (name := backend + suffix) in timings.seconds]
        if own and _auto(precision) in timings.seconds:
            best = min(own, key=lambda name: timings.per_call(name).median)
            by_name[_auto(precision)]["to_best"] = list(timings.ratio(_auto(precision), best))


def _text(ratio: list[float]) -> str:
    median, low, high = ratio
    return f"{median:.3f} [{low:.3f}, {high:.3f}]"


def _table(results: list[Result]) -> Table:
    columns = ("network", "batch", "engine", "ms", "over its bare runtime", "over the fastest", "why not")
    cells = [
        [
            result["network"],
            str(result["batch"]),
            row["engine"],
            "-" if row["reason"] else f"{row['milliseconds']:.2f}",
            _text(row["to_bare"]) if row.get("to_bare") else "-",
            _text(row["to_best"]) if row.get("to_best") else "-",
            shorten(row["reason"] or ""),
        ]
        for result in results
        for row in result["rows"]
    ]
    modes = sorted({result["integers"] for result in results})
    notes = [
        *verdict_lines(verdicts(results)),
        "medians of rounds in which all run; a bar is met if the lower quartile of the ratios meets it",
        f"a turn is as many calls as take the fastest engine {1e3 * TURN:.0f} ms",
        f"{torch.get_num_threads()} thread(s), batch sizes fixed; int8: default and {' or '.join(modes)}",
    ]
    return Table("Backends against bare runtimes", columns, cells, notes)
