"""The program as it was before a pass began to rewrite it: what its rewrites are measured by."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from fxopt.analysis.measurements import keep, measured

if TYPE_CHECKING:
    from fxopt.program import Program

__all__ = ["keep_original", "original_of"]


def original_of(program: Program) -> Program:
    """The program as it was before anything was changed; a copy if nothing is changed yet."""
    return measured(program, _original) or program.copy()


def keep_original(program: Program, original: Program) -> None:
    """Remembers, once a program was edited, what `original_of` gave before."""
    keep(program, _original, cast("Program | None", original))


def _original(_: Program) -> Program | None:
    return None
