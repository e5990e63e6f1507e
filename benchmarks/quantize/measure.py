"""What is measured of one network: every method's logits against the float network's, then all in turns."""

from __future__ import annotations

import math
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.quantize.engines import FLOAT, ORT, Engine, Files, Maker, Missing, float_engine
from benchmarks.quantize.subjects import Subject
from benchmarks.timing import Timings, interleave
from fxopt.compare import compare

_BATCH = 32


def measure(subject: Subject, makers: Mapping[str, Maker], *, rounds: int) -> dict[str, Any]:
    """Runs every method; one that fails gives a row with the reason.

    Returns:
        JSON: the network, the accuracy of its float version, how many classes it finds in the test images, and `rows`.
    """
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of exporters and peers; fxopt's own are about outputs that moved
        engines: dict[str, Engine] = {}
        expected = logits(subject.model, subject.test)
        engines[FLOAT], path = float_engine(subject, _own(Path(folder), FLOAT))
        rows = [_row(FLOAT, subject, expected, engines[FLOAT], 0.0)]
        for name, make in makers.items():
            start = time.perf_counter()
            try:
                engine = make(subject, Files(path, _own(Path(folder), name)))
                seconds = time.perf_counter() - start
                rows.append(_row(name, subject, expected, engine, seconds))
                engines[name] = engine
            except Missing as missing:
                rows.append({"method": name, "failure": str(missing)})
            except Exception as error:  # noqa: BLE001 (a peer that fails on a network is a result)
                rows.append({"method": name, "failure": f"{type(error).__name__}: {error}".splitlines()[0]})
            # a network takes minutes or hours: who waits, or stops it, has what is known
            print(f"{subject.name}: {rows[-1]}", flush=True)
        _add_latencies(rows, _timed(engines, subject.test[:1], rounds))
    classes = int(expected.argmax(1).unique().numel())
    return {"network": subject.name, "accuracy": accuracy_of(expected, subject), "classes": classes, "rows": rows}


def fidelity(expected: Tensor, found: Tensor) -> dict[str, Any]:
    """How near logits are: `sqnr_db`, None where they are equal, `agreement` and `differs`.

    Agreement is the share of images with one class; `differs` holds the places of the others.

    Args:
        expected: float32[images, classes].
        found: the same of the quantized network.
    """
    difference = compare((expected,), (found,))
    if difference.mismatch:
        raise ValueError(difference.mismatch)
    differs = (expected.argmax(1) != found.argmax(1)).nonzero().flatten().tolist()
    return {
        "sqnr_db": difference.sqnr_db if math.isfinite(difference.sqnr_db) else None,
        "agreement": 1 - len(differs) / len(expected),
        "differs": differs,
    }


def fastest(rows: list[dict[str, Any]], timings: Timings) -> str | None:
    """The scheme of ONNX Runtime with the smallest median time among those that were timed."""
    names = [row["method"] for row in rows if row["method"] in ORT and row["method"] in timings.seconds]
    return min(names, key=lambda name: timings.per_call(name).median, default=None)


def logits(run: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """What a network answers, a batch at a time."""
    return torch.cat([run(batch) for batch in images.split(_BATCH)])


def _row(name: str, subject: Subject, expected: Tensor, engine: Engine, seconds: float) -> dict[str, Any]:
    found = logits(engine.run, subject.test)
    return {
        "method": name,
        "failure": None,
        **fidelity(expected, found),
        "accuracy": accuracy_of(found, subject),
        "megabytes": None if engine.nbytes is None else engine.nbytes / 1e6,
        "seconds": seconds,
    }


def accuracy_of(found: Tensor, subject: Subject) -> float | None:
    """The share of test images of which the class is right; None where they have none."""
    return None if subject.labels is None else float((found.argmax(1) == subject.labels).double().mean())


def _timed(engines: Mapping[str, Engine], image: Tensor, rounds: int) -> Timings:
    candidates = {name: partial(engine.run, image) for name, engine in engines.items() if engine.timed}
    return interleave(candidates, rounds=rounds, warmup=3)


def _add_latencies(rows: list[dict[str, Any]], timings: Timings) -> None:
    best = fastest(rows, timings)
    for row in rows:
        name = row["method"]
        if name in timings.seconds:
            row["milliseconds"] = timings.per_call(name).median * 1e3
            row["latency"] = timings.ratio(name, FLOAT)._asdict()
            row["to_fastest_ort"] = None if best is None else timings.ratio(name, best)._asdict()


def _own(folder: Path, name: str) -> Path:
    path = folder / "".join(letter if letter.isalnum() else "_" for letter in name)
    path.mkdir()
    return path
