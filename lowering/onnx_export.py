"""From a program to an `OnnxModel`, with a dynamic batch where the exporter can keep one.

The exporter specialises sizes 0 and 1, so a dynamic batch is exported from an example of at least 2. Whether the batch
really stayed dynamic is read from the exported graph, not assumed.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fxopt.backend import FixedBatchWarning
from fxopt.errors import BackendError
from fxopt.lowering.onnx_integers import PACKED_OPSET, four_bit_tensors, in_four_bits, spell_integers
from fxopt.lowering.onnx_legalize import legalize
from fxopt.lowering.onnx_model import OnnxModel
from fxopt.masking import without_masks
from fxopt.ops import HELD

if TYPE_CHECKING:
    import onnx_ir

    from fxopt.program import Program

__all__ = ["Exported", "export"]

_log = logging.getLogger(__name__)

_EXPORTER_LOGGERS = ("torch.onnx", "onnxscript", "onnx_ir")
_BATCH = "batch"
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
        opset_21: whether that version of ONNX is needed to say what they are.
    """

    names: frozenset[str]
    four_bits: Mapping[str, tuple[int, int]]
    opset_21: bool

    @classmethod
    def of(cls, program: Program) -> _Held:
        """Those of a program."""
        ops = {str(node.target): op for node in program.nodes if (op := program.op(node)) in HELD}
        names = frozenset(f"{path}.codes" for path in ops)
        return cls(names, four_bit_tensors(program), "packed_weight" in ops.values())


def export(program: Program, *, dynamic_batch: bool) -> Exported:
    """The program as ONNX. Input names are those of the signature; output names are made from their paths.

    Raises:
        BackendError: if the exporter fails with a fixed batch too.
    """
    program = legalize(without_masks(program))
    held = _Held.of(program)
    program = spell_integers(program)
    axes = program.batch.inputs if dynamic_batch and program.batch is not None else ()
    if not axes:
        return Exported(_export_or_raise(program, held), False, [])
    reason = ""
    try:
        exported = _export(program, axes, held)
    except Exception as error:  # noqa: BLE001 (whatever it is becomes the reason in the warning and the note)
        reason = f"the exporter failed: {_summary(error)}"
        _log.debug("export with a dynamic batch failed", exc_info=True)
    else:
        lost = [program.signature.names[index] for index in axes if not _is_free(exported.graph.inputs[index])]
        if not lost:
            return Exported(OnnxModel.from_ir(exported), True, [])
        reason = f"the exporter fixed the batch of {', '.join(lost)}"
    fallback = _export_or_raise(program, held)
    assert program.batch is not None
    note = f"fixed batch of {program.batch.size}: {reason}"
    warnings.warn(
        f"the engine takes a {note}. Pass dynamic_batch=False to accept that without a warning.",
        FixedBatchWarning,
        stacklevel=2,
    )
    return Exported(fallback, False, [note])


def _export_or_raise(program: Program, held: _Held) -> OnnxModel:
    try:
        return OnnxModel.from_ir(_export(program, (), held))
    except Exception as error:
        raise BackendError(
            f"torch.onnx.export cannot export this program: {_summary(error)}. backend='eager' runs it without that."
        ) from error


def _export(program: Program, axes: Sequence[int], held: _Held) -> onnx_ir.Model:
    import onnx_ir.passes.common as ir_passes
    from onnxscript.optimizer import optimize_ir

    inputs = program.example_inputs
    if axes and program.batch is not None and program.batch.size < 2:
        inputs = program.inputs_with_batch(2)
    shapes = tuple({0: _BATCH} if index in axes else None for index in range(len(inputs)))

    def exported(*, optimize: bool) -> onnx_ir.Model:
        with torch.no_grad(), _quiet_exporter():
            found = torch.onnx.export(
                program.flat_module(),
                tuple(tensor.detach() for tensor in inputs),
                dynamo=True,
                verbose=False,
                dynamic_shapes=shapes if axes else None,
                input_names=list(program.signature.names),
                output_names=_output_names(program),
                optimize=optimize,
                opset_version=PACKED_OPSET if held.opset_21 else None,
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


def _is_free(value: onnx_ir.Value) -> bool:
    return value.shape is not None and len(value.shape) > 0 and not isinstance(value.shape[0], int)


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """What the exporter warns and logs is about its own insides; it goes to our debug log."""
    loggers = [logging.getLogger(name) for name in _EXPORTER_LOGGERS]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
    for warning in caught:
        _log.debug("exporter: %s", warning.message)


def _summary(error: BaseException) -> str:
    """The innermost cause on one line: the exporter wraps it into pages of advice."""
    cause: Any = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    text = re.sub(r"\x1b\[\d+m", "", str(cause))
    text = " ".join(text.split()) or type(cause).__name__
    return text if len(text) <= _REASON_LENGTH else text[: _REASON_LENGTH - 3] + "..."
