"""The part `pipelines`: a pipeline of every pass that the project has, lowered to every backend, on two networks.

No program takes all passes at once: some are alternatives, and some refuse what others leave. So there are three
pipelines, which together hold every pass that is registered; a pass that none holds is an error.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fxopt
from benchmarks.backends.subjects import SUBJECTS, Subject
from benchmarks.errors import BenchmarkError
from benchmarks.fashion_mnist import images, trained
from benchmarks.results import Table, save, shorten, verdict_data, verdict_lines
from fxopt import Program
from fxopt.backend import Backend
from fxopt.compare import compare
from fxopt.errors import FxoptError, first_line
from fxopt.integer_scheme import Scheme
from fxopt.manager import PassManager
from fxopt.registry import make_backend, passes

__all__ = ["PIPELINES", "run", "verdicts"]

_START = ("simplify", "merge_branches", "prune_channels(ratio=0.2)", "reestimate_batch_norm")

PIPELINES: dict[str, tuple[str, ...]] = {
    "integers": (
        *_START,
        "substitute_inverted_residual(steps=0)",
        "substitute_depthwise_separable(multiplier=1, max_error=0.5, fit='weights')",
        "factorize_low_rank(ratio=0.8)",
        "fold_batch_norm",
        "quantize",
    ),
    "trained integers": (*_START, "fold_batch_norm", "quantize(mode='qat')", "freeze_quantization"),
    "fewer weights": (*_START, "fold_batch_norm", "prune_weights(sparsity=0.5)", "cluster_weights(bits=4)"),
    "half precision": (*_START, "factorize_low_rank(ratio=0.8)", "fold_batch_norm", "cast_precision"),
}

Row = dict[str, Any]


def run(arguments: argparse.Namespace) -> bool:
    """Runs every pipeline on both networks, and lowers what comes of it to every backend.

    Returns:
        whether every bar is met.
    """
    left = sorted(set(passes()) - {spec.partition("(")[0] for specs in PIPELINES.values() for spec in specs})
    if left:
        raise BenchmarkError(f"no pipeline holds {', '.join(left)}: add it to PIPELINES")
    rows: list[Row] = []
    for subject in (_fashion(), SUBJECTS["resnet18"]()):
        for name, specs in PIPELINES.items():
            rows += _rows(subject, name, specs, arguments.backends)
            save(arguments.out / "pipelines.json", _table(rows), {"bars": verdict_data(verdicts(rows)), "rows": rows})
    return all(met for _, met in verdicts(rows))


def verdicts(rows: list[Row]) -> list[tuple[str, bool]]:
    """Each bar in words, and whether it is met: every backend that runs here takes every pipeline."""
    found = []
    for row in rows:
        text = f"{row['network']}, {row['pipeline']}, {row['backend']}: {row['reason'] or row['answer']}"
        if not row["unavailable"]:
            found.append((text, row["reason"] is None))
    return found


def _fashion() -> Subject:
    seen = images("train").first(512)
    batches = list(zip(seen.pixels.split(64), seen.labels.split(64), strict=True))
    model: nn.Module = trained()
    return Subject("resnet14", model, (seen.pixels[:2],), batches)


def _rows(subject: Subject, name: str, specs: tuple[str, ...], backends: list[str]) -> list[Row]:
    rows = []
    # what comes before the integers is the same for all backends
    split = next((place for place, spec in enumerate(specs) if spec.startswith("quantize")), len(specs))
    programs: dict[Scheme, Program] = {}
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        base = fxopt.optimize(
            subject.model,
            subject.inputs,
            list(specs[:split]),
            calibration=subject.calibration,
            on_no_match="ignore",
        )
        for backend in map(make_backend, backends):
            row: Row = {"network": subject.name, "pipeline": name, "backend": backend.name, "answer": None}
            row["unavailable"] = row["reason"] = backend.unavailable()
            rows.append(row)
            if row["reason"] is None:
                _lower(row, base, specs[split:], programs, backend, Path(folder) / backend.name)
            print(row, flush=True)
    done = next(iter(programs.values()), base).report.passes
    for row in rows:
        row["passes"] = [f"{item.name}: {len(item.rewrites)} rewrites" for item in done]
    return rows


def _lower(
    row: Row, base: Program, last: tuple[str, ...], programs: dict[Scheme, Program], backend: Backend, place: Path
) -> None:
    """Fills in a row: what the engine answers once it was saved and loaded, or why there is none."""
    try:
        scheme = backend.scheme(base.target)
        if scheme not in programs:
            start = base.copy()
            start.scheme = scheme
            programs[scheme] = PassManager(last).run(start) if last else start
        program = programs[scheme]
        fxopt.lower(program, backend=backend).save(place)
        engine = fxopt.load(place).engine
        cannot = engine.cannot_run()
        if cannot is not None:
            row["answer"] = f"built, not run: {cannot}"
            return
        with torch.no_grad():
            found = engine(*program.example_inputs)
        row["answer"] = str(compare(program.run(*program.example_inputs), found))
    except FxoptError as error:
        row["reason"] = first_line(error)


def _table(rows: list[Row]) -> Table:
    columns = ("network", "pipeline", "backend", "against eager", "why not")
    cells = [
        [row["network"], row["pipeline"], row["backend"], row["answer"] or "-", shorten(row["reason"] or "")]
        for row in rows
    ]
    done = dict.fromkeys(f"{row['network']}, {row['pipeline']}: {', '.join(row['passes'])}" for row in rows)
    notes = [*verdict_lines(verdicts(rows)), *done, "engines were saved, and loaded again"]
    return Table("Pipelines of all passes on every backend", columns, cells, notes)
