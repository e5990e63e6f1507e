"""What fxopt does with one model: capture, find_channels, PruneChannels, the exactness property, the ONNX engine."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from benchmarks.beginning import Beginning
from benchmarks.engine import onnx_engine
from benchmarks.numerics import Float64
from benchmarks.prune_channels.row import BARS, RATIO, locked_reasons
from benchmarks.silenced import run_silenced
from benchmarks.subject import Judge, recorded_warnings
from benchmarks.suites import Suite
from benchmarks.sweep.worker import Stage

if TYPE_CHECKING:
    from fxopt.passes_base import Rewrite
    from fxopt.program import Program


def stages(name: str, suite: Suite) -> Mapping[str, Stage]:
    """The stages of one model."""
    way = _Way(name, suite)
    return {
        "build": Stage(way.build),
        "capture": Stage(way.capture),
        "analysis": Stage(way.analysis),
        "prune": Stage(way.prune),
        "exactness": Stage(way.exactness, needed=False),
        "engine": Stage(way.engine),
    }


class _Way(Beginning):
    """What is done with a captured model."""

    _pruned: Program
    _rewrites: list[Rewrite]

    def analysis(self) -> Mapping[str, Any]:
        """`find_channels` on the captured program."""
        from fxopt.analysis.channels import find_channels

        start = time.perf_counter()
        channels = find_channels(self.program)
        seconds = time.perf_counter() - start
        return {
            "seconds": round(seconds, 3),
            "groups": len(channels.groups),
            "channels": sum(len(group) for group in channels.groups),
            "locked_groups": sum(group.locked is not None for group in channels.groups),
            "locked_channels": sum(len(group) for group in channels.groups if group.locked is not None),
        }

    def prune(self) -> Mapping[str, Any]:
        """The pass, as `fxopt.optimize` runs it on what it captured; `errors` say how far the outputs moved.

        Without compensation: that the removal is exact says nothing of a program whose biases moved too.
        """
        from fxopt.manager import PassManager
        from fxopt.passes.prune_channels import PruneChannels

        with recorded_warnings() as messages:
            self._pruned = PassManager([PruneChannels(ratio=RATIO, compensate=False)], on_no_match="ignore").run(
                self.program
            )
        (report,) = self._pruned.report.passes
        self._rewrites = report.rewrites
        rolled_back = [str(skip) for skip in report.skips if "rolled back" in skip.why]
        return {
            "seconds": round(report.seconds, 2),
            "rewrites": len(report.rewrites),
            "rolled_back": rolled_back,
            "left_alone": locked_reasons(skip.why for skip in report.skips),
            "macs": report.after.macs,
            "params": report.after.params,
            "warnings": messages,
            **self.subject.judge.measure(self._pruned.module),
        }

    def exactness(self) -> Mapping[str, Any]:
        """The pruned program against the silenced one, in float64, by batch size."""
        from fxopt.analysis.channels import find_channels
        from fxopt.compare import compare
        from fxopt.verify import in_double

        whole, pruned = in_double(self.program), in_double(self._pruned)
        channels = find_channels(whole)
        gone = []
        for rewrite in self._rewrites:
            group = channels.group(rewrite.params["group"])
            if group is None or len(group) != rewrite.params["size"]:
                raise ValueError(f"in float64 there is no group {rewrite.params['group']}")
            kept = set(rewrite.params["kept"])
            gone += [unit for position, unit in enumerate(group.units) if position not in kept]
        errors: dict[str, float | None] = {}
        for batch, inputs in self.subject.judge.inputs.items():
            flat = [tensor.double() for tensor in self.program.signature.flatten_inputs(inputs, {})]
            with Float64():
                difference = compare(run_silenced(whole, channels, gone, flat), pruned.run(*flat))
            if difference.mismatch:
                raise ValueError(f"batch {batch}: {difference.mismatch}")
            errors[str(batch)] = difference.relative if math.isfinite(difference.relative) else None
        return {"removed": len(gone), "errors": errors}

    def engine(self) -> Mapping[str, Any]:
        """The ONNX engine of the pruned program, against that program."""
        call, facts = onnx_engine(self._pruned)
        return {**facts, **Judge(self._pruned.module, self.subject.judge.inputs).measure(call, BARS["engine"])}
