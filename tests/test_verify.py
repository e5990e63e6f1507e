"""Comparing outputs, references, structure checks, and the copy in float64."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import nn

import fxopt
from fxopt import edit
from fxopt.compare import Difference, compare, rounding_tolerance, worst
from fxopt.program import Program
from fxopt.verify import Reference, check_shapes, check_structure, in_double, other_batch_size, seeded_run

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
NAN, INF = float("nan"), float("inf")


def program_of(model: nn.Module, x: torch.Tensor = X) -> Program:
    return fxopt.capture(model, x)


# -------------------------------------------------------------------------------------------------------------- compare


def test_equal_outputs_have_no_difference() -> None:
    assert compare([X], [X.clone()]) == Difference(0.0, 0.0, math.inf, pytest.approx(1.0))
    assert compare([], []) == Difference(0.0, 0.0, math.inf, 1.0)
    assert compare([torch.zeros(0, 3)], [torch.zeros(0, 3)]).within(0.0)


def test_measures_are_those_of_their_definitions() -> None:
    reference, output = torch.tensor([3.0, -4.0]), torch.tensor([3.0, -4.5])
    found = compare([reference], [output])
    assert found.max_abs == 0.5
    assert found.relative == 0.125
    assert found.sqnr_db == pytest.approx(10 * math.log10(25 / 0.25))
    assert found.cosine == pytest.approx(27.0 / (5 * math.sqrt(9 + 20.25)))
    assert str(found) == "relative error 0.12 (max abs 0.5, 20 dB)"


def test_the_worst_output_counts() -> None:
    found = compare([X, torch.ones(2)], [X, torch.tensor([1.0, 1.5])])
    assert found.relative == 0.5
    assert worst([compare([X], [X]), found]) == found
    mixed = worst([Difference(1.0, 0.1, 20.0, 0.9), Difference(0.5, 0.2, 30.0, 0.5, "odd")])
    assert mixed == Difference(1.0, 0.2, 20.0, 0.5, "odd")


@pytest.mark.parametrize(
    ("reference", "output", "why"),
    [
        ([X], [X, X], "2 outputs instead of 1"),
        ([X], [X[:2]], r"output 0 has shape \(2, 3\) instead of \(4, 3\)"),
        ([X, X], [X, X.double()], r"output 1 is torch\.float64 instead of torch\.float32"),
        ([torch.tensor([1.0])], [torch.tensor([NAN])], "output 0 is not finite where the reference is"),
        ([torch.tensor([1.0])], [torch.tensor([INF])], "output 0 is not finite where the reference is"),
        ([torch.tensor([NAN])], [torch.tensor([1.0])], "output 0 differs where the reference is not finite"),
        ([torch.tensor([INF])], [torch.tensor([-INF])], "output 0 differs where the reference is not finite"),
        ([torch.tensor([INF])], [torch.tensor([NAN])], "output 0 differs where the reference is not finite"),
    ],
)
def test_what_cannot_be_compared_is_never_within(
    reference: list[torch.Tensor], output: list[torch.Tensor], why: str
) -> None:
    found = compare(reference, output)
    assert re.search(why, found.mismatch)
    assert not found.within(math.inf)
    assert re.search(why, str(found))


def test_values_that_are_not_finite_may_agree() -> None:
    value = torch.tensor([1.0, NAN, INF, -INF])
    assert compare([value], [value.clone()]).within(0.0)
    assert compare([value], [torch.tensor([1.5, NAN, INF, -INF])]).relative == 0.5


def test_a_reference_of_zeros() -> None:
    assert compare([torch.zeros(2)], [torch.zeros(2)]).within(0.0)
    found = compare([torch.zeros(2)], [torch.tensor([0.0, 1e-12])])
    assert found.relative == math.inf
    assert found.sqnr_db == -math.inf


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.complex64]
)
def test_all_dtypes_compare(dtype: torch.dtype) -> None:
    one, other = torch.tensor([1, 0]).to(dtype), torch.tensor([0, 0]).to(dtype)
    assert compare([one], [one.clone()]).within(0.0)
    # of rounded numbers the error over the largest, of whole ones and flags the share that differs
    rounded = dtype.is_floating_point or dtype.is_complex
    assert compare([one], [other]).relative == (1.0 if rounded else 0.5)


def test_rounding_is_that_of_the_coarsest_dtype() -> None:
    half, single, double = (torch.zeros(1, dtype=item) for item in (torch.float16, torch.float32, torch.float64))
    assert rounding_tolerance([double]) == 1e-9
    assert rounding_tolerance([double, single]) == 1e-4
    assert rounding_tolerance([single, half, torch.zeros(1, dtype=torch.int64)]) == 2e-2
    assert rounding_tolerance([]) == rounding_tolerance([torch.zeros(1, dtype=torch.int64)]) == 1e-4


# ------------------------------------------------------------------------------------------------------------ reference


def test_a_reference_has_the_example_and_another_batch_size() -> None:
    reference = Reference.of(program_of(nn.Linear(3, 2)))
    assert [inputs[0].shape[0] for inputs in reference.cases] == [4, 8]
    assert [outputs[0].shape for outputs in reference.outputs] == [(4, 2), (8, 2)]
    assert reference.tolerance == 1e-4
    assert reference.notes == ()


@pytest.mark.parametrize(
    ("size", "width", "other"), [(1, 300, 2), (2, 300, 3), (3, 300, 2), (1, 3, 8), (8, 3, 9), (1, 64, 4)]
)
def test_the_other_batch_size_is_another_and_larger_for_small_samples(size: int, width: int, other: int) -> None:
    assert other_batch_size(program_of(nn.Linear(width, 2), torch.zeros(size, width))) == other


def test_a_fixed_batch_stays() -> None:
    class Fixed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(4, 3) * 2

    program = program_of(Fixed())
    assert other_batch_size(program) is None
    assert [inputs[0].shape[0] for inputs in Reference.of(program).cases] == [4, 4]


def test_random_inputs_that_the_model_refuses_are_noted() -> None:
    class Cholesky(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.cholesky(x)

    program = fxopt.capture(Cholesky(), torch.stack([torch.eye(3), 2 * torch.eye(3)]))
    reference = Reference.of(program)
    assert len(reference.cases) == len(reference.outputs) == 1
    (note,) = reference.notes
    assert note.startswith("random inputs were not tried: the model refuses them (linalg.cholesky")


def test_a_difference_is_the_worst_over_both_batches() -> None:
    program = program_of(nn.Sequential(nn.Linear(3, 2), nn.ReLU()))
    reference = Reference.of(program)
    changed = program.copy()
    edit.insert_after(changed, changed.node("_1"), torch.mul, (changed.node("_1"), 1.5))
    assert reference.difference(changed).relative == pytest.approx(0.5)
    assert reference.after(changed).difference(changed).within(0.0)


def test_an_error_of_an_operator_is_a_mismatch() -> None:
    program = program_of(nn.Sequential(nn.Linear(3, 2), nn.ReLU()))
    reference = Reference.of(program)
    edit.insert_after(program, program.node("_0"), torch.reshape, (program.node("_0"), (7, 7)))
    found = reference.difference(program)
    assert "an operator refuses its operands: shape '[7, 7]' is invalid" in found.mismatch


def test_seeded_runs_repeat_and_leave_the_global_generator_alone() -> None:
    program = program_of(nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5)).train())
    state = torch.get_rng_state()
    first, second = seeded_run(program, (X,)), seeded_run(program, (X,))
    assert torch.equal(first[0], second[0])
    assert torch.equal(torch.get_rng_state(), state)


# ------------------------------------------------------------------------------------------------------------ structure


def two_layers() -> Program:
    return program_of(nn.Sequential(nn.Linear(3, 2), nn.ReLU()))


def test_an_untouched_copy_is_well_formed() -> None:
    program = two_layers()
    assert check_structure(program, program.copy()) is None
    assert check_shapes(program, program.copy()) is None


def test_a_value_used_before_it_is_made_is_found() -> None:
    before = two_layers()
    after = before.copy()
    after.node("_0").append(after.node("input_1"))
    found = check_structure(before, after)
    assert found is not None
    assert found.startswith("the graph is not well formed")


def test_a_missing_module_is_found() -> None:
    before = two_layers()
    after = before.copy()
    after.node("_1").target = "nothing"
    found = check_structure(before, after)
    assert found is not None
    assert "nothing" in found


def test_another_output_shape_is_found() -> None:
    before = two_layers()
    after = before.copy()
    edit.insert_after(after, after.node("_1"), torch.sum, (after.node("_1"), 1))
    assert str(check_shapes(before, after)).startswith("the outputs became (TensorSpec(shape=(4,),")


def test_another_output_dtype_is_found() -> None:
    before = two_layers()
    after = before.copy()
    edit.insert_after(after, after.node("_1"), "double")
    assert "the outputs became" in str(check_shapes(before, after))


def test_operands_that_do_not_fit_are_found_although_lint_accepts_them() -> None:
    before = two_layers()
    after = before.copy()
    edit.set_tensor(after, after.node("_0"), "weight", torch.zeros(2, 5))
    assert check_structure(before, after) is None
    assert str(check_shapes(before, after)).startswith("an operator refuses its operands")


def test_a_removed_input_is_found() -> None:
    class Two(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x + y

    before = fxopt.capture(Two(), (X, X))
    after = before.copy()
    edit.replace(after, after.node("add"), torch.neg, (after.node("x"),))
    after.graph.erase_node(after.node("y"))
    assert check_structure(before, after) == "the inputs became ['x'], they were ['x', 'y']"


@pytest.mark.parametrize("value", [NAN, INF])
def test_a_new_tensor_that_is_not_finite_is_found(value: float) -> None:
    before = two_layers()
    after = before.copy()
    edit.set_tensor(after, after.node("_0"), "bias", torch.tensor([value, 0.0]))
    assert check_structure(before, after) == "0.bias holds NaN or infinity"


def test_an_old_tensor_that_is_not_finite_is_the_models_own() -> None:
    model = nn.Linear(3, 2)
    with torch.no_grad():
        model.bias[0] = NAN
    program = program_of(model)
    assert check_structure(program, program.copy()) is None


# --------------------------------------------------------------------------------------------------------------- double


def test_the_copy_in_double_is_independent_and_answers_alike() -> None:
    program = two_layers()
    double = in_double(program)
    assert double.run(X.double())[0].dtype == torch.float64
    torch.testing.assert_close(double.run(X.double())[0].float(), program.run(X)[0])
    assert all(item.dtype == torch.float32 for item in program.module.parameters())
    assert [node.name for node in double.nodes] == [node.name for node in program.nodes]
    assert double.batch == program.batch
