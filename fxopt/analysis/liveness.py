"""Which values of a program are needed until when, and how much calibration data can therefore be in memory at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from fxopt.analysis.shapes import TensorSpec, shapes

if TYPE_CHECKING:
    from fxopt.program import Program

__all__ = ["unused_after", "windows"]


def unused_after(program: Program) -> Mapping[fx.Node, list[fx.Node]]:
    """By node: the nodes whose values nothing needs once it has run."""
    last_user = {source: node for node in program.nodes for source in node.all_input_nodes}
    found: dict[fx.Node, list[fx.Node]] = {node: [] for node in program.nodes}
    for node in program.nodes:
        found[last_user.get(node, node)].append(node)
    return found


def windows(program: Program, memory: int) -> Iterator[list[tuple[Tensor, ...]]]:
    """The calibration batches, as many at a time as can be run operator by operator; at least one.

    Args:
        program: what they are for.
        memory: bytes that all values which are needed at the same time may take.

    Raises:
        InputError: if there are no calibration data, or they do not fit the model.
    """
    limit = memory / _peak_bytes(program)
    window: list[tuple[Tensor, ...]] = []
    size = 0.0
    for inputs in program.calibration_inputs():
        share = inputs[program.batch.inputs[0]].shape[0] / program.batch.size if program.batch is not None else 1.0
        if window and size + share > limit:
            yield window
            window, size = [], 0.0
        window.append(inputs)
        size += share
    yield window


def _peak_bytes(program: Program) -> int:
    """The most bytes of values that are needed at the same time in a run on the example inputs."""
    known = program.analysis(shapes)
    live = peak = 0
    for node, unused in unused_after(program).items():
        live += _bytes(known[node.name])
        peak = max(peak, live)
        live -= sum(_bytes(known[item.name]) for item in unused)
    return peak


def _bytes(spec: Any) -> int:
    if isinstance(spec, TensorSpec):
        return torch.Size(spec.shape).numel() * spec.dtype.itemsize
    return sum(_bytes(item) for item in spec) if isinstance(spec, tuple | list) else 0
