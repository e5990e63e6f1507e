"""The ONNX engine of a program, called like the model."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.subject import Caller, recorded_warnings

if TYPE_CHECKING:
    from fxopt.program import Program


def onnx_engine(program: Program) -> tuple[Caller, dict[str, Any]]:
    """Lowers a program, a dynamic batch asked for.

    Returns:
        What to call, and facts for the results: seconds, whether the batch is dynamic, bytes on disk, warnings.
    """
    from fxopt.lowering import OnnxBackend

    with recorded_warnings() as messages:
        start = time.perf_counter()
        engine = OnnxBackend(num_threads=torch.get_num_threads()).lower(program, dynamic_batch=True)
        seconds = time.perf_counter() - start

    def call(*inputs: Tensor) -> Any:
        return program.signature.unflatten_outputs(engine(*program.signature.flatten_inputs(inputs, {})))

    with tempfile.TemporaryDirectory(prefix="fxopt-engine-") as folder:
        engine.save(Path(folder))
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    return call, {
        "seconds": round(seconds, 2),
        "dynamic_batch": bool(engine.info()["dynamic_batch"]),
        "bytes": size,
        "warnings": messages,
    }
