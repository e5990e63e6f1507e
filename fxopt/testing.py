"""What a pass is tested with: golden text, exact reasons, and everything that every pass must hold.

`assert_pass` runs a pass once and checks, besides what the test expects, what holds for all passes: `plan` is pure and
gives the same plan twice, rewrites survive JSON, the spec string round-trips, the caller's model is untouched, and an
exact pass changes no output and finds nothing in a second run. All functions raise `AssertionError`; no test framework
is needed.

    def test_folds() -> None:
        assert_pass(FoldBatchNorm(), model, x, rewrites=1, after='''
            %x = input : f32[1, 3, 8, 8]
            ...
        ''')
"""

from __future__ import annotations

import copy
import difflib
import json
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fxopt import edit
from fxopt.api import Compiled
from fxopt.compare import compare, rounding_tolerance
from fxopt.frontends.capture import Frontend, capture
from fxopt.manager import PassManager
from fxopt.passes_base import Pass, Plan, Rewrite, Skip
from fxopt.program import Program
from fxopt.random_model import RandomProgram, random_program
from fxopt.randomness import fixed_random_state
from fxopt.spec import configure, parse_spec
from fxopt.structure import flatten

__all__ = [
    "RandomProgram",
    "assert_equivalent",
    "assert_pass",
    "assert_skips",
    "assert_untouched",
    "model_state",
    "random_program",
]

_PLAIN = (bool, int, float, str, tuple, type(None), torch.dtype)


def assert_pass(
    pass_: Pass,
    model: nn.Module | Program,
    example_inputs: Any = None,
    *,
    before: str | None = None,
    after: str | None = None,
    rewrites: int | None = None,
    skips: Sequence[str | Skip] | None = None,
    tolerance: float | None = None,
    frontend: Frontend = "auto",
    calibration: Iterable[Any] | None = None,
) -> Program:
    """Runs a pass over a model and checks what it did.

    Args:
        pass_: the pass.
        model: a model, or a captured program; neither may be changed by the pass.
        example_inputs: a tuple of positional arguments, a mapping of keyword arguments, or one tensor; None for a
            program.
        before: the program's text before the pass; indentation does not matter.
        after: its text after the pass.
        rewrites: how many rewrites are applied, all rounds of an exact pass together.
        skips: the reasons of all nodes left alone, in the order of the plan: `why` alone, or the whole `Skip`.
        tolerance: relative error allowed on the outputs; None allows rounding for an exact pass, anything for a lossy
            one.
        frontend: how the model is captured.
        calibration: batches for a pass that looks at data.

    Returns:
        The program after the pass.

    Raises:
        AssertionError: telling which expectation failed, with a diff for texts.
        FxoptError: if the pass itself fails; an exact pass that changes an output raises `VerificationError`.
    """
    _assert_round_trip(pass_)
    state = None if isinstance(model, Program) else model_state(model)
    program = model
    if not isinstance(program, Program):
        program = capture(program, example_inputs, frontend=frontend, calibration=calibration)
    if before is not None:
        _assert_text(program.text(), before, "the program before the pass")
    plan = _assert_pure(pass_, program)
    _assert_replays(pass_, program, plan)
    text = program.text()
    result = PassManager([pass_], on_no_match="ignore", on_failure="raise").run(program)
    _assert_text(program.text(), text, "the program that the pass was given")
    report = result.report.passes[-1]
    if rewrites is not None and len(report.rewrites) != rewrites:
        raise AssertionError(f"expected {rewrites} rewrites, got {len(report.rewrites)}:\n{_lines(report.rewrites)}")
    if skips is not None:
        _assert_skips(report.skips, skips)
    if after is not None:
        _assert_text(result.text(), after, "the program after the pass")
    _assert_clean(result)
    if pass_.exact:
        _assert_settled(pass_, result)
    if pass_.exact or tolerance is not None:
        assert_equivalent(program, result, program.example_inputs, tolerance=tolerance, flat=True)
    if isinstance(model, nn.Module) and state is not None:
        assert_untouched(model, state)
        _assert_private(model, result)
    return result


def assert_skips(
    pass_: Pass,
    model: nn.Module | Program,
    example_inputs: Any = None,
    whys: Sequence[str | Skip] = (),
    *,
    frontend: Frontend = "auto",
    calibration: Iterable[Any] | None = None,
) -> None:
    """A pass must change nothing, and must give exactly these reasons (none: it finds no candidate).

    Raises:
        AssertionError: if it changes something, or gives other reasons.
    """
    program = model
    if not isinstance(program, Program):
        program = capture(program, example_inputs, frontend=frontend, calibration=calibration)
    assert_pass(pass_, program, after=program.text(), rewrites=0, skips=whys)


def assert_equivalent(
    one: nn.Module | Program | Compiled,
    other: nn.Module | Program | Compiled,
    inputs: Any,
    *,
    tolerance: float | None = None,
    flat: bool = False,
) -> None:
    """Two models must give the same outputs, in the same structure.

    Both run without gradients, from the same random state, on copies of the inputs; a model in training mode as a copy.

    Args:
        one: the reference.
        other: what is compared with it.
        inputs: what both are called with: a tuple of positional arguments, a mapping, or one tensor.
        tolerance: largest absolute difference over the reference's largest magnitude; None allows rounding.
        flat: `inputs` are the flat inputs of two programs, and flat outputs are compared.

    Raises:
        AssertionError: naming the output that differs, and by how much.
    """
    expected, structure = flatten(_answer(one, inputs, flat=flat))
    actual, other_structure = flatten(_answer(other, inputs, flat=flat))
    if structure != other_structure:
        raise AssertionError(f"the output structure differs:\n{structure}\n{other_structure}")
    for path, left, right in zip(structure.paths(), expected, actual, strict=True):
        allowed = rounding_tolerance([left]) if tolerance is None else tolerance
        difference = compare([left], [right])
        if not difference.within(allowed):
            raise AssertionError(f"{path} differs by more than {allowed:.1g}: {difference}")


def model_state(model: nn.Module) -> dict[str, Any]:
    """All that a model consists of, by readable keys: tensors and their identity, modes, hooks and plain attributes.

    `assert_untouched` compares a model with a state taken earlier.
    """
    state: dict[str, Any] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        name = path or "the model"
        state[f"class of {name}"] = type(module)
        state[f"children of {name}"] = [(key, id(child)) for key, child in module._modules.items()]
        for key, value in vars(module).items():
            if key.endswith("_hooks"):
                state[f"{key} of {name}"] = [id(hook) for hook in value.values()]
            elif isinstance(value, _PLAIN):
                state[f"{key} of {name}"] = value
    for path, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
        state[f"identity of {path}"] = (id(tensor), tensor.requires_grad, tensor.dtype, tensor.device)
        state[f"value of {path}"] = tensor.detach().clone()
        state[f"gradient of {path}"] = None if tensor.grad is None else tensor.grad.detach().clone()
    return state


def assert_untouched(model: nn.Module, before: Mapping[str, Any]) -> None:
    """A model must be as it was when `model_state` described it.

    Raises:
        AssertionError: naming the tensor, hook, mode or attribute that changed.
    """
    after = model_state(model)
    for key in [*before, *(key for key in after if key not in before)]:
        if key not in after or key not in before:
            raise AssertionError(f"the caller's model changed: {key} is {'gone' if key in before else 'new'}")
        if not _same(before[key], after[key]):
            raise AssertionError(f"the caller's model changed: {key} was {before[key]}, is {after[key]}")


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return compare([one], [other]).within(0.0)
    return bool(one == other) or (one != one and other != other)


def _assert_private(model: nn.Module, result: Program) -> None:
    owned = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers()) if tensor.numel()}
    for name, tensor in (*result.module.named_parameters(), *result.module.named_buffers()):
        if tensor.numel() and tensor.data_ptr() in owned:
            raise AssertionError(f"{name} of the program shares its memory with the caller's model")


def _assert_round_trip(pass_: Pass) -> None:
    spec = str(pass_)
    name, options = parse_spec(spec)
    if name != pass_.name or configure(type(pass_), options) != pass_:
        raise AssertionError(f"the spec string {spec!r} does not parse to an equal pass")


def _assert_pure(pass_: Pass, program: Program) -> Plan:
    """Plans twice, and once more on a copy: all plans must be equal, and the program as it was."""
    text, tensors = program.text(), _values(program)
    plans = [Plan.of(pass_, subject) for subject in (program, program, program.copy())]
    if plans[0] != plans[1] or plans[0] != plans[2]:
        other = plans[1] if plans[0] != plans[1] else plans[2]
        raise AssertionError(_diff(str(plans[0]), str(other), "the first plan", "another plan of the same program"))
    _assert_text(program.text(), text, "the program after planning")
    for name, value in _values(program).items():
        if not _same(tensors.get(name), value):
            raise AssertionError(f"plan wrote into {name}")
    return plans[0]


def _assert_replays(pass_: Pass, program: Program, plan: Plan) -> None:
    """A plan that went through JSON must do the same as the plan itself, and neither may write into a shared tensor."""
    tensors = _values(program)
    texts = []
    stored = [Rewrite(**json.loads(json.dumps(rewrite._asdict()))) for rewrite in plan.rewrites]
    for rewrites in (plan.rewrites, stored):
        candidate = program.copy()
        for rewrite in rewrites:
            pass_.apply(candidate, rewrite)
        edit.clean(candidate)
        texts.append(candidate.text())
    _assert_text(texts[1], texts[0], "the program after a plan that went through JSON")
    for name, value in _values(program).items():
        if not _same(tensors.get(name), value):
            raise AssertionError(f"apply wrote into {name}, which copies of the program share: assign a new tensor")


def _values(program: Program) -> dict[str, torch.Tensor]:
    module = program.module
    return {name: item.detach().clone() for name, item in (*module.named_parameters(), *module.named_buffers())}


def _assert_clean(program: Program) -> None:
    """Nothing dead may be left: `edit.clean` finds no more."""
    copied = program.copy()
    edit.clean(copied)
    _assert_text(copied.text(), program.text(), "the program without dead code")
    unused = _values(program).keys() - _values(copied).keys()
    if unused:
        raise AssertionError(f"tensors that no node uses: {', '.join(sorted(unused))}")


def _assert_settled(pass_: Pass, result: Program) -> None:
    again = PassManager([pass_], on_no_match="ignore", on_failure="raise").run(result)
    if again.report.passes[-1].rewrites:
        raise AssertionError(f"a second run still rewrites:\n{_lines(again.report.passes[-1].rewrites)}")
    _assert_text(again.text(), result.text(), "the program after a second run")


def _assert_skips(actual: Sequence[Skip], expected: Sequence[str | Skip]) -> None:
    got = [skip if isinstance(wanted, Skip) else skip.why for skip, wanted in zip(actual, expected, strict=False)]
    got += [skip.why for skip in actual[len(expected) :]]
    if got != list(expected):
        raise AssertionError(_diff(_lines(expected), _lines(got), "expected skips", "actual skips"))


def _assert_text(actual: str, expected: str, what: str) -> None:
    wanted = textwrap.dedent(expected).strip()
    if actual.strip() != wanted:
        raise AssertionError(_diff(wanted, actual.strip(), f"expected: {what}", "actual"))


def _diff(expected: str, actual: str, expected_name: str, actual_name: str) -> str:
    lines = difflib.unified_diff(
        expected.splitlines(), actual.splitlines(), expected_name, actual_name, lineterm="", n=1000
    )
    return "texts differ\n" + "\n".join(lines)


def _lines(items: Iterable[object]) -> str:
    return "\n".join(str(item) for item in items) or "(none)"


def _answer(subject: nn.Module | Program | Compiled, inputs: Any, *, flat: bool) -> Any:
    inputs = copy.deepcopy(inputs)
    runner: Any = subject.module if isinstance(subject, Program) else subject
    if isinstance(runner, nn.Module) and runner.training:
        runner = copy.deepcopy(runner)
    with torch.no_grad(), fixed_random_state():
        if flat and isinstance(subject, Program):
            return subject.run(*inputs)
        if isinstance(inputs, Mapping):
            return runner(**inputs)
        return runner(*inputs) if isinstance(inputs, tuple | list) else runner(inputs)
