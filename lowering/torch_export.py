"""Exporting a flat module by `torch.export`, with free axes, and a dynamic batch where it allows that."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from fxopt.backend import TensorSpec
from fxopt.errors import BackendError, first_line
from fxopt.free_axes import BATCH, resized
from fxopt.frontends.exported_sizes import input_values
from fxopt.program import Program

__all__ = ["example_inputs", "export", "quiet"]

_log = logging.getLogger(__name__)

_LOGGERS = ("torch", "torchao")
_SMALLEST = 2  # torch.export takes smaller sizes for constants


def example_inputs(program: Program, inputs: Sequence[TensorSpec]) -> tuple[torch.Tensor, ...]:
    """What a program is exported with: torch.export takes a batch of 0 or 1, and sizes that agree, for constants."""
    examples = program.inputs_at_other_sizes() if program.free_axes else program.example_inputs
    free = BATCH in program.axis_names(batch=any(spec.shape and spec.shape[0] is None for spec in inputs)).values()
    if free and program.batch is not None and program.batch.size < _SMALLEST:
        return resized(examples, {tuple((index, 0) for index in program.batch.inputs): _SMALLEST})
    return examples


def export(
    module: nn.Module, examples: Sequence[torch.Tensor], free: Mapping[tuple[int, int], str]
) -> tuple[ExportedProgram, str]:
    """Exports a module.

    Args:
        module: takes and gives flat tensors.
        examples: that it is called with.
        free: names of the axes that are to stay free, by flat input and axis, as `Program.axis_names` gives them.

    Returns:
        The exported program, and why its batch is that of the examples where it was to be free; "" if it is free.

    Raises:
        BackendError: if it cannot be exported with a fixed batch either.
    """
    others = {place: name for place, name in free.items() if name != BATCH}
    reason = ""
    with quiet():
        if len(others) < len(free):
            try:
                return _export(module, examples, free), ""
            except Exception as error:  # noqa: BLE001 (whatever it is becomes the reason)
                _log.debug("export with a dynamic batch failed", exc_info=True)
                reason = first_line(error)
        try:
            return _export(module, examples, others), reason
        except Exception as error:
            raise BackendError(f"torch.export cannot export this program: {first_line(error)}") from error


def _export(
    module: nn.Module, examples: Sequence[torch.Tensor], free: Mapping[tuple[int, int], str]
) -> ExportedProgram:
    """The program with these axes free."""
    shapes: list[dict[int, Any]] = [{} for _ in examples]
    for (index, axis), name in free.items():
        # the sizes of other axes may have to be multiples of something
        shapes[index][axis] = Dim.DYNAMIC if name == BATCH else Dim.AUTO
    dynamic = tuple(item or None for item in shapes) if free else None
    # torch.export marks the tensors that it is given as dynamic, and leaves the marks if it fails
    given = tuple(tensor.detach() for tensor in examples)
    exported = torch.export.export(module, given, dynamic_shapes=dynamic)
    values = input_values(exported)
    fixed = next((name for (index, axis), name in free.items() if isinstance(values[index].shape[axis], int)), None)
    if fixed is not None:
        raise BackendError(f"torch.export fixed {fixed}: a value in the program depends on it")
    return exported


@contextlib.contextmanager
def quiet(names: Sequence[str] = _LOGGERS) -> Iterator[None]:
    """What torch and its tools warn and log is about their own insides; warnings go to our debug log.

    Args:
        names: of the loggers that are kept silent below errors.
    """
    loggers = [logging.getLogger(name) for name in names]
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
        _log.debug("torch: %s", warning.message)
