"""The part `parity`: every network on every backend in every precision, against the eager program; saved and loaded."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

import fxopt
from benchmarks.backends.subjects import SUBJECTS, Subject
from benchmarks.kept import kept
from benchmarks.results import Table, save, shorten, verdict_data, verdict_lines
from fxopt import Program
from fxopt.backend import Backend
from fxopt.compare import compare, worst
from fxopt.errors import FxoptError, first_line
from fxopt.integer_scheme import Scheme
from fxopt.manager import PassManager
from fxopt.parity import Expected, disagreement
from fxopt.progress import progress
from fxopt.registry import make_backend

__all__ = ["BACKENDS", "PRECISIONS", "run", "verdicts"]

BACKENDS = ("eager", "onnx", "openvino", "inductor", "tensorrt_rtx", "tensorrt")


class Precision(NamedTuple):
    """A precision: the passes that make it of the optimised program, and how far an engine may be from eager.

    Attributes:
        tolerance: largest difference of an output over the largest output; None: as `compile` has it.
        half: whether it has 16 bits, which not every runtime computes with.
    """

    passes: tuple[str, ...]
    tolerance: float | None
    half: bool = False


PRECISIONS: Mapping[str, Precision] = {
    "fp32": Precision((), 1e-3),
    "fp16": Precision(("cast_precision(dtype='float16')",), 2e-2, half=True),
    "bf16": Precision(("cast_precision(dtype='bfloat16')",), 6e-2, half=True),
    # held to what noise on integers leaves of the outputs, see fxopt/parity.py
    "int8": Precision(("quantize",), None),
}
_BATCHES = (2, 5)

Row = dict[str, Any]


def run(arguments: argparse.Namespace) -> bool:
    """Lowers, runs, saves and loads everything.

    Returns:
        whether every bar is met.
    """
    path = arguments.out / "parity.json"
    measured = {"network": arguments.networks, "backend": arguments.backends, "precision": arguments.precisions}
    rows: list[Row] = kept(path, measured, wanted=arguments.keep, key="rows")
    with progress("lowering networks", len(arguments.networks), "networks") as advance:
        for name in arguments.networks:
            rows += _rows(SUBJECTS[name](), arguments.backends, arguments.precisions)
            # what takes long must not be lost
            save(path, _table(rows), {"bars": verdict_data(verdicts(rows)), "rows": rows})
            advance(1)
    return all(met for _, met in verdicts(rows))


def verdicts(rows: list[Row]) -> list[tuple[str, bool]]:
    """Each bar in words with its numbers, and whether it is met."""
    found = []
    for backend in dict.fromkeys(row["backend"] for row in rows):
        own = [row for row in rows if row["backend"] == backend]
        ran = [row for row in own if row["relative"] is not None]
        built = [row for row in own if row["bytes"] is not None and row["relative"] is None]
        refused = [_name(row) for row in own if row["bytes"] is None and not row["unavailable"]]
        if refused:
            # what a runtime has no kernels for in half precision is no fault; the table has the reasons
            half = all(PRECISIONS[row["precision"]].half for row in own if _name(row) in refused)
            found.append((f"{backend}: refused in 16 bits alone: {', '.join(refused)}", half))
        if built:
            lost = [_name(row) for row in built if row["reloaded"] != 0.0]
            text = f"{backend}: {len(built)} engines built, and loaded in a new process, where none can run"
            found.append((f"{text}; not so: {lost or 'none'}", not lost))
        if ran:
            wrong = [_name(row) for row in ran if not _right(row)]
            found.append((f"{backend}: {len(ran)} engines answer like eager; not so: {wrong or 'none'}", not wrong))
            lost = [_name(row) for row in ran if row["reloaded"] != 0.0]
            found.append((f"{backend}: they answer the same in a new process; not so: {lost or 'none'}", not lost))
    return found


def _right(row: Row) -> bool:
    """Whether an engine is near enough to eager; in 16 bits both are about as far from float32."""
    precision = PRECISIONS[row["precision"]]
    if precision.tolerance is None:
        return bool(row["allowed"])
    cost = 2 * (row.get("cost") or 0.0) if precision.half else 0.0
    return bool(row["relative"] <= max(precision.tolerance, cost))


def _rows(subject: Subject, backends: list[str], precisions: list[str]) -> list[Row]:
    rows: list[Row] = []
    made = [make_backend(name) for name in backends]
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        base = fxopt.optimize(
            subject.model, subject.inputs, ["default"], calibration=subject.calibration, on_no_match="ignore"
        )
        for precision in precisions:
            answers_of: dict[Scheme, _Answers] = {}
            for backend in made:
                row = _row(subject.name, precision, backend)
                rows.append(row)
                if row["reason"] is None:
                    _lower(row, base, answers_of, backend, Path(folder))
                print({key: value for key, value in row.items() if key != "layers"}, flush=True)
        loaded = _reload(Path(folder))
    for row in rows:
        row["reloaded"] = loaded.get(_name(row))
    return rows


def _row(network: str, precision: str, backend: Backend) -> Row:
    return {
        "network": network,
        "precision": precision,
        "backend": backend.name,
        "cost": None,
        "relative": None,
        "sqnr_db": None,
        "noise_db": None,
        "allowed": None,
        "reloaded": None,
        "bytes": None,
        "layers": None,
        "unavailable": (missing := backend.unavailable()),
        "reason": missing,
    }


class _Answers(NamedTuple):
    """A program and what it answers, by the inputs: in 16 bits that takes a processor long.

    Attributes:
        cost: how far that is from what the program in float32 answers.
        expected: what `compile` holds engines to; None where the precision has a tolerance of its own.
    """

    program: Program
    cases: list[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]
    cost: float
    expected: Expected | None

    @classmethod
    def of(cls, base: Program, scheme: Scheme, precision: Precision) -> _Answers:
        start = base.copy()
        start.scheme = scheme
        program = PassManager(precision.passes, verify="structure").run(start) if precision.passes else start
        cases = [(inputs, program.run(*inputs)) for inputs in _cases(program)]
        cost = worst(compare(base.run(*inputs), outputs) for inputs, outputs in cases).relative
        return cls(program, cases, cost, Expected.of(program) if precision.tolerance is None else None)


def _lower(row: Row, base: Program, answers_of: dict[Scheme, _Answers], backend: Backend, folder: Path) -> None:
    """Fills in a row: what the engine answers, or why there is none."""
    try:
        scheme = backend.scheme(base.target)
        if scheme not in answers_of:
            answers_of[scheme] = _Answers.of(base, scheme, PRECISIONS[row["precision"]])
        program, cases, row["cost"], held = answers_of[scheme]
        compiled = fxopt.lower(program, backend=backend, verify="structure")
        engine, info = compiled.engine, compiled.engine.info()
        row["bytes"], row["layers"] = info.get("bytes"), _counted(info.get("layers"))
        compiled.save(folder / _name(row))
        cannot = engine.cannot_run()
        if cannot is not None:
            row["reason"] = f"built, not run: {cannot}"
            return
        answers = [(inputs, outputs, engine(*inputs)) for inputs, outputs in cases]
    except FxoptError as error:
        row |= {"reason": first_line(error), "bytes": None, "layers": None}
        return
    difference = worst(compare(wanted, given) for _, wanted, given in answers)
    row["reason"] = difference.mismatch or None
    row["relative"] = difference.relative
    row["sqnr_db"] = min(difference.sqnr_db, 300.0)
    if held is not None:
        row["noise_db"] = min(worst(moved for case in held.moved for moved in case).sqnr_db, 300.0)
        row["allowed"] = disagreement(program, engine, backend, held) is None
    inputs, _, outputs = answers[-1]
    tensors: dict[str, Tensor] = {f"input{index}": tensor.contiguous() for index, tensor in enumerate(inputs)}
    tensors |= {f"output{index}": tensor.contiguous() for index, tensor in enumerate(outputs)}
    save_file(tensors, folder / f"{_name(row)}.safetensors")


def _cases(program: Program) -> list[tuple[Tensor, ...]]:
    first, *others = _BATCHES
    assert len(program.example_inputs[0]) == first
    return [program.example_inputs, *(program.inputs_with_batch(size, seed=3) for size in others)]


def _counted(layers: list[Mapping[str, Any]] | None) -> dict[str, int] | None:
    """How many layers an engine has by precision."""
    if layers is None:
        return None
    found: dict[str, int] = {}
    for layer in layers:
        precision = str(layer["precision"]) or "untyped"
        found[precision] = found.get(precision, 0) + 1
    return found


def _reload(folder: Path) -> dict[str, Any]:
    """What the engines answer in a new process: the largest difference to before, or why they could not."""
    # by its path: what else is in this package must not be imported
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("reload.py")), str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"the process that loads engines failed: {result.stderr[-2000:]}")
    said = json.loads(result.stdout.splitlines()[-1])
    assert not said["libraries"], f"loading an engine imported {said['libraries']}"
    engines: dict[str, Any] = said["engines"]
    return engines


def _name(row: Row) -> str:
    return f"{row['network']}-{row['precision']}-{row['backend']}"


def _table(rows: list[Row]) -> Table:
    columns = ("network", "precision", "backend", "relative error", "SQNR dB", "noise dB", "new process", "MB")
    cells = [
        [
            row["network"],
            row["precision"],
            row["backend"],
            "-" if row["relative"] is None else f"{row['relative']:.1e}",
            "-" if row["sqnr_db"] is None else f"{row['sqnr_db']:.0f}",
            "-" if row.get("noise_db") is None else f"{row['noise_db']:.0f}",
            "-" if row["reloaded"] is None else "same" if row["reloaded"] == 0.0 else str(row["reloaded"]),
            "-" if row["bytes"] is None else f"{row['bytes'] / 1e6:.1f}",
            ", ".join(f"{count} {name}" for name, count in (row["layers"] or {}).items()) or "-",
            shorten(row["reason"] or ""),
        ]
        for row in rows
    ]
    bounds = [f"{item.tolerance:g} in {name}" for name, item in PRECISIONS.items() if item.tolerance is not None]
    notes = [
        *verdict_lines(verdicts(rows)),
        f"relative error: largest difference to the eager program over the largest output, batches of {_BATCHES}; may "
        f"be {', '.join(bounds)}; in 16 bits twice what they cost in eager, where that is more; in int8 what "
        "fxopt/parity.py allows, by what noise on integers leaves of the outputs",
        "new process: engines saved, and loaded without the libraries of the models",
        f"torch {torch.__version__}",
    ]
    return Table("Every backend against eager", (*columns, "layers", "why not"), cells, notes)
