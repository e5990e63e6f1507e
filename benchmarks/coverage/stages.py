"""What is done with one model: build, capture, fold_batch_norm, the default pipeline, the engine; what is measured."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from benchmarks.batch_norms import batch_norms, foldable
from benchmarks.beginning import Beginning
from benchmarks.coverage.row import BARS
from benchmarks.engine import onnx_engine
from benchmarks.subject import Caller, recorded_warnings
from benchmarks.suites import Suite
from benchmarks.sweep.worker import Stage

if TYPE_CHECKING:
    from fxopt.program import Program
    from fxopt.report import PassReport


def stages(name: str, suite: Suite) -> Mapping[str, Stage]:
    """The stages of one model."""
    way = _Way(name, suite)
    return {
        "build": Stage(way.build),
        "capture": Stage(way.capture),
        "fold_batch_norm": Stage(way.fold_batch_norm, needed=False),
        "default": Stage(way.default),
        "engine": Stage(way.engine),
    }


class _Way(Beginning):
    """What coverage does with a captured model."""

    _optimized: Program

    def capture(self) -> Mapping[str, Any]:
        return {**super().capture(), **self._measure(self.program.module, "capture")}

    def fold_batch_norm(self) -> Mapping[str, Any]:
        """The pass alone, and the batch norms that it leaves."""
        before = len(batch_norms(self.program))
        program, report, seconds = self._optimize(["fold_batch_norm"])
        return {
            "seconds": seconds,
            "before": before,
            "rewrites": sum(len(each.rewrites) for each in report),
            "left": len(batch_norms(program)),
            "skips": dict(Counter(skip.why for each in report for skip in each.skips)),
            "foldable_left": foldable(program),
            **self._measure(program.module, "fold_batch_norm"),
        }

    def default(self) -> Mapping[str, Any]:
        """The default pipeline."""
        self._optimized, report, seconds = self._optimize(["default"])
        cost = self._optimized.cost()
        return {
            "seconds": seconds,
            "passes": {each.name: len(each.rewrites) for each in report},
            "rolled_back": [str(skip) for each in report for skip in each.skips if "rolled back" in skip.why],
            "params": cost.params,
            "macs": cost.macs,
            "nodes": len(self._optimized.nodes),
            "left": len(batch_norms(self._optimized)),
            "foldable_left": foldable(self._optimized),
            **self._measure(self._optimized.module, "default"),
        }

    def engine(self) -> Mapping[str, Any]:
        """The ONNX engine of the optimised program."""
        call, facts = onnx_engine(self._optimized)
        return {**facts, **self._measure(call, "engine")}

    def _optimize(self, passes: list[str]) -> tuple[Program, list[PassReport], float]:
        """The captured program after these passes, their reports, and the seconds that passes and proofs took."""
        from fxopt.manager import PassManager

        start = time.perf_counter()
        with recorded_warnings():
            program = PassManager(passes, on_no_match="ignore").run(self.program)
        return program, program.report.passes, round(time.perf_counter() - start, 2)

    def _measure(self, candidate: Caller, stage: str) -> dict[str, Any]:
        return self.subject.judge.measure(candidate, BARS[stage])
