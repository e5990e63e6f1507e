"""onnxoptimizer and the ONNX checker, run on the graph without its weights.

onnxoptimizer copies a model several times and stops at 2 GiB. Its passes need to know no more of a large weight than
its shape, which a graph input has too; so the weights are left out (`OnnxModel.as_inputs`), and the time no longer
depends on their size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fxopt.errors import BackendError, first_line
from fxopt.lowering.onnx_model import OnnxModel

if TYPE_CHECKING:
    import onnx

__all__ = ["SAFE_PASSES", "check", "optimize"]

# Passes that keep inputs, outputs and values as they are, up to rounding. Left out on purpose: those that rename or
# split for training (rename_input_output, split_init, split_predict), that change the inputs' types
# (rewrite_input_dtype), and those that fold a weight, which ONNX Runtime does itself with the weights at hand.
SAFE_PASSES = (
    "eliminate_nop_cast",
    "eliminate_nop_dropout",
    "eliminate_nop_flatten",
    "eliminate_nop_monotone_argmax",
    "eliminate_nop_pad",
    "eliminate_nop_concat",
    "eliminate_nop_split",
    "eliminate_nop_expand",
    "eliminate_nop_transpose",
    "eliminate_nop_reshape",
    "eliminate_nop_with_unit",
    "eliminate_identity",
    "eliminate_consecutive_idempotent_ops",
    "eliminate_if_with_const_cond",
    "extract_constant_to_initializer",
    "eliminate_shape_gather",
    "eliminate_slice_after_shape",
    "eliminate_shape_op",
    "fuse_consecutive_concats",
    "fuse_consecutive_reduce_unsqueeze",
    "fuse_consecutive_squeezes",
    "fuse_consecutive_unsqueezes",
    "fuse_consecutive_transposes",
    "fuse_consecutive_slices",
    "fuse_concat_into_reshape",
    "fuse_pad_into_conv",
    "fuse_pad_into_pool",
    "fuse_add_bias_into_conv",
    "fuse_matmul_add_bias_into_gemm",
    "fuse_transpose_into_gemm",
    "eliminate_common_subexpression",
    "eliminate_duplicate_initializer",
    "eliminate_deadend",
    "eliminate_unused_initializer",
)


def optimize(model: OnnxModel) -> tuple[OnnxModel, list[str]]:
    """The optimized model, checked; or the model as it is, with the reason.

    Raises:
        BackendError: if the model itself is not valid ONNX.
    """
    import onnxoptimizer

    if model.graph.functions:
        return model, [*check(model), "onnxoptimizer was left out: it drops local functions"]
    available = set(onnxoptimizer.get_available_passes())
    graph = model.as_inputs()
    try:
        optimized = onnxoptimizer.optimize(graph, [name for name in SAFE_PASSES if name in available])
        changed = _changed_interface(model.graph, optimized)
        if changed:
            return model, [*check(model), f"onnxoptimizer was left out: it changed {changed}"]
        _check_fully(optimized)
    except Exception as error:  # noqa: BLE001 (a C++ library; whatever it says becomes the note)
        return model, [*check(model), f"onnxoptimizer was left out: {first_line(error)}"]
    return model.with_graph(optimized), []


def check(model: OnnxModel) -> list[str]:
    """Runs the ONNX checker with shape inference. Returns notes.

    Raises:
        BackendError: if the model is not valid.
    """
    import onnx

    graph = model.as_inputs()
    try:
        _check_fully(graph)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as full:
        try:
            onnx.checker.check_model(graph)
        except onnx.checker.ValidationError as error:
            raise BackendError(f"the exported ONNX model is not valid: {first_line(error)}") from error
        return [f"the ONNX checker could not infer all shapes: {first_line(full)}"]
    return []


def _check_fully(graph: onnx.ModelProto) -> None:
    import onnx

    onnx.checker.check_model(graph, full_check=True)


def _changed_interface(before: onnx.ModelProto, after: onnx.ModelProto) -> str:
    """What of the inputs and outputs differs, or nothing."""
    weights_or_inputs = [item.name for item in after.graph.input]
    missing = [item.name for item in before.graph.input if item.name not in weights_or_inputs]
    if missing:
        return f"the inputs (lost {', '.join(missing)})"
    if [item.name for item in before.graph.output] != [item.name for item in after.graph.output]:
        return "the names of the outputs"
    return ""
