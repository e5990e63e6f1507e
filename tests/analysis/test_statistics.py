"""What layers see of the calibration data: exact moments, gathered in one run, with memory that does not grow."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from fxopt import edit
from fxopt.analysis import statistics
from fxopt.analysis.statistics import InputMoments, carry, collect
from fxopt.errors import InputError
from fxopt.frontends.capture import capture
from fxopt.program import Program


def batches(*sizes: int, shape: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(size, *shape, generator=generator, dtype=torch.float64) + 0.5 for size in sizes]


def program_of(model: nn.Module, data: Any) -> Program:
    example = next(iter(data)) if isinstance(data, list) else torch.randn(2, 3, 5, 5, dtype=torch.float64)
    return capture(model.double().eval(), (example,), calibration=data)


def expected(inputs: torch.Tensor, axis: int = 1) -> tuple[int, torch.Tensor, torch.Tensor]:
    """Count, mean and Gram of everything at once."""
    flat = inputs.movedim(axis, 0).flatten(1)
    return flat.shape[1], flat.mean(1), flat @ flat.T / flat.shape[1]


def check(found: InputMoments, inputs: torch.Tensor, axis: int = 1, *, gram: bool = True) -> None:
    count, mean, products = expected(inputs, axis)
    assert found.count == count
    torch.testing.assert_close(found.mean, mean)
    torch.testing.assert_close(found.square, products.diag())
    if gram:
        assert found.gram is not None
        torch.testing.assert_close(found.gram, products)
        assert torch.equal(found.gram, found.gram.T)
    else:
        assert found.gram is None


CONVOLUTIONS: list[tuple[Callable[..., nn.Module], tuple[int, ...]]] = [
    (nn.Conv1d, (9,)),
    (nn.Conv2d, (5, 6)),
    (nn.Conv3d, (3, 4, 5)),
    (nn.ConvTranspose1d, (9,)),
    (nn.ConvTranspose2d, (5, 6)),
    (nn.ConvTranspose3d, (3, 4, 5)),
]


@pytest.mark.parametrize(("layer", "sizes"), CONVOLUTIONS)
def test_convolutions(layer: Callable[..., nn.Module], sizes: tuple[int, ...]) -> None:
    data = batches(3, 1, 5, shape=(4, *sizes))
    found = collect(program_of(nn.Sequential(layer(4, 6, 3, padding=1)), data))
    assert list(found) == ["_0"]
    check(found["_0"], torch.cat(data))


def test_linear_over_leading_axes() -> None:
    data = batches(3, 2, shape=(7, 2, 5))
    check(collect(program_of(nn.Sequential(nn.Linear(5, 3)), data))["_0"], torch.cat(data), axis=-1)


def test_inputs_without_a_batch_axis() -> None:
    image = [batches(4, shape=(5, 6))[0], batches(4, shape=(5, 6))[0] * 2]
    found = collect(program_of(nn.Sequential(nn.Conv2d(4, 6, 3)), image))
    check(found["_0"], torch.stack(image))
    vector = [batches(4, shape=())[0], batches(4, shape=())[0] - 1]
    check(collect(program_of(nn.Sequential(nn.Linear(4, 2)), vector))["_0"], torch.stack(vector))


def test_grouped_convolutions_have_the_whole_gram_and_depthwise_ones_none() -> None:
    data = batches(2, 3, shape=(4, 5, 5))
    model = nn.Sequential(nn.Conv2d(4, 8, 1, groups=2), nn.Conv2d(8, 8, 3, groups=8))
    found = collect(program_of(model, data))
    check(found["_0"], torch.cat(data))
    check(found["_1"], model[0](torch.cat(data)).detach(), gram=False)


def test_inputs_of_very_many_channels_have_no_gram(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "_LARGEST_GRAM", 4)
    data = batches(2, shape=(5,))
    check(collect(program_of(nn.Sequential(nn.Linear(5, 3)), data))["_0"], data[0], gram=False)


@pytest.mark.parametrize(("block", "chunk"), [(2, 2**23), (512, 50), (3, 1)])
def test_blocks_and_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch, block: int, chunk: int) -> None:
    monkeypatch.setattr(statistics, "_BLOCK", block)
    monkeypatch.setattr(statistics, "_CHUNK", chunk)
    data = batches(3, 2, shape=(5, 4, 4))
    check(collect(program_of(nn.Sequential(nn.Conv2d(5, 3, 1)), data))["_0"], torch.cat(data))


class Twice(nn.Module):
    """One layer called at two places, and a value that two layers read."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.left, self.right = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 2, 3), nn.Conv2d(3, 2, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(self.conv(x).relu_())
        return self.left(x) + self.right(x)


def test_the_gram_is_gathered_when_it_is_needed() -> None:
    data = [torch.randn(3, 5, generator=torch.Generator().manual_seed(index)).double() for index in range(2)]
    program = program_of(nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)), data)
    brief = collect(program, ["_0"], gram=False)
    assert (brief["_0"].gram, set(brief)) == (None, {"_0"})
    whole = collect(program)
    check(whole["_0"], torch.cat(data), axis=-1)
    assert collect(program, gram=False)["_0"] is whole["_0"]


def test_each_call_of_a_layer_has_statistics_of_its_own() -> None:
    data = batches(3, 2, shape=(3, 5, 5))
    program = program_of(model := Twice(), data)
    found = collect(program)
    assert [node.name for node in program.nodes if program.op(node) == "conv2d"] == list(found)
    first, second, left, right = found.values()
    check(first, torch.cat(data))
    check(second, model.conv(torch.cat(data)).relu().detach())
    check(left, model.conv(model.conv(torch.cat(data)).relu()).detach())
    assert left is right


def test_low_precision_is_summed_in_float64() -> None:
    data = [batch.bfloat16() for batch in batches(3, 2, shape=(4,))]
    program = capture(nn.Sequential(nn.Linear(4, 2)).bfloat16().eval(), (data[0],), calibration=data)
    check(collect(program)["_0"], torch.cat(data).double())


def test_functional_layers_have_none() -> None:
    class Functional(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, x)

    assert dict(collect(program_of(Functional(), batches(3, shape=(4,))))) == {}


class Counted:
    """Batches that count how often they are read from the start."""

    def __init__(self, data: list[torch.Tensor]) -> None:
        self.data, self.reads = data, 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        self.reads += 1
        return iter(self.data)


def test_the_data_are_read_once_for_all_that_is_not_known() -> None:
    data = Counted(batches(2, 3, shape=(3, 5, 5)))
    program = capture(Twice().double().eval(), (data.data[0],), calibration=data)
    assert list(collect(program, ["left"])) == ["left"]
    assert collect(program, ["right", "left"])["left"] is collect(program)["left"]
    assert data.reads == 3  # left; right; the two calls of conv
    assert len(collect(program)) == len(collect(program.copy())) == 4
    assert data.reads == 3


def test_an_edit_forgets_them_and_carrying_keeps_them() -> None:
    data = Counted(batches(2, 3, shape=(3, 5, 5)))
    program = capture(Twice().double().eval(), (data.data[0],), calibration=data)
    found = collect(program).kept("left", [2, 0])
    node = program.node("left")
    weight = program.module_of(node).get_parameter("weight")
    edit.set_tensor(program, node, "weight", weight[:, [2, 0]])
    carry(program, found)
    assert collect(program) is found
    assert data.reads == 1
    edit.set_tensor(program, node, "weight", weight)
    assert collect(program)["left"].mean.shape == (3,)
    assert data.reads == 2


def test_training_forgets_them() -> None:
    data = batches(8, shape=(4,))
    program = program_of(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), data)
    before = collect(program)["_1"].mean
    with torch.no_grad():
        for parameter in program.module.parameters():  # as an optimizer does
            parameter.mul_(2)
        now = program.module.get_submodule("0")(data[0]).mean(0)
    assert not torch.allclose(before, now)
    torch.testing.assert_close(collect(program)["_1"].mean, now)


def test_kept_channels_are_those_asked_for_and_nothing_is_written() -> None:
    data = batches(4, shape=(5,))
    found = collect(program_of(nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2)), data))
    sliced = found.kept("_0", torch.tensor([4, 1]))
    check(sliced["_0"], data[0][:, [4, 1]])
    check(found["_0"], data[0])
    assert sliced["_1"] is found["_1"]


def test_memory_does_not_grow_with_the_number_of_batches() -> None:
    """Of what the layers were given and gave, no more is alive after 30 batches than after 2."""
    values: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    class Stream:
        def __iter__(self) -> Iterator[torch.Tensor]:
            for index in range(31):
                alive.append(sum(value() is not None for value in values))
                yield torch.full((2, 3, 5, 5), float(index), dtype=torch.float64)

    def note(_: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        values.extend(map(weakref.ref, (*inputs, output)))

    program = program_of(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)), Stream())
    alive.clear()
    hook = nn.modules.module.register_module_forward_hook(note)
    assert collect(program)["_0"].count == 31 * 2 * 25
    hook.remove()
    assert len(values) == 31 * 6
    assert alive[2] == alive[30] <= 6


def test_the_program_and_the_data_are_untouched() -> None:
    data = batches(2, 3, shape=(3, 5, 5))
    before = [batch.clone() for batch in data]
    program = program_of(Twice(), data)
    text, edits = program.text(), program.edits
    collect(program)
    assert (program.text(), program.edits) == (text, edits)
    assert all(map(torch.equal, data, before))


def failing(data: Iterable[Any] | None, layers: Iterable[str] | None = None) -> str:
    program = capture(Twice().double().eval(), batches(2, shape=(3, 5, 5))[0], calibration=data)
    with pytest.raises(InputError) as caught:
        collect(program, layers)
    return str(caught.value)


def test_errors_say_what_is_wrong() -> None:
    data = batches(2, 3, shape=(3, 5, 5))
    assert failing(None) == "this needs data: pass calibration=, an iterable of batches such as a DataLoader"
    assert failing([]) == "calibration holds no batch"
    assert failing([*data, data[0] / 0]) == "the input of conv is not finite on the calibration data"
    why = "'relu' calls no convolution or linear module: the layers are conv, conv_1, left, right"
    assert failing(data, ["left", "relu"]) == why


def test_runs_share_one_random_state() -> None:
    """Statistics of a program in training mode are the same each time, and the caller's generator is left alone."""
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 2)).train()
    data = [batch.float() for batch in batches(8, shape=(4,))]
    state = torch.get_rng_state()
    one, other = (collect(capture(model, (data[0],), calibration=data))["_1"].mean for _ in range(2))
    assert torch.equal(one, other)
    assert torch.equal(state, torch.get_rng_state())


def test_a_layer_sees_what_an_operator_in_place_has_left() -> None:
    data = batches(3, shape=(4,))
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))
    check(collect(program_of(model, data))["_2"], model[:2](data[0]).detach())


@pytest.mark.parametrize("batch", [1, 8, 64, 640])
@pytest.mark.parametrize("channels", [16, 600])
def test_noise_of_the_covariance_is_that_of_independent_samples(batch: int, channels: int) -> None:
    generator = torch.Generator().manual_seed(0)
    values = 3 + torch.randn(640, channels, generator=generator, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(channels, 2)).double().eval()
    found = collect(capture(model, values[:2], calibration=list(values.split(batch))))["_0"]
    # of a normal distribution: (1 + |S|² / tr(S)²) / n
    expected = (1 + 1 / channels) / 640
    if batch > 1:
        assert found.noise == pytest.approx(expected, rel=0.4)
    else:
        # the centre is a single sample then, which adds to it
        assert expected < found.noise < 4 * expected


def test_positions_that_say_the_same_are_no_more_samples() -> None:
    values = torch.randn(320, 8, 1, 1, generator=torch.Generator().manual_seed(0)).expand(320, 8, 5, 5)
    found = collect(capture(nn.Sequential(nn.Conv2d(8, 2, 1)).eval(), values[:2], calibration=list(values.split(32))))
    assert found["_0"].noise == pytest.approx((1 + 1 / 8) / 320, rel=0.3)
