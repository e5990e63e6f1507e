"""Runs passes: plans, applies, verifies after each, rolls back what fails, and reports.

A pass works on a copy of the program; the copy replaces the program only when its checks hold. If they do not,
bisection finds the first rewrite that breaks them, that one is left out and reported, and the rest is tried again.
Exact passes are run until they find nothing more, and are compared with what the program answered at capture, or after
the last lossy pass: first in the program's own precision; what exceeds rounding there is applied once more in float64,
where an exact rewrite leaves no error.
"""

from __future__ import annotations

import fnmatch
import logging
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from fxopt import edit, registry
from fxopt.analysis.text import excerpt
from fxopt.compare import Difference
from fxopt.errors import FxoptError, InputError, PassError, PipelineError, VerificationError
from fxopt.passes_base import Pass, Plan, Rewrite, Skip
from fxopt.program import Program
from fxopt.registry import Step, make_steps
from fxopt.report import PassReport
from fxopt.verify import Reference, check_shapes, check_structure, in_double

__all__ = ["NoMatchWarning", "PassManager", "RollbackWarning"]

_log = logging.getLogger(__name__)
_DOUBLE_TOLERANCE = 1e-9
_PRECISE = 1e-4  # a larger tolerance says too little: what a coarse dtype hides is looked at in float64

Verify = Literal["numerics", "structure"]
OnNoMatch = Literal["warn", "error", "ignore"]
OnFailure = Literal["rollback", "raise"]


class NoMatchWarning(UserWarning):
    """A pass that was asked for changed nothing, or a pattern of its `ignore` matches nothing."""


class RollbackWarning(UserWarning):
    """A rewrite failed a check and was rolled back."""


class _Trial(NamedTuple):
    """A program after some rewrites, or why they cannot be kept."""

    program: Program
    failure: str | None = None
    difference: Difference | None = None
    note: str | None = None
    error: PassError | None = None


@dataclass
class PassManager:
    """Runs a sequence of passes over a program.

    Attributes:
        passes: passes, spec strings or names of pipelines.
        verify: "numerics" checks structure and outputs after each pass, "structure" the structure alone.
        on_no_match: what to do when a pass that was asked for changes nothing.
        on_failure: "rollback" leaves out the rewrites that fail a check and reports them; "raise" raises.
    """

    passes: str | Pass | Sequence[str | Pass]
    verify: Verify = "numerics"
    on_no_match: OnNoMatch = "warn"
    on_failure: OnFailure = "rollback"
    _steps: list[Step] = field(init=False)

    def __post_init__(self) -> None:
        _check_choice("verify", self.verify, Verify)
        _check_choice("on_no_match", self.on_no_match, OnNoMatch)
        _check_choice("on_failure", self.on_failure, OnFailure)
        self._steps = make_steps(self.passes)

    def run(self, program: Program) -> Program:
        """A new program, with all passes applied and reported in its `report`.

        Raises:
            PipelineError: if the passes cannot run in this order, or one changed nothing and `on_no_match` is "error".
            PassError: if a pass fails.
            VerificationError: if a check fails and `on_failure` is "raise".
        """
        _check_order([step.pass_ for step in self._steps], program)
        program = program.copy()
        reference = Reference.of(program) if self.verify == "numerics" and self._steps else None
        for step in self._steps:
            _log.info("running %s", step.pass_)
            program, reference = self._run_step(step, program, reference)
        return program

    def explain(self, program: Program) -> list[Plan]:
        """What each pass would do. Only a copy of the program is rewritten, for later passes to see what they would."""
        _check_order([step.pass_ for step in self._steps], program)
        program = program.copy()
        plans = []
        for step in self._steps:
            plan = Plan.of(step.pass_, program)
            plans.append(plan)
            try:
                program = _apply(step.pass_, program, plan.rewrites)
            except PassError as error:
                # running it would roll that back
                plan.skips.append(Skip(error.node or program.nodes[0].name, f"cannot be applied: {error}"))
        return plans

    def _run_step(self, step: Step, program: Program, reference: Reference | None) -> tuple[Program, Reference | None]:
        pass_ = step.pass_
        start = time.perf_counter()
        before = program
        rewrites: list[Rewrite] = []
        rolled_back: list[Skip] = []
        notes: list[str] = []
        difference: Difference | None = None
        rounds = len(program.graph.nodes) + 1  # each round of an exact pass leaves less to do
        for _ in range(rounds):
            plan = Plan.of(pass_, program)
            refused = {skip.node for skip in rolled_back}
            wanted = [rewrite for rewrite in plan.rewrites if rewrite.node not in refused]
            if not wanted:
                break
            trial, kept, failed = self._settle(pass_, program, wanted, reference)
            program = trial.program
            rewrites += kept
            rolled_back += failed
            difference = trial.difference or difference
            notes += [trial.note] if trial.note else []
            if not pass_.exact:
                break
        else:
            raise PassError(f"still finds rewrites after {rounds} rounds", pass_name=pass_.name)
        program.properties |= pass_.provides
        for pattern in _unmatched(getattr(pass_, "ignore", ()), before):
            notes.append(f"ignore: {pattern!r} matches no layer")
            if self.on_no_match != "ignore":
                warnings.warn(f"{pass_.name}: {notes[-1]}", NoMatchWarning, stacklevel=4)
        report = PassReport(
            name=pass_.name,
            config=str(pass_),
            rewrites=rewrites,
            skips=plan.skips + rolled_back,
            seconds=time.perf_counter() - start,
            before=before.cost(),
            after=program.cost(),
            max_abs_error=None if difference is None else difference.max_abs,
            sqnr_db=None if difference is None else difference.sqnr_db,
            notes=notes + list(reference.notes if reference is not None else ()),
        )
        program.report.passes.append(report)
        _log.info("%s: %d rewrites, %d left alone, %.2f s", pass_, len(rewrites), len(report.skips), report.seconds)
        for skip in rolled_back:
            warnings.warn(f"{pass_.name}: {skip}", RollbackWarning, stacklevel=4)
        if not rewrites:
            self._no_match(step, report)
        elif reference is not None and not pass_.exact:
            reference = reference.after(program)
        return program, reference

    def _settle(
        self, pass_: Pass, program: Program, rewrites: list[Rewrite], reference: Reference | None
    ) -> tuple[_Trial, list[Rewrite], list[Skip]]:
        """Applies as many of the rewrites as hold; the trial, those kept, and those rolled back with the reason."""
        kept: list[Rewrite] = []
        rolled_back: list[Skip] = []
        pending = rewrites
        trial = self._try(pass_, program, pending, reference)
        while trial.failure is not None:
            count = self._first_failing(pass_, program, kept, pending, reference)
            culprit = pending[count - 1]
            broken = self._try(pass_, program, [*kept, *pending[:count]], reference)
            failure = broken.failure or trial.failure
            if self.on_failure == "raise" and broken.error is not None:
                raise broken.error
            if self.on_failure == "raise":
                raise VerificationError(
                    pass_name=pass_.name, check=failure, rewrite=str(culprit), excerpt=excerpt(program, culprit.node)
                )
            rolled_back.append(Skip(culprit.node, f"rolled back ({culprit.what}): {failure}"))
            kept += pending[: count - 1]
            pending = pending[count:]
            trial = self._try(pass_, program, [*kept, *pending], reference)
        return trial, [*kept, *pending], rolled_back

    def _first_failing(
        self, pass_: Pass, program: Program, kept: list[Rewrite], pending: list[Rewrite], reference: Reference | None
    ) -> int:
        """The smallest number of pending rewrites that breaks a check, by bisection; all of them do."""
        holds, breaks = 0, len(pending)
        while breaks - holds > 1:
            middle = (holds + breaks) // 2
            if self._try(pass_, program, [*kept, *pending[:middle]], reference).failure is None:
                holds = middle
            else:
                breaks = middle
        return breaks

    def _try(self, pass_: Pass, program: Program, rewrites: list[Rewrite], reference: Reference | None) -> _Trial:
        """Applies the rewrites to a copy and checks it."""
        try:
            candidate = _apply(pass_, program, rewrites)
        except PassError as error:
            return _Trial(program, failure=str(error), error=error)
        problem = check_structure(program, candidate)
        if problem is None and reference is None:
            problem = check_shapes(program, candidate)
        if problem is not None or reference is None:
            return _Trial(candidate, failure=problem)
        difference = reference.difference(candidate) if pass_.exact else reference.loss(candidate)
        if difference.mismatch:
            return _Trial(candidate, failure=difference.mismatch)
        within = difference.within(reference.tolerance)
        if not pass_.exact or difference.relative == 0 or (within and reference.tolerance <= _PRECISE):
            return _Trial(candidate, difference=difference)
        # rounding shrinks with the precision, by a factor of 5e8, however much a model amplifies it; an error does not
        tolerance = min(1e-6, max(_DOUBLE_TOLERANCE, 1e-6 * difference.relative))
        proof = _prove_in_double(pass_, program, rewrites, tolerance)
        if isinstance(proof, str) and within and _casts(program):
            note = f"{difference} is within rounding; the program's own casts keep float64 from telling more"
            return _Trial(candidate, difference=difference, note=note)
        if isinstance(proof, str):
            return _Trial(candidate, failure=f"outputs changed: {difference}; {proof}", difference=difference)
        note = f"{difference} is rounding: applied in float64 the same rewrites leave {proof.relative:.1g}"
        return _Trial(candidate, difference=difference, note=note)

    def _no_match(self, step: Step, report: PassReport) -> None:
        if self.on_no_match == "ignore" or not step.explicit:
            return
        reasons = "; ".join(str(skip) for skip in report.skips[:3]) or "the program has no node it applies to"
        message = f"{step.pass_} changed nothing: {reasons}"
        if self.on_no_match == "error":
            raise PipelineError(f'{message}. Leave the pass out, or pass on_no_match="ignore".')
        warnings.warn(message, NoMatchWarning, stacklevel=5)


def _unmatched(patterns: object, program: Program) -> list[str]:
    """Those that match no path of a layer or a tensor, and no name of a node that calls no layer."""
    if not isinstance(patterns, tuple | list):
        return []  # of a pass that means something else by it
    held = {str(node.target) for node in program.nodes if node.op in ("call_module", "get_attr")}
    names = held | {node.name for node in program.nodes if node.op in ("call_function", "call_method")}
    return [item for item in patterns if isinstance(item, str) and not fnmatch.filter(names, item)]


def _apply(pass_: Pass, program: Program, rewrites: Iterable[Rewrite]) -> Program:
    """A copy of the program with the rewrites applied."""
    candidate = program.copy()
    for rewrite in rewrites:
        before = candidate.edits
        try:
            pass_.apply(candidate, rewrite)
        except PassError:
            raise
        except Exception as error:  # whatever goes wrong inside a pass is its failure: named, and chained
            message = f"{rewrite.what}: {type(error).__name__}: {error}"
            raise PassError(message, pass_name=pass_.name, node=rewrite.node) from error
        if candidate.edits == before:
            raise PassError(f"{rewrite.what}: apply changed nothing", pass_name=pass_.name, node=rewrite.node)
    try:
        edit.clean(candidate)
    except RuntimeError as error:
        raise PassError(f"the graph is not well formed: {error}", pass_name=pass_.name) from error
    return candidate


def _prove_in_double(pass_: Pass, program: Program, rewrites: list[Rewrite], tolerance: float) -> Difference | str:
    """The difference that the rewrites make in float64, or why they are not proven exact there."""
    try:
        double = in_double(program)
        difference = Reference.of(double).difference(_apply(pass_, double, rewrites))
    except (FxoptError, RuntimeError) as error:
        return f"and float64 cannot tell ({error})"
    return difference if difference.within(tolerance) else f"in float64 too: {difference}"


def _casts(program: Program) -> bool:
    """Whether the program converts types by itself: then its float64 twin is not in float64 throughout."""
    return any(program.op(node) in ("to", "float") or "half" in program.op(node) for node in program.graph.nodes)


def _check_order(passes: Sequence[Pass], program: Program) -> None:
    """Simulates what the passes require, refuse and provide.

    Raises:
        PipelineError: naming both passes, and what to do.
    """
    provided_by = dict.fromkeys(program.properties, "the program")
    for index, pass_ in enumerate(passes):
        for name in sorted(pass_.requires - provided_by.keys()):
            later = next((other.name for other in passes[index:] if name in other.provides), None)
            found = later or " or ".join(other for other, kind in registry.passes().items() if name in kind.provides)
            advice = f"put {found} before it" if found else "add a pass that provides it"
            raise PipelineError(f"{pass_.name} requires a program that is {name!r}: {advice}")
        for name in sorted(pass_.refuses & provided_by.keys()):
            owner = provided_by[name]
            if owner == "the program":
                raise PipelineError(
                    f"{pass_.name} cannot run on a program that is {name!r} already: run it before the pass that made "
                    "it so, or capture program.module anew to have each layer looked at"
                )
            raise PipelineError(
                f"{pass_.name} cannot run on a program that is {name!r} already, which {owner} made it: "
                f"put {pass_.name} before {owner}"
            )
        provided_by.update(dict.fromkeys(pass_.provides, pass_.name))


def _check_choice(option: str, value: str, choices: object) -> None:
    allowed = getattr(choices, "__args__", ())
    if value not in allowed:
        raise InputError(f"{option} must be one of {', '.join(map(repr, allowed))}, not {value!r}")
