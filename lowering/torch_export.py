"""Exporting a flat module by `torch.export`, with a dynamic batch where it allows that."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from fxopt.backend import TensorSpec
from fxopt.errors import BackendError, first_line
from fxopt.program import Program

__all__ = ["example_inputs", "export", "quiet"]

_log = logging.getLogger(__name__)

_LOGGERS = ("torch", "torchao")


def example_inputs(program: Program, inputs: Sequence[TensorSpec]) -> tuple[torch.Tensor, ...]:
    """What a program is exported with: torch.export takes a batch of 0 or 1 for a constant."""
    if any(spec.shape and spec.shape[0] is None for spec in inputs):
        assert program.batch is not None
        return program.inputs_with_batch(max(2, program.batch.size))
    return program.example_inputs


def export(
    module: nn.Module, examples: Sequence[torch.Tensor], inputs: Sequence[TensorSpec]
) -> tuple[ExportedProgram, str]:
    """Exports a module.

    Args:
        module: takes and gives flat tensors.
        examples: that it is called with.
        inputs: of which an axis 0 without a size is to stay free.

    Returns:
        The exported program, and why its batch is that of the examples where it was to be free; "" if it is free.

    Raises:
        BackendError: if it cannot be exported with a fixed batch either.
    """
    shapes = tuple({0: Dim.DYNAMIC} if spec.shape and spec.shape[0] is None else None for spec in inputs)
    reason = ""
    with quiet():
        if any(shapes):
            try:
                return _export(module, examples, shapes), ""
            except Exception as error:  # noqa: BLE001 (whatever it is becomes the reason)
                _log.debug("export with a dynamic batch failed", exc_info=True)
                reason = first_line(error)
        try:
            return _export(module, examples, None), reason
        except Exception as error:
            raise BackendError(f"torch.export cannot export this program: {first_line(error)}") from error


def _export(module: nn.Module, examples: Sequence[torch.Tensor], shapes: Any) -> ExportedProgram:
    # torch.export marks the tensors that it is given as dynamic, and leaves the marks if it fails
    return torch.export.export(module, tuple(tensor.detach() for tensor in examples), dynamic_shapes=shapes)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What torch warns and logs here is about its own insides; warnings go to our debug log."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
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
