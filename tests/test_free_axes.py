from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from fxopt import artifact
from fxopt.analysis.batch_shapes import batch_shapes
from fxopt.backend import Engine, TensorSpec, check_inputs
from fxopt.compare import compare
from fxopt.errors import BackendError, CaptureError, InputError
from fxopt.free_axes import FreeAxis, named_places, other_sizes, resized
from fxopt.lowering import EagerBackend
from fxopt.program import BatchAxis, Program
from fxopt.verify import Reference, in_double

PICTURE = {"x": {2: "height", 3: "width"}}


class Pictures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x).relu()


class Function(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


class Two(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x * 2 + y


def captured(function: Any, *shape: int, axes: dict[int, str], **options: Any) -> Program:
    return fxopt.capture(Function(function), torch.randn(*shape), dynamic_axes={"x": axes}, **options)


def test_axes_are_found_by_input_and_number() -> None:
    inputs = (torch.zeros(2, 3, 8, 16), torch.zeros(2, 8))
    places = named_places({"x": {2: "height", -1: "width"}, "mask": {1: "height"}}, ("x", "mask"), inputs)
    assert places == {"height": ((0, 2), (1, 1)), "width": ((0, 3),)}
    assert named_places({"x": (2, -1)}, ("x", "mask"), inputs) == {"x_2": ((0, 2),), "x_3": ((0, 3),)}


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ("x", "dynamic_axes must be a mapping"),
        ({"z": (1,)}, "names no input of the model by 'z': the inputs are x, mask"),
        ({"x": "height"}, "must be a mapping of axes to names, or some axes, not 'height'"),
        ({"x": {4: "a"}}, "names axis 4 of x, which has 4 axes"),
        ({"x": {"2": "a"}}, "names axis '2' of x"),
        ({"x": {2: "the height"}}, "calls axis 2 of x 'the height': use a word"),
        ({"x": {2: "a", -2: "b"}}, "names axis 2 of x twice"),
        ({"x": (2, 2)}, "holds an axis twice"),
        ({"x": {2: "a", 3: "a"}}, "calls axes of different sizes a: axis 2 of x, axis 3 of x"),
    ],
)
def test_what_names_no_axis_is_refused(axes: Any, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        named_places(axes, ("x", "mask"), (torch.zeros(2, 3, 8, 16), torch.zeros(2, 8)))


@pytest.mark.parametrize(
    ("size", "rank", "sizes"),
    [
        (64, 0, [96, 128, 32]),
        (224, 1, [288, 672, 112]),
        (10, 0, [20, 5]),
        (10, 1, [30, 5]),
        (1, 0, [3, 2]),
        (2, 0, [4]),
    ],
)
def test_the_other_sizes_suit_strides_and_differ_by_rank(size: int, rank: int, sizes: list[int]) -> None:
    assert other_sizes(size, rank) == sizes


def test_resized_inputs_repeat_their_entries_in_reverse() -> None:
    x = torch.arange(6).reshape(2, 3)
    (longer,) = resized((x,), {((0, 1),): 5})
    assert longer.tolist() == [[1, 0, 2, 1, 0], [4, 3, 5, 4, 3]]


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
def test_a_program_knows_its_free_axes(frontend: Any) -> None:
    program = fxopt.capture(Pictures(), torch.randn(1, 3, 64, 64), dynamic_axes=PICTURE, frontend=frontend)
    assert program.free_axes == (FreeAxis("height", ((0, 2),), 64, 96), FreeAxis("width", ((0, 3),), 64, 128))
    assert program.batch == BatchAxis((0,), 1)
    assert program.axis_names(batch=True) == {(0, 0): "batch", (0, 2): "height", (0, 3): "width"}
    assert program.copy().free_axes == in_double(program).free_axes == program.free_axes
    reference = Reference.of(program)
    assert [tuple(case[0].shape) for case in reference.cases] == [(1, 3, 64, 64), (1, 3, 96, 128), (2, 3, 64, 64)]
    x = torch.randn(2, 3, 33, 40)
    assert compare([program.module(x)], program.run(x)).within(0)


def test_axis_zero_may_be_the_batch_or_something_else() -> None:
    inputs = (torch.randn(4, 6), torch.randn(4, 6))
    program = fxopt.capture(Two(), inputs, dynamic_axes={"x": {0: "batch"}, "y": {0: "batch"}})
    assert program.batch == BatchAxis((0, 1), 4)
    assert program.free_axes == ()
    program = fxopt.capture(Two(), inputs, dynamic_axes={"x": {0: "length"}, "y": {0: "length"}})
    assert program.batch is None
    assert program.fixed_batch is None
    assert program.free_axes == (FreeAxis("length", ((0, 0), (1, 0)), 4, 8),)
    with pytest.raises(InputError, match='calls an axis "batch" that is not axis 0'):
        fxopt.capture(Two(), inputs, dynamic_axes={"x": {1: "batch"}})


def test_a_size_that_the_model_refuses_names_the_axis() -> None:
    table = nn.Embedding(8, 4)
    with pytest.raises(InputError, match=r"length cannot be free: the model takes 8 and fails on 16, 4 \("):
        captured(lambda x: x + table.weight, 2, 8, 4, axes={1: "length"})
    with pytest.raises(InputError, match=r"width cannot be free: the model takes 4 and fails on 12, 2 with length 16"):
        captured(nn.Linear(4, 2), 2, 8, 4, axes={1: "length", 2: "width"})
    with pytest.raises(InputError, match=r"x cannot be free: .* Axes that must have one size get one name"):
        fxopt.capture(Two(), (torch.randn(2, 8), torch.randn(2, 8)), dynamic_axes={"x": {1: "x"}, "y": {1: "y"}})


def test_the_model_may_take_no_more_than_the_example() -> None:
    table = nn.Embedding(8, 4)
    program = captured(lambda x: x + table.weight[: x.shape[1]], 2, 8, 4, axes={1: "length"})
    assert program.free_axes[0].other == 4


def test_what_tracing_would_burn_in_goes_to_export() -> None:
    program = captured(lambda x: x.flatten(1)[:, : max(x.shape[1] // 2, 3)], 2, 8, axes={1: "length"})
    assert program.frontend == "export"
    for length in (8, 12, 16):
        x = torch.randn(3, length)
        assert torch.equal(program.run(x)[0], x[:, : max(length // 2, 3)])


@pytest.mark.parametrize(("size", "edge"), [(64, 31), (8, 32)])
def test_a_branch_between_sizes_is_an_error(size: int, edge: int) -> None:
    with pytest.raises(CaptureError, match=f"export: the captured graph answers differently on length {edge}"):
        captured(lambda x: x * 2 if x.shape[1] > 31 else x + 1, 2, size, axes={1: "length"})


def test_limits_that_the_model_has_itself_are_noted() -> None:
    table = nn.Embedding(20, 4)
    program = captured(
        lambda x: x + table.weight[: x.shape[1]] if x.dim() > 1 else x, 2, 8, 4, axes={1: "length"}, frontend="export"
    )
    assert any("length is at most 20" in note for note in program.report.notes)


def test_what_varies_with_a_free_axis_is_no_constant() -> None:
    def flat(x: torch.Tensor) -> torch.Tensor:
        return x.reshape(x.shape[0], x.shape[1], x.shape[2] * 1).flatten(1).reshape(x.shape)

    program = captured(flat, 2, 3, 8, axes={2: "length"})
    known = program.analysis(batch_shapes)
    assert known is not None
    numbers = {str(node.args[1]): known.number(node) for node in program.nodes if program.op(node) == "getitem"}
    assert numbers["1"] == 3
    assert numbers["2"] is None
    optimized = fxopt.optimize(Function(flat), torch.randn(2, 3, 8), "simplify", dynamic_axes={"x": {2: "length"}})
    x = torch.randn(4, 3, 11)
    assert torch.equal(optimized.run(x)[0], x)


def test_specs_say_the_names() -> None:
    program = fxopt.capture(Pictures(), torch.randn(1, 3, 64, 64), dynamic_axes=PICTURE)
    (spec,) = TensorSpec.of_program(program, dynamic_batch=True)
    assert str(spec) == "x: float32[batch, 3, height, width]"
    assert TensorSpec.from_json(spec.to_json()) == spec
    (fixed,) = TensorSpec.of_program(program, dynamic_batch=False)
    assert fixed.shape == (1, 3, None, None)
    with pytest.raises(ValueError, match="not the names of the 2 axes of x"):
        TensorSpec.from_json({"name": "x", "dtype": "float32", "shape": [1, None], "axes": ["a"]})


def test_axes_of_one_name_must_agree() -> None:
    specs = [
        TensorSpec("tokens", torch.int64, (None, None), ("batch", "length")),
        TensorSpec("mask", torch.bool, (None, None, None), ("batch", "length", "length")),
    ]
    tokens = torch.zeros(2, 5, dtype=torch.int64)
    check_inputs(specs, torch.device("cpu"), (tokens, torch.zeros(2, 5, 5, dtype=torch.bool)))
    with pytest.raises(InputError, match="input mask: expected length 5 as the inputs before it, got 4"):
        check_inputs(specs, torch.device("cpu"), (tokens, torch.zeros(2, 5, 4, dtype=torch.bool)))
    with pytest.raises(InputError, match=re.escape("input mask: expected shape [batch, length, length], got [2, 5]")):
        check_inputs(specs, torch.device("cpu"), (tokens, torch.zeros(2, 5, dtype=torch.bool)))


def test_a_backend_that_keeps_an_axis_fixed_is_an_error() -> None:
    class Fixing(EagerBackend):
        def lower(self, program: Program, *, dynamic_batch: bool) -> Engine:
            engine = super().lower(program, dynamic_batch=dynamic_batch)
            engine.inputs = tuple(spec._replace(shape=(None, 3, 64, None)) for spec in engine.inputs)
            return engine

    with pytest.raises(BackendError, match="eager cannot keep height free: its engine takes x: float32"):
        fxopt.compile(Pictures().eval(), torch.randn(1, 3, 64, 64), passes=[], backend=Fixing(), dynamic_axes=PICTURE)


def test_a_manifest_with_a_free_axis_without_a_name_is_refused(tmp_path: Path) -> None:
    compiled = fxopt.compile(Pictures().eval(), torch.randn(1, 3, 64, 64), passes=[], backend="eager")
    compiled.engine.inputs = (TensorSpec("x", torch.float32, (None, 3, None, 64)),)
    compiled.save(tmp_path / "out")
    with pytest.raises(fxopt.ArtifactError, match="None is no size, in the shape of x"):
        artifact.read(tmp_path / "out")
