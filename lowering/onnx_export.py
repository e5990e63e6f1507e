"""From a program to an `OnnxModel`, with a dynamic batch where the exporter can keep one, and other free axes.

The exporter specialises sizes 0 and 1, so sizes that are to stay free are exported from an example of at least 2.
Whether they really stayed free is read from the exported graph, not assumed: a fixed batch is a warning, and any other
axis an error.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fxopt.backend import FixedBatchWarning
from fxopt.errors import BackendError
from fxopt.free_axes import BATCH, resized
from fxopt.lowering.onnx_integers import PACKED_OPSET, four_bit_tensors, in_four_bits, spell_integers
from fxopt.lowering.onnx_legalize import legalize
from fxopt.lowering.onnx_loops import spell_loops
from fxopt.lowering.onnx_model import OnnxModel
from fxopt.lowering.torch_export import quiet
from fxopt.masking import without_masks
from fxopt.ops import HELD

if TYPE_CHECKING:
    import onnx_ir

    from fxopt.program import Program

__all__ = ["Exported", "export"]

_log = logging.getLogger(__name__)

_EXPORTER_LOGGERS = ("torch.onnx", "onnxscript", "onnx_ir")
_SMALLEST = 2  # torch.export takes smaller sizes for constants
_REASON_LENGTH = 300


class Exported(NamedTuple):
    """What the export of a program gave.

    Attributes:
        model: the graph and its weights.
        dynamic_batch: whether it takes any batch size.
        notes: what differs from what was asked, with reasons.
    """

    model: OnnxModel
    dynamic_batch: bool
    notes: list[str]


class _Held(NamedTuple):
    """Tensors that weights are computed from to save bytes.

    Attributes:
        names: all of them; the exporter's optimizer would undo it.
        four_bits: the sizes of those of 4 bits.
        opset: the version of ONNX that says what they are; None: the exporter's own choice.
    """

    names: frozenset[str]
    four_bits: Mapping[str, tuple[int, int]]
    opset: int | None

    @classmethod
    def of(cls, program: Program, opset: int | None) -> _Held:
        """Those of a program, in the version that was asked for.

        Raises:
            BackendError: if that cannot say what they are.
        """
        ops = {str(node.target): op for node in program.nodes if (op := program.op(node)) in HELD}
        names = frozenset(f"{path}.codes" for path in ops)
        if "packed_weight" in ops.values():
            if opset is not None and opset < PACKED_OPSET:
                raise BackendError(
                    f"opset {opset} has no scales for blocks of a weight, which this program needs: "
                    f"ask for {PACKED_OPSET}, or for none"
                )
            opset = opset or PACKED_OPSET
        return cls(names, four_bit_tensors(program), opset)


def export(program: Program, *, dynamic_batch: bool, opset: int | None = None, dequantize: bool = False) -> Exported:
    """The program as ONNX. Input names are those of the signature; output names are made from their paths.

    Args:
        program: left unchanged.
        dynamic_batch: whether any batch size is wanted.
        opset: the version of ONNX's operators; None: the exporter's own choice.
        dequantize: see `spell_integers`.

    Raises:
        BackendError: if the exporter fails with a fixed batch too, or the program cannot be said in that version.
    """
    program = legalize(without_masks(program))
    held = _Held.of(program, opset)
    program = spell_integers(program, dequantize=dequantize)
    free = program.axis_names(batch=dynamic_batch)
    others = {place: name for place, name in free.items() if name != BATCH}
    if len(others) == len(free):
        return Exported(_export_or_raise(program, others, held), False, [])
    reason = ""
    try:
        exported = _export(program, free, held)
    except Exception as error:  # noqa: BLE001 (whatever it is becomes the reason in the warning and the note)
        reason = f"the exporter failed: {_summary(error)}"
        _log.debug("export with a dynamic batch failed", exc_info=True)
    else:
        lost = _fixed(exported, free)
        if not lost:
            return Exported(OnnxModel.from_ir(exported), True, [])
        names = [program.signature.names[index] for index, axis in lost if (index, axis) not in others]
        reason = f"the exporter fixed the batch of {', '.join(names)}" if names else "it was needed to fix others"
    fallback = _export_or_raise(program, others, held)
    assert program.batch is not None
    note = f"fixed batch of {program.batch.size}: {reason}"
    warnings.warn(
        f"the engine takes a {note}. Pass dynamic_batch=False to accept that without a warning.",
        FixedBatchWarning,
        stacklevel=2,
    )
    return Exported(fallback, False, [note])


def _export_or_raise(program: Program, free: Mapping[tuple[int, int], str], held: _Held) -> OnnxModel:
    with_sizes = f" with any {', '.join(dict.fromkeys(free.values()))}" if free else ""
    try:
        exported = _export(program, free, held)
    except Exception as error:
        raise BackendError(
            f"torch.onnx.export cannot export this program{with_sizes}: {_summary(error)}. "
            "backend='eager' runs it without that."
        ) from error
    lost = _fixed(exported, free)
    if lost:
        names = ", ".join(dict.fromkeys(free[place] for place in lost))
        raise BackendError(f"torch.onnx.export fixed {names}. backend='eager' runs the program without that.")
    return OnnxModel.from_ir(exported)


def _export(program: Program, free: Mapping[tuple[int, int], str], held: _Held) -> onnx_ir.Model:
    import onnx_ir.passes.common as ir_passes
    from onnxscript.optimizer import optimize_ir

    inputs = program.inputs_at_other_sizes()
    if BATCH in free.values() and program.batch is not None and program.batch.size < _SMALLEST:
        inputs = resized(inputs, {tuple((index, 0) for index in program.batch.inputs): _SMALLEST})
    axes: list[dict[int, str]] = [{} for _ in inputs]
    for (index, axis), name in free.items():
        axes[index][axis] = name
    shapes = tuple(item or None for item in axes)

    def exported(*, optimize: bool) -> onnx_ir.Model:
        with torch.no_grad(), quiet(_EXPORTER_LOGGERS):
            found = torch.onnx.export(
                program.flat_module(),
                tuple(tensor.detach() for tensor in inputs),
                dynamo=True,
                verbose=False,
                dynamic_shapes=shapes if free else None,
                input_names=list(program.signature.names),
                output_names=_output_names(program),
                optimize=optimize,
                opset_version=held.opset,
            )
        assert found is not None
        return found.model

    model = exported(optimize=not held.names)
    if held.names:
        in_four_bits(model, held.four_bits)
        optimize_ir(model, should_fold=lambda node: _may_fold(node, held.names))
    elif _lost(model):
        # seen where its optimizer joins two Clips: it forgets to register the bounds. ONNX Runtime optimizes too.
        _log.debug("the exporter's optimizer lost %s; exported without it", ", ".join(_lost(model)))
        model = exported(optimize=False)
    spell_loops(model)
    found = model.opset_imports.get("")
    if held.opset is not None and found != held.opset:
        raise BackendError(f"the exporter gave opset {found} in place of {held.opset}")
    # The exporter leaves a stack trace on every node: larger than the graph, and it names the user's paths.
    ir_passes.ClearMetadataAndDocStringPass()(model)
    return model


def _may_fold(node: onnx_ir.Node, held: frozenset[str]) -> bool | None:
    """False where it must not, None for what the optimizer would do by itself."""
    return False if any(value is not None and value.name in held for value in node.inputs) else None


def _lost(model: onnx_ir.Model) -> list[str]:
    """Values that nodes of the main graph take and that nothing gives."""
    given = {value.name for value in (*model.graph.inputs, *model.graph.initializers.values())}
    given.update(value.name for node in model.graph for value in node.outputs)
    taken = (value for node in model.graph for value in node.inputs if value is not None)
    return [str(value.name) for value in taken if value.name not in given]


def _output_names(program: Program) -> list[str]:
    outputs = program.signature.outputs
    paths = [] if outputs is None else outputs.paths()
    taken, names = set(program.signature.names), []
    for path in paths:
        base = re.sub(r"\W+", "_", path).strip("_") or "output"
        name, number = base, 1
        while name in taken:
            name, number = f"{base}_{number}", number + 1
        taken.add(name)
        names.append(name)
    return names


def _fixed(model: onnx_ir.Model, free: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The places, of those that were to be free, that have a size."""
    shapes = [value.shape for value in model.graph.inputs]
    return [(index, axis) for index, axis in free if (shape := shapes[index]) is None or isinstance(shape[axis], int)]


def _summary(error: BaseException) -> str:
    """The innermost cause on one line: the exporter wraps it into pages of advice."""
    cause: Any = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    text = re.sub(r"\x1b\[\d+m", "", str(cause))
    text = " ".join(text.split()) or type(cause).__name__
    return text if len(text) <= _REASON_LENGTH else text[: _REASON_LENGTH - 3] + "..."
