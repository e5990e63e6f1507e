"""What a frontend hands over."""

from __future__ import annotations

from typing import NamedTuple

from torch import fx

from fxopt.structure import Structure

__all__ = ["Captured"]


class Captured(NamedTuple):
    """A traced model.

    Attributes:
        module: flat graph: placeholders whose targets are the signature's names, output a tuple of tensors.
        outputs: the structure of the model's outputs.
        dynamic_batch: whether the graph holds for every batch size.
        note: what the user should know, such as why the batch is fixed; None if nothing.
        limits: for which sizes of free axes the graph holds, if not for all; None if nothing is known.
        edges: sizes, by the name of a free axis, from which on what was traced may not hold any more.
    """

    module: fx.GraphModule
    outputs: Structure
    dynamic_batch: bool = True
    note: str | None = None
    limits: str | None = None
    edges: tuple[tuple[str, int], ...] = ()
