"""quantize: what becomes integers and what does not, how far it is off, and that engines compute what it simulates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt import Program
from fxopt.errors import InputError, PipelineError
from fxopt.integer_scheme import Scheme
from fxopt.passes import Quantize
from fxopt.target import Target
from fxopt.testing import assert_untouched, model_state

pytestmark = pytest.mark.usefixtures("integers_everywhere")


class Block(nn.Module):
    """A residual block, a concatenation of channels that were split, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.one = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.few = nn.Conv2d(4, 4, 1, bias=False)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(torch.relu(self.stem(x)))
        x = torch.relu(self.norm(self.one(x)) + x)
        first, second = nn.functional.relu6(self.depthwise(x)).chunk(2, 1)
        x = torch.cat([self.few(first), second], 1)
        out: Tensor = self.head(nn.functional.silu(x).mean((2, 3)))
        return out


@pytest.fixture(scope="module")
def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(16, 3, 12, 12, generator=generator) for _ in range(3)]


@pytest.fixture(scope="module")
def model(batches: list[Tensor]) -> nn.Module:
    torch.manual_seed(0)
    block = Block()
    for batch in batches:
        block(batch)
    return block.eval()


def quantized(model: nn.Module, batches: list[Tensor], **options: Any) -> Program:
    return fxopt.optimize(
        model, (batches[0][:2],), ["fold_batch_norm", Quantize(**options)], calibration=batches, on_no_match="ignore"
    )


def sqnr(expected: Tensor, found: Tensor) -> float:
    return float(10 * torch.log10(expected.square().sum() / (expected - found).square().sum()))


def test_outputs_stay_close_and_the_model_as_it_was(model: nn.Module, batches: list[Tensor]) -> None:
    state = model_state(model)
    fresh = torch.randn(32, 3, 12, 12, generator=torch.Generator().manual_seed(7))
    program = quantized(model, batches)
    assert_untouched(model, state)
    with torch.no_grad():
        assert sqnr(model(fresh), program.module(fresh)) > 28
    assert program.cost().bytes < 0.5 * fxopt.capture(model, (batches[0],)).cost().bytes
    assert "quantized" in program.properties


def test_what_is_read_and_given_as_integers(model: nn.Module, batches: list[Tensor]) -> None:
    program = quantized(model, batches)
    rewrites = program.report.passes[-1].rewrites
    values = {rewrite.node: rewrite.params for rewrite in rewrites if "affine" in rewrite.params}
    # the input, behind fused activations, the sum, the parts, what is concatenated, a function of it, and its mean
    assert list(values) == [
        "x",
        "relu",
        "pool",
        "one",
        "relu_1",
        "relu6",
        "getitem",
        "getitem_1",
        "few",
        "cat",
        "silu",
        "mean",
    ]
    for one, other in (("relu", "pool"), ("relu6", "getitem"), ("relu6", "getitem_1")):
        assert values[one]["affine"] == values[other]["affine"]
    # an integer kernel gives integers to everyone, a floating one to those that ask
    assert values["cat"]["readers"] == ["silu"]
    assert values["mean"]["readers"] == ["head"]
    layers = [rewrite.params["layers"] for rewrite in rewrites if "layers" in rewrite.params]
    assert layers == [["stem"], ["one"], ["depthwise"], ["few"], ["head"]]


@pytest.mark.parametrize("observer", ["minmax", "percentile", "mse"])
@pytest.mark.parametrize("rounding", ["nearest", "adaround", "gptq"])
def test_observers_and_roundings(observer: Any, rounding: Any, model: nn.Module, batches: list[Tensor]) -> None:
    program = quantized(model, batches, observer=observer, round=rounding)
    with torch.no_grad():
        assert sqnr(model(batches[0]), program.module(batches[0])) > 25


def test_one_scale_for_a_layer_loses_more(batches: list[Tensor]) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 8, 3)
    conv.weight.data *= torch.logspace(-2, 0, 8).reshape(8, 1, 1, 1)
    each, all_in_one = (quantized(conv, batches, per_channel=flag) for flag in (True, False))
    with torch.no_grad():
        expected = conv(batches[0])[:, 0]
        errors = [(expected - item.module(batches[0])[:, 0]).square().sum() for item in (each, all_in_one)]
    assert errors[0] < 0.9 * errors[1]


def kernels_of(path: Path) -> list[str]:
    """What ONNX Runtime makes of a model."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path.with_name("optimized.onnx"))
    options.log_severity_level = 3
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(path.with_name("optimized.onnx")).graph.node]


def test_zeros_around_a_value_are_left_to_the_kernel(batches: list[Tensor], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(8, 4, 3, 2)).eval()
    compiled = fxopt.compile(
        model, (batches[0][:2],), passes=["fold_batch_norm", "quantize"], calibration=batches, on_no_match="ignore"
    )
    values = [
        rewrite.params["readers"] for rewrite in compiled.report.passes[-1].rewrites if "affine" in rewrite.params
    ]
    assert values == [["_0"], ["_2"], ["output"]]
    with torch.no_grad():
        assert sqnr(model(batches[0]), compiled(batches[0])) > 30
    compiled.save(tmp_path / "engine")
    kinds = kernels_of(tmp_path / "engine" / "model.onnx")
    assert kinds.count("QLinearConv") == 2
    assert "Pad" not in kinds


def test_a_linear_layer_behind_zeros(batches: list[Tensor]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.ZeroPad2d((0, 1, 0, 0)), nn.Linear(11, 5)).eval()
    program = quantized(model, batches)
    with torch.no_grad():
        assert sqnr(model(batches[0]), program.module(batches[0])) > 25


def test_an_engine_computes_what_is_simulated(model: nn.Module, batches: list[Tensor], tmp_path: Path) -> None:
    compiled = fxopt.compile(
        model, (batches[0][:2],), passes=["fold_batch_norm", "quantize"], calibration=batches, backend="onnx"
    )
    program = quantized(model, batches)
    fresh = torch.randn(9, 3, 12, 12, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        assert sqnr(program.module(fresh), compiled(fresh)) > 40
    compiled.save(tmp_path / "engine")
    assert torch.equal(fxopt.load(tmp_path / "engine")(fresh), compiled(fresh))
    kinds = kernels_of(tmp_path / "engine" / "model.onnx")
    assert kinds.count("QLinearConv") == 4
    assert kinds.count("QGemm") == 1
    assert {"QLinearAdd", "QLinearConcat"} <= set(kinds)
    assert "Conv" not in kinds
    assert "Gemm" not in kinds


def test_it_saves_and_loads_by_torch(model: nn.Module, batches: list[Tensor], tmp_path: Path) -> None:
    compiled = fxopt.compile(
        model, (batches[0][:2],), passes=["fold_batch_norm", "quantize"], calibration=batches, backend="eager"
    )
    compiled.save(tmp_path / "engine")
    assert torch.equal(fxopt.load(tmp_path / "engine")(batches[1]), compiled(batches[1]))


def test_a_linear_layer_gives_floats_and_reads_integers_at_any_rank(batches: list[Tensor]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 4, bias=False))
    program = quantized(model, batches)
    assert [rewrite.node for rewrite in program.report.passes[-1].rewrites] == ["input_1", "_1", "_0", "_2"]
    compiled = fxopt.compile(
        model, (batches[0][:2],), passes=["fold_batch_norm", "quantize"], calibration=batches, on_no_match="ignore"
    )
    with torch.no_grad():
        assert sqnr(model(batches[0]), compiled(batches[0])) > 30
        assert sqnr(program.module(batches[0]), compiled(batches[0])) > 60


def test_a_layout_that_nobody_reads_as_integers_gives_floats(batches: list[Tensor]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.Flatten(2), nn.Flatten(), nn.Softmax(1))
    program = quantized(model, batches)
    assert [rewrite.node for rewrite in program.report.passes[-1].rewrites] == ["input_1", "_0", "_0"]
    assert not program.report.passes[-1].skips


@pytest.mark.parametrize("reverse", [False, True])
def test_parts_that_are_joined_again_unseen(reverse: bool, batches: list[Tensor]) -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            parts = torch.chunk(self.first(x), 2, 1)
            out: Tensor = self.second(torch.cat(parts[::-1] if reverse else parts, 1))
            return out

    model = Halves().eval()
    with torch.no_grad():
        assert sqnr(model(batches[0]), quantized(model, batches).module(batches[0])) > 30


def test_a_layer_called_twice(batches: list[Tensor]) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.conv(torch.relu(self.conv(x)))
            return out

    model = Twice().eval()
    program = quantized(model, batches)
    with torch.no_grad():
        assert sqnr(model(batches[0]), program.module(batches[0])) > 25
    held = [node for node in program.nodes if program.op(node) == "quantized_tensor"]
    assert len(held) == 1


def test_masked_weights_stay_zero(model: nn.Module, batches: list[Tensor]) -> None:
    program = fxopt.optimize(
        model, (batches[0][:2],), ["fold_batch_norm", "prune_weights", "quantize"], calibration=batches
    )
    held: Any = next(item for name, item in program.module.named_modules() if name == "one")
    mask: Any = fxopt.optimize(model, (batches[0][:2],), ["fold_batch_norm", "prune_weights"]).module.one.mask
    assert 2 * int(mask.sum()) == mask.numel()
    assert not bool(held()[mask == 0].any())


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (nn.ConvTranspose2d(3, 4, 3), "conv_transpose2d has no integer kernel"),
        (nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")), "pads with padding_mode='reflect'"),
        (nn.Conv2d(3, 4, 3).double(), "it does not compute in float32"),
    ],
)
def test_what_is_left_alone(layer: nn.Module, why: str, batches: list[Tensor]) -> None:
    double = next(layer.parameters()).dtype == torch.float64
    inputs = [batch.double() for batch in batches] if double else batches
    with pytest.raises(InputError, match=f"finds no layer that could compute with integers.*{why}"):
        quantized(layer, inputs)


def test_ignored_layers_keep_their_weights(model: nn.Module, batches: list[Tensor]) -> None:
    program = quantized(model, batches, ignore=("head", "stem"))
    skips = {skip.node: skip.why for skip in program.report.passes[-1].skips}
    assert skips == {"head": "ignored", "stem": "ignored"}
    assert torch.equal(program.module.state_dict()["head.weight"], model.state_dict()["head.weight"])


def test_which_layer_lost_it(model: nn.Module, batches: list[Tensor]) -> None:
    program = fxopt.optimize(model, (batches[0][:2],), ["fold_batch_norm"], calibration=batches)
    losses = Quantize(round="nearest", weight_bits=4).losses(program)
    assert {item.path for item in losses} == {"stem", "one", "depthwise", "few", "head"}
    assert [item.sqnr_db for item in losses] == sorted(item.sqnr_db for item in losses)
    for item in (losses[0], losses[-1]):
        others = tuple(path for path in ("stem", "one", "depthwise", "few", "head") if path != item.path)
        alone = quantized(model, batches, round="nearest", weight_bits=4, ignore=others, equalize="off")
        data = torch.cat(batches)[:32]
        with torch.no_grad():
            assert sqnr(program.module(data), alone.module(data)) == pytest.approx(item.sqnr_db, abs=1.0)
    assert str(losses[0]) == f"{losses[0].path}: {losses[0].sqnr_db:.1f} dB"


def test_the_worst_layers_stay_as_they_are_until_the_floor_holds(model: nn.Module, batches: list[Tensor]) -> None:
    program = fxopt.optimize(model, (batches[0][:2],), ["fold_batch_norm"], calibration=batches)
    ranked = Quantize(weight_bits=4).losses(program)
    data = torch.cat(batches)[:32]
    with torch.no_grad():
        floor = sqnr(model(data), quantized(model, batches, weight_bits=4).module(data)) + 4
    found = quantized(model, batches, weight_bits=4, min_sqnr_db=floor)
    left = found.report.passes[-1].skips
    assert 0 < len(left) < 5
    assert {skip.node for skip in left} == {item.layers[0] for item in ranked[: len(left)]}
    assert left[0].why.startswith("left in floating point for min_sqnr_db: it alone would leave ")
    with torch.no_grad():
        assert sqnr(model(data), found.module(data)) >= floor
    assert not quantized(model, batches, min_sqnr_db=10).report.passes[-1].skips
    with pytest.raises(InputError, match="no layer can be quantized with min_sqnr_db=90: the best of them"):
        quantized(model, batches, weight_bits=4, min_sqnr_db=90)


class WithClass(nn.Module):
    def __init__(self, model: nn.Module, *, scores: bool) -> None:
        super().__init__()
        self.model, self.scores = model, scores

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.model(x)
        return (y, y.argmax(1)) if self.scores else (y.argmax(1),)


def test_a_floor_is_of_floating_outputs(model: nn.Module, batches: list[Tensor]) -> None:
    plain = quantized(model, batches, weight_bits=4, min_sqnr_db=18)
    both = quantized(WithClass(model, scores=True).eval(), batches, weight_bits=4, min_sqnr_db=18)
    left, right = ([skip.node for skip in each.report.passes[-1].skips] for each in (plain, both))
    assert [f"model.{name}" for name in left] == right
    with pytest.raises(InputError, match="min_sqnr_db needs an output of floating-point numbers"):
        quantized(WithClass(model, scores=False).eval(), batches, min_sqnr_db=18)


def test_outputs_keep_their_mean(model: nn.Module, batches: list[Tensor]) -> None:
    def lost(program: Program) -> float:
        seen = torch.cat(batches)
        with torch.no_grad():
            return float((program.module(seen) - model(seen)).mean(0).abs().max())

    kept = quantized(model, batches, weight_bits=4)
    told = [rewrite for rewrite in kept.report.passes[-1].rewrites if "keeps_mean" in rewrite.params]
    assert [rewrite.params["layers"] for rewrite in told] == [["head"]]
    assert told[0].what == "4-bit weights of head, whose outputs keep their mean"
    # but for its own rounding
    assert lost(kept) < lost(quantized(model, batches, weight_bits=4, bias_correction=False)) / 20


class Heads(nn.Module):
    """Two outputs from layers in a row, and layers of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 4, bias=False), nn.Conv1d(6, 3, 3, padding=1)
        self.tied = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = torch.relu(self.stem(x))
        return self.one(y), torch.sigmoid(self.two(y.transpose(1, 2))), self.tied(x) + self.tied(y)


def test_all_last_layers_keep_their_mean_where_they_have_a_bias_of_their_own() -> None:
    torch.manual_seed(0)
    data = [torch.randn(8, 5, 6) for _ in range(4)]
    model = Heads().eval()
    program = quantized(model, data, round="nearest")
    told = [rewrite.params for rewrite in program.report.passes[-1].rewrites if "keeps_mean" in rewrite.params]
    assert [params["layers"] for params in told] == [["one"], ["two"]]
    seen = torch.cat(data)
    with torch.no_grad():
        (one, two, _), (expected, other, _) = program.module(seen), model(seen)
    assert float((one - expected).mean((0, 1)).abs().max()) < 1e-4
    assert float((torch.logit(two) - torch.logit(other)).mean((0, 2)).abs().max()) < 1e-3


@pytest.mark.parametrize("far", [1.0, 40.0])
def test_ranges_are_chosen_in_the_way_that_the_outputs_lose_less(far: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    data = [torch.randn(16, 8) for _ in range(2)]
    data[0][0, 0] *= far
    losses = {}
    for observer in ("mse", "percentile", "auto"):
        program = quantized(model, data, observer=observer, bias_correction=False)
        with torch.no_grad():
            losses[observer] = sqnr(model(torch.cat(data)), program.module(torch.cat(data)))
    assert losses["mse"] != losses["percentile"]
    assert losses["auto"] == max(losses["mse"], losses["percentile"])


def test_without_bias_correction_the_weights_answer_for_the_mean(model: nn.Module, batches: list[Tensor]) -> None:
    program = quantized(model, batches, weight_bits=4, bias_correction=False, equalize="off")
    biases = [tensor for name, tensor in program.module.state_dict().items() if name.endswith("bias")]
    for name in ("stem", "depthwise"):
        assert any(torch.equal(tensor, model.state_dict()[f"{name}.bias"]) for tensor in biases)
    with torch.no_grad():
        assert sqnr(model(batches[0]), program.module(batches[0])) > 15


def test_data_and_folding_are_asked_for(model: nn.Module, batches: list[Tensor]) -> None:
    with pytest.raises(InputError, match="pass calibration="):
        fxopt.optimize(model, (batches[0],), ["fold_batch_norm", "quantize"])
    with pytest.raises(PipelineError, match="requires a program that is 'batch_norm_folded': put fold_batch_norm"):
        fxopt.optimize(model, (batches[0],), ["quantize", "fold_batch_norm"], calibration=batches)
    bad = [torch.full((2, 3, 12, 12), float("nan"))]
    with pytest.raises(InputError, match="not finite on the calibration data"):
        fxopt.optimize(model, (batches[0],), ["fold_batch_norm", "quantize"], calibration=bad)


@pytest.mark.parametrize("backend", ["eager", "onnx"])
def test_outputs_without_weights_keep_their_bias(backend: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 8)).eval()
    with torch.no_grad():
        for layer in (model[0], model[3]):
            layer.weight[:2] = 0  # type: ignore[operator, index]
            layer.bias[:2] = torch.tensor([0.13, -0.2])  # type: ignore[operator, index]
    x = 100 * torch.rand(16, 3, 4, 4)
    compiled = fxopt.compile(model, (x[:2],), passes=["default", "quantize"], calibration=[x], backend=backend)
    torch.testing.assert_close(compiled(x[2:4])[:, :2], model(x[2:4])[:, :2], rtol=0, atol=0.01)


@pytest.mark.parametrize("part", ["a channel", "all channels"])
@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-8, 1e-6, 1e-4])
def test_weights_that_are_nothing_beside_the_bias(size: float, part: str) -> None:
    """Engines count a bias in steps of the weight's scale, in 32 bits."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 8)).eval()
    with torch.no_grad():
        for layer in (model[0], model[3]):
            layer.weight[: 1 if part == "a channel" else None] *= size  # type: ignore[operator, index]
            layer.bias[:2] = torch.tensor([20.0, -5.0])  # type: ignore[operator, index]
    x = torch.randn(16, 3, 4, 4)
    compiled = fxopt.compile(model, (x[:2],), passes=["default", "quantize"], calibration=[x], backend="onnx")
    with torch.no_grad():
        assert sqnr(model(x[2:4]), compiled(x[2:4])) > 30


@pytest.mark.parametrize("shape", [(3, 12, 12), (2, 3, 12, 12)])
def test_images_with_and_without_a_batch_axis(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(-2), nn.Linear(64, 3)).eval()
    images = [torch.randn(shape) for _ in range(4)]
    program = fxopt.optimize(model, (images[0],), ["default", "quantize"], calibration=images)
    assert [program.op(node) for node in program.nodes].count("quantized_tensor") >= 3
    x = torch.randn(shape)
    with torch.no_grad():
        assert sqnr(model(x), program.module(x)) > 25


def test_a_vector() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    program = fxopt.optimize(
        model, (torch.randn(8),), ["default", "quantize"], calibration=[torch.randn(8) for _ in range(64)]
    )
    x = torch.randn(8)
    with torch.no_grad():
        assert sqnr(model(x), program.module(x)) > 20


def test_data_of_one_value_do_no_harm(model: nn.Module, batches: list[Tensor]) -> None:
    program = quantized(model, [torch.zeros(4, 3, 12, 12)])
    assert bool(program.module(batches[0]).isfinite().all())


def test_a_plan_replays_on_another_checkpoint(model: nn.Module, batches: list[Tensor]) -> None:
    (_, plan) = fxopt.explain(model, (batches[0][:2],), ["fold_batch_norm", "quantize"], calibration=batches)
    torch.manual_seed(5)
    other = fxopt.optimize(Block().eval(), (batches[0][:2],), ["fold_batch_norm"], calibration=batches)
    for rewrite in plan.rewrites:
        Quantize().apply(other, rewrite)
    assert sum(other.op(node) == "quantized_tensor" for node in other.nodes) == 6  # five weights, one bias of integers


def test_pairs_of_weights_fit_where_two_products_are_added_in_sixteen_bits(batches: list[Tensor]) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 8, 3)
    for instruction_set, most in (("AVX2", 128), ("AVX512 VNNI", 254)):
        program = fxopt.optimize(
            conv,
            (batches[0],),
            ["fold_batch_norm", "quantize"],
            calibration=batches,
            target=Target(device="cpu", instruction_set=instruction_set),
            on_no_match="ignore",
        )
        codes = next(value for name, value in program.module.named_buffers() if name.endswith("codes")).int()
        inner = codes.permute(0, 2, 3, 1).reshape(8, -1)[:, :26].reshape(8, 13, 2)
        sums = torch.maximum(inner.clamp(min=0).sum(2), -inner.clamp(max=0).sum(2))
        assert most * 0.75 < int(sums.max()) <= most


@pytest.mark.parametrize(
    ("target", "bits", "signed"),
    [
        (Target(device="cpu", instruction_set="AVX2"), 7, False),
        (Target(device="cpu", instruction_set="AVX512"), 7, False),
        (Target(device="cpu", instruction_set="AVX512 VNNI"), 8, False),
        (Target(device="cpu", instruction_set="DEFAULT"), 8, False),
        (Target(device="cuda", instruction_set="SM 9.0"), 8, True),
    ],
)
def test_schemes(target: Target, bits: int, signed: bool) -> None:
    scheme = Scheme.of(target)
    assert (scheme.weight_bits, scheme.activations.low < 0) == (bits, signed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"observer": "best"}, "observer must be one of"),
        ({"round": "up"}, "round must be one of"),
        ({"per_channel": 1}, "per_channel must be True or False"),
        ({"ignore": "head"}, "ignore must be a tuple of patterns"),
        ({"weight_bits": 5}, "weight_bits must be one of"),
        ({"equalize": True}, "equalize must be one of"),
        ({"bias_correction": 0}, "bias_correction must be True or False"),
        ({"min_sqnr_db": "20"}, "min_sqnr_db must be a number"),
        ({"min_sqnr_db": float("inf")}, "min_sqnr_db must be a number"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Quantize(**options)


def test_golden(batches: list[Tensor]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    model[0].weight.data = torch.from_numpy(np.linspace(-1, 1, 108, dtype=np.float32).reshape(4, 3, 3, 3))
    program = quantized(model, batches, observer="minmax", round="nearest")
    kinds = [program.op(node) for node in program.nodes]
    assert kinds == [
        "placeholder",
        "quantize",
        "dequantize",
        "get_attr",
        "quantized_tensor",
        "conv2d",
        "relu",
        "quantize",
        "dequantize",
        "output",
    ]
