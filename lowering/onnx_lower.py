"""The ONNX model of a program, as the backends that read one share it: exported, optimized, checked."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

from fxopt.analysis.sparsity import two_of_four
from fxopt.lowering import onnx_export, onnx_optimize
from fxopt.lowering.onnx_model import OnnxModel

if TYPE_CHECKING:
    from fxopt.program import Program

__all__ = ["SPARSITY_KEY", "Lowered", "onnx_of"]

SPARSITY_KEY = "fxopt.sparsity_2_4"
"""Under it a model's metadata name the layers with two zeros in every four weights, separated by commas."""


class Lowered(NamedTuple):
    """The ONNX model of a program.

    Attributes:
        model: optimized, if that was asked for and possible.
        plain: as it was exported.
        dynamic_batch: whether it takes any batch size.
        notes: what differs from what was asked, with reasons.
        seconds: what each step took.
    """

    model: OnnxModel
    plain: OnnxModel
    dynamic_batch: bool
    notes: list[str]
    seconds: dict[str, float]


def onnx_of(
    program: Program, *, dynamic_batch: bool, optimize: bool, opset: int | None = None, dequantize: bool = False
) -> Lowered:
    """Exports a program.

    Args:
        program: left unchanged.
        dynamic_batch: whether any batch size is wanted.
        optimize: whether onnxoptimizer runs.
        opset: the version of ONNX's operators; None: the exporter's own choice.
        dequantize: whether all weights that are held as integers are said as DequantizeLinear.

    Raises:
        BackendError: if it cannot be exported, or is not valid ONNX.
    """
    started = time.perf_counter()
    exported = onnx_export.export(program, dynamic_batch=dynamic_batch, opset=opset, dequantize=dequantize)
    after_export = time.perf_counter()
    plain = exported.model
    fitting = two_of_four(program)
    if fitting:
        # for who builds an engine from the file: TensorRT looks for the pattern only where it is told to
        plain = plain.with_metadata(SPARSITY_KEY, ",".join(fitting))
    model, notes = onnx_optimize.optimize(plain) if optimize else (plain, onnx_optimize.check(plain))
    seconds = {"export": after_export - started, "optimize": time.perf_counter() - after_export}
    return Lowered(model, plain, exported.dynamic_batch, [*exported.notes, *notes], seconds)
