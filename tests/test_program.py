"""The program: copies share tensors and nothing else, runs change nothing, the text is deterministic."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from fxopt import edit
from fxopt.errors import InputError
from fxopt.frontends.capture import capture
from fxopt.program import Program


def image(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5)).eval()


@pytest.fixture
def program() -> Program:
    return fxopt.capture(model(), (image(),))


def test_text_is_one_line_per_node(program: Program) -> None:
    assert program.text().splitlines() == [
        "%input_1 = input : f32[2, 3, 6, 6]",
        "%_0 = conv2d[0](%input_1) {3, 8, kernel_size=(3, 3), stride=(1, 1)} : f32[2, 8, 4, 4]",
        "%_1 = batch_norm[1](%_0) {8, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True} "
        ": f32[2, 8, 4, 4]",
        "%_2 = relu[2](%_1) : f32[2, 8, 4, 4]",
        "%_3 = flatten[3](%_2) {start_dim=1, end_dim=-1} : f32[2, 128]",
        "%_4 = linear[4](%_3) {in_features=128, out_features=5, bias=True} : f32[2, 5]",
        "return (%_4,)",
    ]
    assert str(program) == program.text()
    assert repr(program) == "<Program(input) of 7 nodes, captured by symbolic>"


def test_text_is_the_same_for_the_same_model(program: Program) -> None:
    assert fxopt.capture(model(), (image(),)).text() == program.text()


def test_module_is_called_like_the_model_and_keeps_parameter_names(program: Program) -> None:
    original = model()
    assert torch.equal(program.module(image(5)), original(image(5)))
    assert program.module(input=image(5)).shape == (5, 5)
    assert [name for name, _ in program.module.named_parameters()] == [name for name, _ in original.named_parameters()]
    assert program.module.state_dict().keys() == original.state_dict().keys()


def test_module_trains(program: Program) -> None:
    module = program.module.train()
    before = program.text()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    losses = []
    for _ in range(20):
        loss = nn.functional.cross_entropy(module(image()), torch.tensor([1, 3]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert program.text() == before


def test_flat_module_is_called_flatly_and_shares_the_tensors(program: Program) -> None:
    flat = program.flat_module()
    (answer,) = flat(image())
    assert torch.equal(answer, program.module(image()))
    assert {id(item) for item in flat.parameters()} == {id(item) for item in program.module.parameters()}
    assert not {id(item) for item in flat.modules()} & {id(item) for item in program.module.modules()}


def test_a_copy_shares_tensors_but_no_module_node_or_report(program: Program) -> None:
    copy = program.copy()
    assert {id(item) for item in copy.module.parameters()} == {id(item) for item in program.module.parameters()}
    assert {id(item) for item in copy.module.buffers()} == {id(item) for item in program.module.buffers()}
    assert not {id(item) for item in copy.module.modules()} & {id(item) for item in program.module.modules()}
    assert not set(copy.nodes) & set(program.nodes)
    assert copy.report is not program.report


def test_editing_a_copy_leaves_the_original_alone(program: Program) -> None:
    text, values = program.text(), {name: item.clone() for name, item in program.module.state_dict().items()}
    copy = program.copy()
    edit.set_tensor(copy, copy.node("_0"), "weight", torch.zeros(8, 3, 3, 3))
    edit.replace(copy, copy.node("_2"), nn.Sigmoid())
    edit.bypass(copy, copy.node("_1"), copy.node("_0"))
    edit.clean(copy)
    copy.properties |= {"quantized"}
    copy.report.notes.append("changed")
    assert program.text() == text
    assert copy.text() != text
    assert program.properties == frozenset()
    assert program.report.notes == []
    for name, value in program.module.state_dict().items():
        assert torch.equal(value, values[name])
    assert torch.equal(program.module(image()), model()(image()))


def test_a_copy_of_an_edited_program_has_the_edit(program: Program) -> None:
    edit.replace(program, program.node("_2"), nn.Sigmoid())
    assert program.copy().text() == program.text()
    assert torch.equal(program.copy().module(image()), program.module(image()))


def test_modes_of_single_modules_survive_copies() -> None:
    original = model().train()
    original[1].eval()  # frozen statistics in a model that trains
    program = fxopt.capture(original, (image(),))
    for subject in (program, program.copy(), program.copy().copy()):
        assert subject.training
        assert not subject.module.get_submodule("1").training
        assert subject.module.get_submodule("0").training


def test_a_module_used_twice_stays_one_module_in_a_copy() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)
            self.alias = self.conv

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.alias(self.conv(x))

    program = fxopt.capture(Twice().eval(), (image(),)).copy()
    calls = [node for node in program.nodes if node.op == "call_module"]
    assert program.module_of(calls[0]) is program.module_of(calls[1])
    assert program.callers(calls[0]) == calls


def test_run_leaves_inputs_and_buffers_alone_in_training_mode() -> None:
    program = fxopt.capture(model().train(), (image(),))
    before = {name: item.clone() for name, item in program.module.state_dict().items()}
    x = image()
    (answer,) = program.run(x)
    assert not answer.requires_grad
    assert torch.equal(x, image())
    for name, item in program.module.state_dict().items():
        assert torch.equal(item, before[name]), name


def test_run_leaves_inputs_alone_that_the_model_writes_into() -> None:
    class Writes(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.add_(1.0)

    program = fxopt.capture(Writes(), (image(),))
    x = image()
    (answer,) = program.run(x)
    assert torch.equal(x, image())
    assert torch.equal(answer, image() + 1.0)


def test_analyses_are_kept_until_an_edit(program: Program) -> None:
    calls: list[str] = []

    def count(subject: Program) -> int:
        calls.append("counted")
        return len(subject.nodes)

    assert program.analysis(count) == program.analysis(count) == 7
    assert calls == ["counted"]
    edit.insert_after(program, program.node("_2"), torch.neg)
    assert program.analysis(count) == 8
    assert calls == ["counted", "counted"]


def test_cost_counts_parameters_multiplications_and_bytes(program: Program) -> None:
    params = 3 * 8 * 9 + 8 + 8 + 8 + 128 * 5 + 5
    macs = 2 * (16 * 8 * 3 * 9 + 128 * 5)
    assert program.cost() == fxopt.Cost(params=params, macs=macs, bytes=4 * (params + 8 + 8) + 8)


def test_tied_parameters_are_counted_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.two.weight = self.one.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.two(self.one(x))

    assert fxopt.capture(Tied(), torch.zeros(3, 4)).cost() == fxopt.Cost(params=16, macs=3 * 2 * 16, bytes=64)


def test_random_inputs_are_like_the_example(program: Program) -> None:
    (fresh,) = program.inputs_with_batch(7, seed=3)
    assert fresh.shape == (7, 3, 6, 6)
    assert fresh.dtype == torch.float32
    assert abs(float(fresh.mean()) - float(image().mean())) < 0.3
    assert 0.5 < float(fresh.std() / image().std()) < 2.0
    assert torch.equal(fresh, program.inputs_with_batch(7, seed=3)[0])
    assert not torch.equal(fresh, program.inputs_with_batch(7, seed=4)[0])
    assert program.inputs_with_batch()[0].shape == (2, 3, 6, 6)


def test_random_integers_are_values_of_the_example() -> None:
    ids = torch.tensor([[1, 5, 9], [2, 5, 0]])
    program = fxopt.capture(nn.Embedding(10, 4), (ids,))
    (fresh,) = program.inputs_with_batch(6)
    assert fresh.shape == (6, 3)
    assert fresh.dtype == torch.int64
    assert set(fresh.unique().tolist()) <= set(ids.unique().tolist())
    assert program.run(fresh)[0].shape == (6, 3, 4)


def test_nodes_are_found_by_name(program: Program) -> None:
    assert program.node("_0").name == "_0"
    with pytest.raises(InputError, match="the program has no node 'nothing'"):
        program.node("nothing")


def test_what_nodes_hold(program: Program) -> None:
    assert isinstance(program.module_of(program.node("_0")), nn.Conv2d)
    assert program.module_of(program.node("input_1")) is None
    assert program.tensor_of(program.node("_0")) is None
    anchor = program.node("_1")
    reader = edit.insert_tensor(program, anchor, torch.ones(3), name="extra")
    tensor = program.tensor_of(reader)
    assert tensor is not None
    assert torch.equal(tensor, torch.ones(3))
    assert program.op(reader) == "get_attr"
    assert program.op(program.node("_0")) == "conv2d"


def test_a_program_without_a_batch_axis_keeps_its_size() -> None:
    class Fixed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(2, 108).sum(1)

    program = fxopt.capture(Fixed(), (image(),))
    assert program.batch is None
    assert program.inputs_with_batch(7)[0].shape == (2, 3, 6, 6)


def test_the_module_can_be_copied_and_saved_as_a_state_dict(program: Program) -> None:
    import copy
    import io

    clone = copy.deepcopy(program.module)
    assert torch.equal(clone(image()), program.module(image()))
    buffer = io.BytesIO()
    torch.save(program.module.state_dict(), buffer)
    buffer.seek(0)
    fresh = model()
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(fresh(image()), program.module(image()))
    with pytest.raises(TypeError, match=r"is not pickled: save its state_dict\(\)"):
        torch.save(program.module, io.BytesIO())


def test_calibration_batches_come_as_flat_inputs() -> None:
    linear, images = nn.Linear(3, 2).eval(), torch.randn(4, 3)
    batches = [(images, torch.zeros(4)), images, {"input": images, "label": 1}]
    program = capture(linear, images, calibration=batches)
    assert [[tensor is images for tensor in batch] for batch in program.calibration_inputs()] == [[True]] * 3


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (None, "this needs data: pass calibration="),
        ([], "calibration holds no batch$"),
        (iter(()), "calibration holds no batch; an iterator can be read once only"),
        ([3], "calibration batch 0: a calibration batch must be a tensor"),
        ([torch.randn(4, 3), torch.randn(4, 3).double()], "batch 1: input is torch.float64, and the example input"),
    ],
)
def test_calibration_that_is_of_no_use_is_refused(calibration: Iterable[Any] | None, message: str) -> None:
    program = capture(nn.Linear(3, 2).eval(), torch.randn(4, 3), calibration=calibration)
    with pytest.raises(InputError, match=message):
        list(program.calibration_inputs())


def test_calibration_that_is_not_iterable_is_refused_at_capture() -> None:
    with pytest.raises(InputError, match="calibration must be an iterable of batches, not int"):
        capture(nn.Linear(3, 2).eval(), torch.randn(4, 3), calibration=3)  # type: ignore[arg-type]
