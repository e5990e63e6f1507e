"""What the modes of quantization have in common: candidates, decisions, and leaving out the worst."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from fxopt.passes_base import Rewrite, Skip
from fxopt.quantizers.sensitivity import LayerLoss, Units, layer_losses, leave_out

if TYPE_CHECKING:
    from fxopt.program import Program

__all__ = ["Quantizer"]


class Quantizer(ABC):
    """Plans and applies one mode of quantization. Subclasses are frozen dataclasses.

    Attributes:
        min_sqnr_db: ratio of signal to noise of the outputs that is reached by leaving the worst layers as they are;
            None: all are quantized.
    """

    min_sqnr_db: float | None

    def plan(self, program: Program) -> Iterator[Rewrite | Skip]:
        """What is done ahead, then what is done to each layer, and why others are left alone.

        Raises:
            InputError: if data are missing, or no layer can be quantized.
        """
        units, left = self.candidates(program)
        yield from left
        prepared, ahead = self.prepared(program, units)
        yield from ahead
        if self.min_sqnr_db is not None:
            yield from leave_out(prepared, units, self._quantized, self.min_sqnr_db)
        yield from self.decisions(prepared, units)

    def losses(self, program: Program) -> list[LayerLoss]:
        """What each layer costs when it alone is quantized, the worst first.

        Raises:
            InputError: as `plan`, or if there are no calibration data.
        """
        units, _ = self.candidates(program)
        return layer_losses(self.prepared(program, units)[0], units, self._quantized)

    @abstractmethod
    def candidates(self, program: Program) -> tuple[list[list[str]], list[Skip]]:
        """What can be quantized, one by one, and what cannot: see `Units`.

        Raises:
            InputError: if data are missing, or there is no layer to quantize.
        """

    @abstractmethod
    def decisions(self, program: Program, units: Units) -> Iterable[Rewrite]:
        """What is done to a prepared program for these to be quantized."""

    @abstractmethod
    def apply(self, program: Program, rewrite: Rewrite) -> None:
        """Carries out one decision; what a weight becomes is no part of the plan."""

    @abstractmethod
    def round_ahead(self, program: Program) -> None:
        """Rounds the weights of a prepared program, for its copies to know."""

    def prepared(self, program: Program, units: Units) -> tuple[Program, list[Rewrite | Skip]]:
        """The program as it is to be before anything is quantized, and the decisions that make it so, or do not."""
        return program, []

    def _quantized(self, program: Program, units: Units) -> Program:
        """A copy of a prepared program in which some are quantized."""
        self.round_ahead(program)
        found = program.copy()
        for decision in self.decisions(program, units):
            self.apply(found, decision)
        return found
