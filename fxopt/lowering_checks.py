"""What is checked before a program is lowered, and of the engine after that, whatever the backend."""

from __future__ import annotations

from fxopt.analysis.identities import is_identity
from fxopt.analysis.measurements import measured
from fxopt.backend import Backend, Engine
from fxopt.errors import BackendError
from fxopt.ops import DROPOUTS, MODE_DEPENDENT
from fxopt.parity import Expected, disagreement
from fxopt.program import Program

__all__ = ["check_free_axes", "check_parity", "refuse_fake_quantization", "refuse_training"]


def refuse_training(program: Program, backend: Backend) -> None:
    """An engine for inference must not be made from layers that would answer otherwise in training mode.

    Raises:
        BackendError: naming the first such layer.
    """
    for node in program.nodes:
        module = program.module_of(node)
        op = program.op(node)
        if module is not None and module.training and op in MODE_DEPENDENT:
            raise BackendError(
                f"{node.target} is in training mode, and {backend.name} runs inference: "
                "call model.eval() before compiling"
            )
        if module is None and op in DROPOUTS and not is_identity(program, node):
            raise BackendError(
                f"{node.name} is a dropout that the model never switches off, and {backend.name} runs inference: "
                "pass training=self.training to it"
            )


def refuse_fake_quantization(program: Program, backend: Backend) -> None:
    """An engine for inference would compute in floating point what is meant to become integers.

    Raises:
        BackendError: naming the first fake quantization.
    """
    for node in program.nodes:
        if program.op(node) in ("fake_quantize", "fake_quantized_weight"):
            raise BackendError(
                f"{node.target} is fake quantization, which trains, and {backend.name} runs inference: "
                "put freeze_quantization into passes"
            )


def check_free_axes(program: Program, engine: Engine, backend: Backend) -> None:
    """What was asked for is not dropped in silence, whatever the backend does.

    Raises:
        BackendError: naming the first free axis that the engine fixes.
    """
    for axis in program.free_axes:
        fixed = next((place for place in axis.places if engine.inputs[place[0]].shape[place[1]] is not None), None)
        if fixed is not None:
            raise BackendError(
                f"{backend.name} cannot keep {axis.name} free: its engine takes {engine.inputs[fixed[0]]}. "
                "Leave the axis out of dynamic_axes, or use another backend"
            )


def check_parity(program: Program, engine: Engine, backend: Backend) -> None:
    """Compares the engine with the program: example inputs, other sizes of free axes, another batch if it takes that.

    Raises:
        BackendError: if they are further apart than rounding explains, and noise on integers.
    """
    expected = measured(program, Expected.of)
    difference = disagreement(program, engine, backend, expected)
    if difference is not None:
        integers = "Try another backend, or keep layers in float by quantize's min_sqnr_db or ignore. "
        raise BackendError(
            f"the {backend.name} engine answers differently from the program: {difference}. "
            f"{integers if expected.moved else ''}"
            'verify="structure" compiles it all the same, as is right for a model that draws random numbers; '
            "please report one that does not."
        )
