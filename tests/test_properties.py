"""What holds for every model and every legal pipeline, tried on random models.

Each test function is a share of its own, so that xdist spreads them over processes.
"""

from __future__ import annotations

import random
import warnings

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import fxopt
from fxopt import NoMatchWarning, PassManager, Program
from fxopt.compare import compare
from fxopt.passes import DEFAULT
from fxopt.report import Report
from fxopt.testing import assert_pass, assert_untouched, model_state, random_program
from fxopt.verify import seeded_run

EXACT = (*DEFAULT, "fold_batch_norm(clone_shared=True)")
TOLERANCE = 1e-9

MODELS = st.randoms(use_true_random=False)
SHARES = range(4)


def examples(count: int) -> hypothesis.settings:
    return hypothesis.settings(
        max_examples=count,
        deadline=None,
        # models are small as they are, and shrinking one that fails takes minutes
        phases=[hypothesis.Phase.explicit, hypothesis.Phase.reuse, hypothesis.Phase.generate],
        suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
    )


def optimized(program: Program, passes: list[str]) -> Program:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoMatchWarning)
        # on_failure="raise": a rewrite that fails its proof is a fault of the pass, not an everyday event
        return PassManager(passes, on_failure="raise").run(program)


def assert_same_answers(reference: Program, program: Program) -> None:
    for size in (None, 5):
        inputs = reference.inputs_with_batch(size, seed=3)
        difference = compare(seeded_run(reference, inputs), seeded_run(program, inputs))
        assert difference.within(TOLERANCE), f"batch {size}: {difference}\n{reference}\n\n{program}"


def rests_after(program: Program, *, runs: int) -> bool:
    """Whether the default pipeline comes to rest; one pass may make room for another, so that it takes a few runs."""
    for _ in range(runs):
        again = optimized(program, ["default"])
        if again.text() == program.text():
            return not any(item.rewrites for item in again.report.passes[len(program.report.passes) :])
        program = again
    return False


@pytest.mark.parametrize("share", SHARES)
def test_the_default_pipeline_on_any_model(share: int) -> None:
    @hypothesis.seed(share)
    @examples(60)
    @hypothesis.given(MODELS)
    def holds(source: random.Random) -> None:
        model, inputs = random_program(source, dtype=torch.float64)
        state = model_state(model)
        program = fxopt.capture(model, inputs)
        text = program.text()
        result = optimized(program, ["default"])
        assert_same_answers(program, result)
        assert program.text() == text
        assert_untouched(model, state)
        assert fxopt.capture(model, inputs).text() == text
        assert rests_after(result, runs=3)
        assert result.cost().macs <= program.cost().macs
        assert Report.from_json(result.report.to_json()) == result.report

    holds()


@pytest.mark.parametrize("share", SHARES)
def test_any_sequence_of_exact_passes_on_any_model(share: int) -> None:
    @hypothesis.seed(share)
    @examples(40)
    @hypothesis.given(MODELS, st.lists(st.sampled_from(EXACT), max_size=5))
    def holds(source: random.Random, passes: list[str]) -> None:
        model, inputs = random_program(source, dtype=torch.float64)
        program = fxopt.capture(model, inputs)
        result = optimized(program, passes)
        assert_same_answers(program, result)
        # a state dict that loads into an equal program is all that saving takes
        twin = optimized(fxopt.capture(model, inputs), passes)
        assert twin.text() == result.text()
        for name, value in twin.module.state_dict().items():
            twin.module.state_dict()[name].copy_(torch.zeros_like(value))
        twin.module.load_state_dict(result.module.state_dict())
        assert_same_answers(result, twin)

    holds()


@pytest.mark.parametrize("spec", EXACT)
def test_what_holds_for_every_pass_holds_on_any_model(spec: str) -> None:
    @examples(21)
    @hypothesis.given(MODELS)
    def holds(source: random.Random) -> None:
        model, inputs = random_program(source, blocks=3, dtype=torch.float64)
        assert_pass(fxopt.registry.make_pass(spec), model, inputs)

    holds()


@examples(16)
@hypothesis.given(MODELS)
def test_single_precision_needs_no_proof_by_double_to_be_kept(source: random.Random) -> None:
    model, inputs = random_program(source)
    program = fxopt.capture(model, inputs)
    result = optimized(program, ["default"])
    (expected,), (actual,) = seeded_run(program, inputs), seeded_run(result, inputs)
    assert compare([expected], [actual]).within(1e-3)


@examples(10)
@hypothesis.given(MODELS)
def test_both_frontends_answer_alike(source: random.Random) -> None:
    model, inputs = random_program(source, blocks=3, dtype=torch.float64)
    for frontend in ("symbolic", "export"):
        program = fxopt.capture(model, inputs, frontend=frontend)  # type: ignore[arg-type]
        result = optimized(program, ["default"])
        difference = compare([model(*inputs).detach()], seeded_run(result, inputs))
        assert difference.within(TOLERANCE), f"{frontend}: {difference}\n{program}\n\n{result}"


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_any_model_reaches_the_onnx_engine_and_comes_back_from_disk(
    seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model, inputs = random_program(seed)
    compiled = fxopt.compile(model, inputs)
    torch.testing.assert_close(compiled(*inputs), model(*inputs), rtol=1e-3, atol=1e-4)
    folder = tmp_path_factory.mktemp("engine") / "out"
    compiled.save(folder)
    torch.testing.assert_close(fxopt.load(folder)(*inputs), compiled(*inputs))


@pytest.mark.parametrize("seed", range(10))
def test_a_seed_gives_the_same_model(seed: int) -> None:
    (one, inputs), (other, others) = random_program(seed), random_program(seed)
    assert str(one) == str(other)
    assert torch.equal(inputs[0], others[0])
    torch.testing.assert_close(one(*inputs), other(*others))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
