"""quantize(mode="qat"): it computes what static quantization computes, trains, and stays what it is."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxopt
from fxopt import Program
from fxopt.errors import BackendError, InputError, PipelineError
from fxopt.fake_quantization import FakeQuantize, FakeQuantizedWeight
from fxopt.integer_scheme import INT8, UINT8
from fxopt.passes import Quantize
from fxopt.quantization import Affine, dequantize, quantize

VNNI = fxopt.Target(device="cpu", instruction_set="AVX512 VNNI")
"""Where 8 bits are 8 bits."""


class Small(nn.Module):
    """A convolution with its norm and a pooling, a convolution called twice, a bias less, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.pool = nn.MaxPool2d(2)
        self.twice = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(torch.relu(self.norm(self.stem(x))))
        x = torch.relu(self.twice(torch.relu(self.twice(x))) + x)
        out: Tensor = self.head(x.mean((2, 3)))
        return out


@pytest.fixture(scope="module")
def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(16, 3, 8, 8, generator=generator), torch.randint(0, 5, (16,), generator=generator))
        for _ in range(3)
    ]


@pytest.fixture(scope="module")
def model(batches: list[tuple[Tensor, Tensor]]) -> nn.Module:
    torch.manual_seed(0)
    small = Small()
    for x, _ in batches:
        small(x)
    return small.eval()


def quantized(model: nn.Module, batches: Any, *before: str, **options: Any) -> Program:
    passes = ["fold_batch_norm", *before, Quantize(**{"mode": "qat", **options})]
    x = batches[0][0][:2]
    return fxopt.optimize(model, (x,), passes, calibration=batches, target=VNNI, on_no_match="ignore")


@pytest.mark.parametrize("options", [{"weight_bits": 4}, {"round": "nearest"}, {"per_channel": False}])
def test_training_begins_with_what_static_quantization_computes(
    options: dict[str, Any], model: nn.Module, batches: list[tuple[Tensor, Tensor]]
) -> None:
    aware = quantized(model, batches, **options)
    static = quantized(model, batches, mode="static", **options)
    x = torch.randn(9, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        # static quantization has the classifier's bias in integers
        torch.testing.assert_close(aware.module(x), static.module(x), rtol=0, atol=1e-4)
    assert "fake_quantized" in aware.properties
    assert "quantized" not in aware.properties


def test_parameters_keep_their_names(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    program = quantized(model, batches)
    names = [name for name, _ in program.module.named_parameters()]
    layers = [f"{layer}.{name}" for layer in ("stem", "twice", "head") for name in ("weight", "scale", "bias")]
    values = ["x", "relu", "relu_1", "twice_1", "relu_2", "mean"]
    assert sorted(names) == sorted([*layers, *(f"{value}_quantized.scale" for value in values)])
    # what has the layout of another value has its step
    assert sum(program.op(node) == "fake_quantize" for node in program.nodes) == len(values) + 1


def test_gradients_reach_weights_steps_and_biases_and_training_lowers_the_loss(
    model: nn.Module, batches: list[tuple[Tensor, Tensor]]
) -> None:
    module = quantized(model, batches, weight_bits=4).module.train()
    optimizer = torch.optim.Adam(module.parameters(), 0.003)
    before = {name: tensor.detach().clone() for name, tensor in module.named_parameters()}
    losses = []
    for _ in range(10):
        loss = torch.stack([F.cross_entropy(module(x), y) for x, y in batches]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.97 * losses[0]
    for name, tensor in module.named_parameters():
        assert tensor.grad is not None, name
        assert bool(tensor.grad.any()), name
        assert not torch.equal(tensor, before[name]), name


def test_the_gradients_are_those_of_learned_steps() -> None:
    fake = FakeQuantize(Affine(UINT8, 0.5, 10))
    values = torch.tensor([[-7.0, -4.9, 0.3, 0.6, 1000.0]], requires_grad=True)
    given = fake(values)
    assert given.tolist() == [[-5.0, -5.0, 0.5, 0.5, 122.5]]
    given.sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [[0.0, 1.0, 1.0, 1.0, 0.0]]
    # low and high beyond the range, what rounding moves inside it; by the root of five numbers times 245
    expected = (-10 + (-10 + 9.8) + (1 - 0.6) + (1 - 1.2) + 245) / (5 * 245) ** 0.5
    assert fake.scale.grad is not None
    assert fake.scale.grad.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("affine", [Affine(UINT8, 0.0371, 0), Affine(UINT8, 0.1, 77), Affine(INT8, 0.013, 0)])
def test_values_are_those_of_the_operators_to_the_last_bit(affine: Affine) -> None:
    affine = affine._replace(scale=float(torch.tensor(affine.scale)))
    values = 4 * torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    fake = FakeQuantize(affine)
    assert fake.affine == affine
    codes = quantize(values, *affine.arguments)
    assert torch.equal(fake(values).detach(), dequantize(codes, *affine.arguments))


def test_a_weight_is_that_of_its_integers_to_the_last_bit() -> None:
    torch.manual_seed(0)
    for shape in ((7,), (1,)):
        held = FakeQuantizedWeight(nn.Parameter(torch.randn(7, 3, 2, 2)), torch.rand(shape) / 8, 4)
        assert torch.equal(held().detach(), held.frozen()())
        assert int(held.frozen().codes.abs().max()) == 7


def test_a_step_that_training_drives_below_zero_stays_a_step() -> None:
    fake = FakeQuantize(Affine(UINT8, 0.5, 0))
    fake.scale.data.fill_(-0.25)
    assert fake.affine.scale == 0.25
    fake.scale.data.zero_()
    assert fake.affine.scale > 0
    assert bool(fake(torch.ones(3)).isfinite().all())


def test_it_trains_with_the_bits_of_the_kernels(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    for isa, bits in (("AVX2", 7), ("AVX512 VNNI", 8)):
        program = fxopt.optimize(
            model,
            (batches[0][0][:2],),
            ["fold_batch_norm", Quantize(mode="qat")],
            calibration=batches,
            target=fxopt.Target(device="cpu", instruction_set=isa),
        )
        held = [item for item in program.module.modules() if isinstance(item, FakeQuantizedWeight)]
        assert {item.bits for item in held} == {bits}


def test_weights_behind_a_mask_stay_zero(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    module = quantized(model, batches, "prune_weights").module.train()
    held: Any = module.get_submodule("twice")
    zero = held() == 0
    assert 0.5 <= float(zero.float().mean()) < 0.8
    optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9, weight_decay=1e-2)
    for x, y in batches:
        optimizer.zero_grad()
        F.cross_entropy(module(x), y).backward()
        optimizer.step()
    assert bool((held()[~held.mask] == 0).all())
    assert bool((held.weight[~held.mask] == 0).all())


def test_a_weight_of_several_layers_stays_one(batches: list[tuple[Tensor, Tensor]]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU(), nn.Conv2d(3, 3, 3))
    model[2].weight = model[0].weight
    program = quantized(model.eval(), batches)
    held = [node for node in program.nodes if program.op(node) == "fake_quantized_weight"]
    assert len(held) == 1
    module = program.module
    assert [name for name, _ in module.named_parameters() if name.endswith("weight")] == ["0.weight"]
    assert [name for name, _ in module.named_parameters() if "bias" in name] == ["0.bias", "2.bias_1"]


def test_a_frozen_weight_stays_frozen(batches: list[tuple[Tensor, Tensor]]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3)).eval()
    model[0].requires_grad_(False)
    parameters = dict(quantized(model, batches).module.named_parameters())
    frozen = [name for name, parameter in parameters.items() if not parameter.requires_grad]
    assert sorted(frozen) == ["0.bias", "0.scale", "0.weight"]


def test_it_stays_what_it_is_when_it_is_captured_again(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    program = quantized(model, batches)
    again = fxopt.optimize(copy.deepcopy(program.module), (batches[0][0][:2],), ["default"], on_no_match="ignore")
    kinds = ("fake_quantize", "fake_quantized_weight")
    assert [again.op(node) for node in again.nodes if again.op(node) in kinds] == [
        program.op(node) for node in program.nodes if program.op(node) in kinds
    ]
    names = [{name for name, _ in item.module.named_parameters()} for item in (program, again)]
    assert names[0] == names[1]


def test_engines_other_than_eager_refuse_it(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    module, x = quantized(model, batches).module, batches[0][0][:2]
    with pytest.raises(
        BackendError,
        match=r"^x_quantized is fake quantization, which trains, and onnx runs inference: "
        "put freeze_quantization into passes$",
    ):
        fxopt.compile(module, (x,), passes=[], backend="onnx")
    eager = fxopt.compile(module, (x,), passes=[], backend="eager")
    with torch.no_grad():
        assert torch.equal(eager(x), module(x))


def test_it_saves_and_loads_by_torch(model: nn.Module, batches: list[tuple[Tensor, Tensor]], tmp_path: Any) -> None:
    program = quantized(model, batches)
    eager = fxopt.compile(program.module, (batches[0][0][:2],), passes=[], backend="eager")
    eager.save(tmp_path / "engine")
    assert torch.equal(fxopt.load(tmp_path / "engine")(batches[1][0]), eager(batches[1][0]))


def test_what_may_not_follow(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    for later in ("quantize", "prune_weights"):
        with pytest.raises(PipelineError, match=f"{later} cannot run on a program that is 'fake_quantized' already"):
            fxopt.optimize(
                model, (batches[0][0],), ["fold_batch_norm", Quantize(mode="qat"), later], calibration=batches
            )
    with pytest.raises(PipelineError, match="requires a program that is 'batch_norm_folded': put fold_batch_norm"):
        fxopt.optimize(model, (batches[0][0],), [Quantize(mode="qat"), "fold_batch_norm"], calibration=batches)
    with pytest.raises(InputError, match="pass calibration="):
        fxopt.optimize(model, (batches[0][0],), ["fold_batch_norm", Quantize(mode="qat")])


def test_what_it_is_told_is_printed_and_what_it_provides_depends_on_the_mode() -> None:
    assert str(Quantize(mode="qat", weight_bits=4)) == "quantize(mode='qat', weight_bits=4)"
    assert Quantize(mode="qat").provides == {"fake_quantized"}
    assert Quantize().provides == {"quantized"}
    assert Quantize(mode="qat") == Quantize(mode="qat") != Quantize()
    with pytest.raises(ValueError, match="mode must be one of"):
        Quantize(mode="aware")  # type: ignore[arg-type]


def test_golden(batches: list[tuple[Tensor, Tensor]]) -> None:
    torch.manual_seed(0)
    program = quantized(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), batches)
    assert [program.op(node) for node in program.nodes] == [
        "placeholder",
        "fake_quantize",
        "get_attr",
        "fake_quantized_weight",
        "conv2d",
        "relu",
        "fake_quantize",
        "output",
    ]
