"""The stages that every benchmark over a suite begins with: the model is built, and captured."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from benchmarks.subject import Subject, recorded_warnings
from benchmarks.suites import Suite

if TYPE_CHECKING:
    from fxopt.program import Program


class Beginning:
    """One model on its way; each method is a stage that builds on those before and returns what it measured.

    Attributes:
        subject: the model, once it is built.
        program: the same captured, once it is.
    """

    subject: Subject
    program: Program

    def __init__(self, name: str, suite: Suite) -> None:
        self._name = name
        self._suite = suite

    def build(self) -> Mapping[str, Any]:
        """The model with random weights and statistics, its inputs, and what it answers."""
        self.subject = Subject(self._name, self._suite)
        return self.subject.description

    def capture(self) -> Mapping[str, Any]:
        """`fxopt.capture` on a batch of 1."""
        import fxopt

        with recorded_warnings() as messages:
            start = time.perf_counter()
            self.program = fxopt.capture(self.subject.model, self.subject.judge.inputs[1])
            seconds = time.perf_counter() - start
        cost = self.program.cost()
        return {
            "seconds": round(seconds, 2),
            "frontend": self.program.frontend,
            "macs": cost.macs,
            "params": cost.params,
            "nodes": len(self.program.nodes),
            "warnings": messages,
            "notes": list(self.program.report.notes),
        }
