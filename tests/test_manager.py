"""The manager proves exact passes, measures lossy ones, finds and rolls back what breaks, and refuses wrong orders."""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import fxopt
from fxopt import NoMatchWarning, Pass, PassManager, Program, Rewrite, RollbackWarning, Skip, edit
from fxopt.errors import InputError, PassError, PipelineError, RegistryError, VerificationError

BATCH = 4
X = torch.rand(BATCH, 6, generator=torch.Generator().manual_seed(0)) + 0.05


def model(identities: int = 20) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(6, 6)]
    for _ in range(identities):
        layers += [nn.Identity(), nn.Tanh()]
    return nn.Sequential(*layers).eval()


@pytest.fixture
def program() -> Program:
    return fxopt.capture(model(), X)


def times_batch(x: torch.Tensor) -> torch.Tensor:
    """Wrong at every batch size but the example's."""
    return x * (x.shape[0] / BATCH)


@dataclass(frozen=True, kw_only=True)
class DropIdentity(Pass):
    """Exact, unless told to do one thing wrongly at the node `wrong`."""

    name: ClassVar[str] = "drop_identity"
    exact: ClassVar[bool] = True
    applied: ClassVar[list[str]] = []

    wrong: str = ""
    how: str = "scale"

    def plan(self, program: Program) -> Iterator[Rewrite | Skip]:
        for node in program.nodes:
            if program.op(node) == "identity":
                yield Rewrite(node.name, "drop")
            elif program.op(node) == "linear":
                yield Skip(node.name, "a linear layer is no identity")

    def apply(self, program: Program, rewrite: Rewrite) -> None:
        self.applied.append(rewrite.node)
        node = program.node(rewrite.node)
        source = node.all_input_nodes[0]
        if rewrite.node in self.wrong.split():
            self._apply_wrongly(program, node, source)
        else:
            edit.bypass(program, node, source)

    def _apply_wrongly(self, program: Program, node: Any, source: Any) -> None:
        if self.how == "scale":
            edit.replace(program, node, torch.mul, (source, 1.25))
        elif self.how == "batch":
            edit.replace(program, node, times_batch, (source,))
        elif self.how == "fixed batch":
            edit.replace(program, node, torch.reshape, (source, (BATCH, 6)))
        elif self.how == "nan":
            linear = next(item for item in program.nodes if program.op(item) == "linear")
            edit.set_tensor(program, linear, "bias", torch.full((6,), float("nan")))
        elif self.how == "shape":
            edit.replace(program, node, torch.sum, (source, 1))
        elif self.how == "malformed":
            late = program.nodes[-2]
            edit.set_arguments(program, node, (late,))
        elif self.how == "missing":
            node.target = "no.such.module"
            program._changed()
        elif self.how == "raise":
            raise ZeroDivisionError("by zero")
        elif self.how == "pass error":
            raise PassError("cannot", pass_name=self.name, node=node.name)


@dataclass(frozen=True, kw_only=True)
class Scale(Pass):
    """Lossy: scales what a node gives."""

    name: ClassVar[str] = "scale"
    by: float = 1.0
    op: str = "linear"

    def plan(self, program: Program) -> Iterator[Rewrite | Skip]:
        for node in program.nodes:
            if program.op(node) == self.op:
                yield Rewrite(node.name, f"scale by {self.by}", {"by": self.by})

    def apply(self, program: Program, rewrite: Rewrite) -> None:
        node = program.node(rewrite.node)
        scaled = edit.insert_before(program, node.next, torch.mul, (node, rewrite.params["by"]))
        for user in [user for user in node.users if user is not scaled]:
            user.replace_input_with(node, scaled)
        program._changed()


def run(program: Program, *passes: Pass | str, **options: Any) -> Program:
    return PassManager(list(passes), **options).run(program)


# --------------------------------------------------------------------------------------------------------- exact passes


def test_an_exact_pass_is_reported(program: Program) -> None:
    text = program.text()
    result = run(program, DropIdentity())
    (report,) = result.report.passes
    assert [rewrite.what for rewrite in report.rewrites] == ["drop"] * 20
    assert [str(skip) for skip in report.skips] == ["_0: a linear layer is no identity"]
    assert report.name == report.config == "drop_identity"
    assert report.max_abs_error == 0.0
    assert report.sqnr_db == math.inf
    assert report.seconds > 0
    assert report.before == report.after == program.cost()
    assert report.notes == []
    assert program.text() == text
    assert program.report.passes == []
    assert not any(result.op(node) == "identity" for node in result.nodes)


HOWS = {
    "scale": r"outputs changed: relative error .*; in float64 too: relative error",
    "batch": r"outputs changed: relative error .*; in float64 too: relative error",
    "fixed batch": r"an operator refuses its operands: shape '\[4, 6\]' is invalid",
    "nan": r"0\.bias holds NaN or infinity",
    "shape": r"output 0 has shape \(4,\) instead of \(4, 6\)",
    "malformed": r"the graph is not well formed: ",
    "missing": r"the graph is not well formed: .*no",
    "raise": r"drop_identity at _13: drop: ZeroDivisionError: by zero",
    "pass error": r"drop_identity at _13: cannot",
    "nothing": r"drop_identity at _13: drop: apply changed nothing",
}


@pytest.mark.parametrize("how", HOWS)
def test_the_one_wrong_rewrite_among_twenty_is_found_rolled_back_and_reported(program: Program, how: str) -> None:
    DropIdentity.applied.clear()
    with pytest.warns(RollbackWarning, match=rf"^drop_identity: _13: rolled back \(drop\): (?s:.*){HOWS[how]}"):
        result = run(program, DropIdentity(wrong="_13", how=how))
    (report,) = result.report.passes
    assert len(report.rewrites) == 19
    assert "_13" not in [rewrite.node for rewrite in report.rewrites]
    assert [skip.node for skip in report.skips] == ["_0", "_13"]
    assert [node.name for node in result.nodes if result.op(node) == "identity"] == ["_13"]
    torch.testing.assert_close(result.run(X)[0], program.run(X)[0])
    assert report.max_abs_error == 0.0
    # bisection: about 2 log2(20) trials of at most 20 rewrites (each failing one once more in float64), not 20
    assert DropIdentity.applied.count("_1") <= 12


def test_several_wrong_rewrites_are_all_found(program: Program) -> None:
    with pytest.warns(RollbackWarning) as caught:
        result = run(program, DropIdentity(wrong="_1 _21 _39"))
    assert [str(item.message).split(": ")[1] for item in caught] == ["_1", "_21", "_39"]
    (report,) = result.report.passes
    assert len(report.rewrites) == 17
    assert [node.name for node in result.nodes if result.op(node) == "identity"] == ["_1", "_21", "_39"]


def test_if_everything_is_wrong_nothing_is_kept() -> None:
    program = fxopt.capture(model(4), X)
    wrong = " ".join(node.name for node in program.nodes)
    with pytest.warns((RollbackWarning, NoMatchWarning)):
        result = run(program, DropIdentity(wrong=wrong))
    assert result.report.passes[0].rewrites == []
    assert len(result.report.passes[0].skips) == 5
    assert result.text() == program.text()


def test_on_failure_raise_names_pass_node_check_and_neighbourhood(program: Program) -> None:
    with pytest.raises(VerificationError, match="drop_identity: outputs changed") as caught:
        run(program, DropIdentity(wrong="_13"), on_failure="raise")
    error = caught.value
    assert error.pass_name == "drop_identity"
    assert error.rewrite == "_13: drop"
    assert error.check.startswith("outputs changed: relative error")
    assert "-> %_13 = identity[13](%_12)" in error.excerpt
    assert len(error.excerpt.splitlines()) == 7
    assert error.excerpt in str(error)


@pytest.mark.parametrize("how", ["raise", "pass error", "nothing"])
def test_on_failure_raise_lets_the_error_of_a_pass_through(program: Program, how: str) -> None:
    with pytest.raises(PassError, match=HOWS[how]) as caught:
        run(program, DropIdentity(wrong="_13", how=how), on_failure="raise")
    assert caught.value.pass_name == "drop_identity"
    assert caught.value.node == "_13"
    assert isinstance(caught.value.__cause__, ZeroDivisionError) == (how == "raise")


def test_a_pass_that_is_wrong_only_on_values_that_the_example_does_not_have() -> None:
    @dataclass(frozen=True, kw_only=True)
    class DropRelu(Pass):
        name: ClassVar[str] = "drop_relu"
        exact: ClassVar[bool] = True

        def plan(self, program: Program) -> Iterator[Rewrite | Skip]:
            for node in program.nodes:
                if program.op(node) == "relu":
                    yield Rewrite(node.name, "drop")

        def apply(self, program: Program, rewrite: Rewrite) -> None:
            node = program.node(rewrite.node)
            edit.bypass(program, node, node.all_input_nodes[0])

    class Fixed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x).reshape(BATCH, 100)

    positive = torch.rand(BATCH, 100, generator=torch.Generator().manual_seed(0))
    for subject in (nn.ReLU(), Fixed()):
        program = fxopt.capture(subject, positive)
        with pytest.warns(RollbackWarning, match="outputs changed"):
            PassManager([DropRelu()], on_no_match="ignore").run(program)


def test_rounding_that_is_amplified_is_proven_in_double() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Cancel(Pass):
        """(x + c) - c -> x: right, and far from what float32 gave."""

        name: ClassVar[str] = "cancel"
        exact: ClassVar[bool] = True

        def plan(self, program: Program) -> Iterator[Rewrite | Skip]:
            for node in program.nodes:
                if program.op(node) == "sub":
                    yield Rewrite(node.name, "cancel")

        def apply(self, program: Program, rewrite: Rewrite) -> None:
            node = program.node(rewrite.node)
            edit.bypass(program, node, node.all_input_nodes[0].all_input_nodes[0])

    class Cancels(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x + 1e5) - 1e5

    result = run(fxopt.capture(Cancels(), X), Cancel())
    (report,) = result.report.passes
    assert len(report.rewrites) == 1
    assert report.max_abs_error is not None
    assert report.max_abs_error > 1e-3
    assert "is rounding: applied in float64 the same rewrites leave" in report.notes[0]
    assert torch.equal(result.run(X)[0], X)


def test_an_exact_pass_runs_until_it_finds_nothing_more() -> None:
    @dataclass(frozen=True, kw_only=True)
    class DropLastIdentity(DropIdentity):
        name: ClassVar[str] = "drop_last_identity"

        def plan(self, program: Program) -> Iterator[Rewrite | Skip]:
            yield from list(super().plan(program))[-1:]

    result = run(fxopt.capture(nn.Sequential(*[nn.Identity() for _ in range(5)], nn.Tanh()), X), DropLastIdentity())
    assert len(result.report.passes[0].rewrites) == 5


def test_a_pass_that_never_comes_to_rest_is_an_error(program: Program) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Forever(Pass):
        name: ClassVar[str] = "forever"
        exact: ClassVar[bool] = True

        def plan(self, program: Program) -> Iterator[Rewrite | Skip]:
            yield Rewrite("_0", "insert an identity")

        def apply(self, program: Program, rewrite: Rewrite) -> None:
            edit.insert_after(program, program.node("_0"), nn.Identity(), name="more")

    with pytest.raises(PassError, match="forever: still finds rewrites after 44 rounds"):
        run(program, Forever())


# --------------------------------------------------------------------------------------------------------- lossy passes


def test_a_lossy_pass_gets_its_error_measured() -> None:
    program = fxopt.capture(nn.Linear(6, 6), X)
    result = run(program, Scale(by=1.1))
    (report,) = result.report.passes
    # on the example inputs: what is lost on random ones says little of a pass that looks at data
    largest = program.run(X)[0].abs().max().item()
    assert report.max_abs_error == pytest.approx(0.1 * largest, rel=1e-4)
    assert report.sqnr_db == pytest.approx(20.0, abs=1e-3)
    assert report.config == "scale(by=1.1)"
    assert len(report.rewrites) == 1


def test_an_exact_pass_behind_a_lossy_one_is_compared_with_what_that_left(program: Program) -> None:
    result = run(program, Scale(by=1.5), DropIdentity())
    lossy, exact = result.report.passes
    assert lossy.max_abs_error is not None
    assert lossy.max_abs_error > 0.01
    assert exact.max_abs_error == 0.0
    assert len(exact.rewrites) == 20


def test_the_error_of_a_lossy_pass_is_its_own(program: Program) -> None:
    result = run(program, Scale(by=1.5), Scale(by=1.0 + 1e-3))
    first, second = result.report.passes
    assert first.max_abs_error is not None
    assert second.max_abs_error is not None
    assert second.max_abs_error < first.max_abs_error / 10


def test_a_lossy_pass_that_breaks_the_program_is_rolled_back() -> None:
    program = fxopt.capture(nn.Linear(6, 6), X)
    with pytest.warns(RollbackWarning, match="not finite"):
        result = run(program, Scale(by=float("inf")), on_no_match="ignore")
    assert result.text() == program.text()


# --------------------------------------------------------------------------------------------------- verify="structure"


def test_structure_alone_does_not_look_at_values(program: Program) -> None:
    result = run(program, DropIdentity(wrong="_13"), verify="structure")
    (report,) = result.report.passes
    assert len(report.rewrites) == 20
    assert report.max_abs_error is None
    assert report.sqnr_db is None


@pytest.mark.parametrize("how", ["shape", "nan", "malformed", "missing", "raise"])
def test_structure_alone_still_finds_what_is_malformed(program: Program, how: str) -> None:
    with pytest.warns(RollbackWarning, match="_13: rolled back"):
        result = run(program, DropIdentity(wrong="_13", how=how), verify="structure")
    assert len(result.report.passes[0].rewrites) == 19


# ----------------------------------------------------------------------------------------------------------- bad passes


def planning(decide: Any, kind: bool = True) -> Pass:
    @dataclass(frozen=True, kw_only=True)
    class Planning(Pass):
        name: ClassVar[str] = "planning"
        exact: ClassVar[bool] = kind

        def plan(self, program: Program) -> Iterable[Rewrite | Skip]:
            return decide(program)  # type: ignore[no-any-return]

        def apply(self, program: Program, rewrite: Rewrite) -> None:
            raise AssertionError("must not be reached")

    return Planning()


def _edits(program: Program) -> list[Rewrite | Skip]:
    edit.insert_after(program, program.node("_0"), torch.neg)
    return []


def _fails(_: Program) -> list[Rewrite | Skip]:
    raise ZeroDivisionError("by zero")


def _fails_late(_: Program) -> Iterator[Rewrite | Skip]:
    yield Skip("_0", "fine")
    raise ZeroDivisionError("by zero")


@pytest.mark.parametrize(
    ("decide", "message"),
    [
        (_edits, "planning: plan changed the program; only apply may"),
        (lambda _: ["fold"], "planning: plan must give Rewrite or Skip, not 'fold'"),
        (
            lambda _: [Rewrite("nothing", "drop")],
            "planning at nothing: the plan names a node that is not in the program",
        ),
        (lambda _: [Skip("nothing", "no")], "planning at nothing: the plan names a node that is not in the program"),
        (lambda _: [Rewrite("_0", "drop", {"a": {1, 2}})], "planning at _0: params are not JSON: Object of type set"),
        (lambda _: [Rewrite("_0", "drop", {"a": torch.ones(1)})], "planning at _0: params are not JSON"),
        (_fails, "planning: plan failed: ZeroDivisionError: by zero"),
        (_fails_late, "planning: plan failed: ZeroDivisionError: by zero"),
    ],
)
def test_plans_that_break_their_contract_are_refused(program: Program, decide: Any, message: str) -> None:
    text = program.text()
    with pytest.raises(PassError, match=message) as caught:
        run(program, planning(decide))
    assert caught.value.pass_name == "planning"
    assert program.text() == text
    with pytest.raises(PassError, match=message):
        PassManager([planning(decide)]).explain(program)


# ------------------------------------------------------------------------------------------------------------- no match


def test_a_pass_that_changed_nothing_warns(program: Program) -> None:
    program = run(program, DropIdentity())
    with pytest.warns(NoMatchWarning, match="drop_identity changed nothing: _0: a linear layer is no identity"):
        run(program, DropIdentity())
    with pytest.warns(
        NoMatchWarning, match=r"scale\(op='conv2d'\) changed nothing: the program has no node it applies to"
    ):
        run(program, Scale(op="conv2d"))


def test_a_pass_that_changed_nothing_may_be_an_error(program: Program) -> None:
    with pytest.raises(PipelineError, match=r'scale\(op=.conv2d.\) changed nothing.*or pass on_no_match="ignore"'):
        run(program, Scale(op="conv2d"), on_no_match="error")


def test_a_pass_that_changed_nothing_may_be_ignored(program: Program) -> None:
    result = run(program, Scale(op="conv2d"), on_no_match="ignore")
    assert result.report.passes[0].rewrites == []
    assert result.report.passes[0].max_abs_error is None


def test_passes_of_a_pipeline_may_change_nothing_silently() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", NoMatchWarning)
        result = PassManager("default").run(fxopt.capture(nn.Linear(6, 6), X))
    assert [item.rewrites for item in result.report.passes] == [[]] * len(result.report.passes)
    assert result.report.passes


# ---------------------------------------------------------------------------------------------------------------- order


def made(name_: str, **contract: Any) -> Pass:
    contract = {key: frozenset(value) for key, value in contract.items()}

    @dataclass(frozen=True, kw_only=True)
    class Made(Pass):
        name: ClassVar[str] = name_
        requires: ClassVar[frozenset[str]] = contract.get("requires", frozenset())
        provides: ClassVar[frozenset[str]] = contract.get("provides", frozenset())
        refuses: ClassVar[frozenset[str]] = contract.get("refuses", frozenset())

        def plan(self, program: Program) -> list[Rewrite | Skip]:
            return []

        def apply(self, program: Program, rewrite: Rewrite) -> None:
            raise AssertionError("must not be reached")

    return Made()


QUANTIZE = made("quantize", provides=["quantized"], refuses=["quantized"])
PRUNE = made("prune", refuses=["quantized"])
PACK = made("pack", requires=["quantized"])


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        (
            [QUANTIZE, PRUNE],
            "prune cannot run on a program that is 'quantized' already, which quantize made it: put prune before",
        ),
        ([QUANTIZE, QUANTIZE], "quantize cannot run on a program that is 'quantized' already"),
        ([PACK, QUANTIZE], "pack requires a program that is 'quantized': put quantize before it"),
        ([PACK], "pack requires a program that is 'quantized': put freeze_quantization or quantize before it"),
    ],
)
def test_a_wrong_order_names_both_passes_and_runs_nothing(program: Program, passes: list[Pass], message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        run(program, *passes, on_no_match="ignore")
    with pytest.raises(PipelineError, match=message):
        PassManager(passes).explain(program)


def test_a_right_order_runs_and_its_properties_stay(program: Program) -> None:
    result = run(program, PRUNE, QUANTIZE, PACK, on_no_match="ignore")
    assert result.properties == {"quantized"}
    assert program.properties == frozenset()
    with pytest.raises(PipelineError, match="run it before the pass that made it so, or capture"):
        run(result, PRUNE, on_no_match="ignore")


# -------------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize("option", ["verify", "on_no_match", "on_failure"])
def test_options_are_checked(option: str) -> None:
    with pytest.raises(InputError, match=f"{option} must be one of '.*', not 'perhaps'"):
        PassManager([], **{option: "perhaps"})  # type: ignore[arg-type]


def test_passes_are_checked_before_anything_runs() -> None:
    with pytest.raises(RegistryError, match="a pass must be an instance of Pass or a spec string"):
        PassManager([3])  # type: ignore[list-item]
    with pytest.raises(RegistryError, match="no pass named 'nothing'; known passes: "):
        PassManager("nothing")


def test_no_passes_give_an_equal_program(program: Program) -> None:
    result = PassManager([]).run(program)
    assert result is not program
    assert result.text() == program.text()
    assert result.report.passes == []


def test_explain_changes_nothing_and_later_passes_see_what_they_would(program: Program) -> None:
    text = program.text()
    first, second = PassManager([DropIdentity(), DropIdentity()]).explain(program)
    assert len(first.rewrites) == 20
    assert second.rewrites == []
    assert program.text() == text
    assert str(first).splitlines()[:2] == ["drop_identity: 20 rewrites, 1 left alone", "  + _1: drop"]
    assert str(first).splitlines()[-1] == "  - _0: a linear layer is no identity"


@dataclass(frozen=True, kw_only=True)
class OffByOne(Pass):
    """Claims to be exact, and adds one to every class that the model names."""

    name: ClassVar[str] = "off_by_one"
    exact: ClassVar[bool] = True

    def plan(self, program: Program) -> Iterator[Rewrite | Skip]:
        for node in program.nodes:
            if program.op(node) == "unknown:argmax":
                yield Rewrite(node.name, "add one")

    def apply(self, program: Program, rewrite: Rewrite) -> None:
        node = program.node(rewrite.node)
        edit.insert_after(program, node, operator.add, (node, 1))


def test_whole_numbers_must_be_equal_however_large_they_are() -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 100_000)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x).argmax(-1)

    program = fxopt.capture(Classifier().eval(), X)
    with pytest.raises(VerificationError, match="outputs changed"):
        PassManager([OffByOne()], on_failure="raise").run(program)


def test_what_a_coarse_dtype_hides_is_seen_in_float64() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Identity()).eval().bfloat16()
    program = fxopt.capture(model, X.bfloat16())
    with pytest.raises(VerificationError, match="in float64 too"):
        PassManager([SlightlyWrong()], on_failure="raise").run(program)


@dataclass(frozen=True, kw_only=True)
class SlightlyWrong(Pass):
    """Claims to be exact, and is off by a few per cent."""

    name: ClassVar[str] = "slightly_wrong"
    exact: ClassVar[bool] = True

    def plan(self, program: Program) -> Iterator[Rewrite | Skip]:
        for node in program.nodes:
            if program.op(node) == "identity":
                yield Rewrite(node.name, "scale a little")

    def apply(self, program: Program, rewrite: Rewrite) -> None:
        edit.replace(program, program.node(rewrite.node), operator.mul, (program.node(rewrite.node).args[0], 1.03))


def test_long_chains_come_to_rest() -> None:
    chain = [nn.BatchNorm1d(6) for _ in range(25)]
    program = fxopt.optimize(nn.Sequential(nn.Linear(6, 6), *chain).eval(), X, "fold_batch_norm")
    assert len(program.report.passes[0].rewrites) == 25


def test_patterns_that_match_nothing_are_told() -> None:
    passes = ["prune_weights(sparsity=0.5, ignore=('hed.*', '1*'))"]
    with pytest.warns(NoMatchWarning, match=r"prune_weights: ignore: 'hed\.\*' matches no layer"):
        program = fxopt.optimize(model(), X, passes)
    assert len(program.report.passes[0].rewrites) == 1
    assert program.report.passes[0].notes == ["ignore: 'hed.*' matches no layer"]
    assert fxopt.optimize(model(), X, passes, on_no_match="ignore").report.passes[0].notes
