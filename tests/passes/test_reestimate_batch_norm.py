"""`reestimate_batch_norm`: each BatchNorm has the statistics of what it sees, in the network that has them all."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator, Sequence
from typing import Any

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

import fxopt
from fxopt.analysis import norm_inputs
from fxopt.errors import InputError
from fxopt.frontends.capture import capture
from fxopt.passes import FoldBatchNorm, ReestimateBatchNorm
from fxopt.passes_base import Plan, Rewrite
from fxopt.program import Program
from fxopt.testing import assert_equivalent, assert_pass, assert_skips, random_program

Data = list[torch.Tensor]


def batches(*sizes: int, shape: tuple[int, ...], seed: int = 5) -> Data:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, *shape, generator=generator, dtype=torch.float64) * 2 + 0.5 for size in sizes]


def destroyed(model: nn.Module) -> nn.Module:
    """The model in evaluation mode, in float64, with statistics that have nothing to do with it."""
    generator = torch.Generator().manual_seed(7)
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            assert module.running_var is not None
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator) * 9)
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) * 99)
            if module.affine:
                module.weight.data.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
                module.bias.data.copy_(torch.randn(module.num_features, generator=generator))
    return model.eval().double()


def calibrated(program: Program, data: Data) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Mean and unbiased variance of the input of each BatchNorm call, over all batches at once."""
    found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    values: dict[str, torch.Tensor] = {}

    def watch(node: fx.Node, value: Any) -> None:
        values[node.name] = value
        if program.op(node) == "batch_norm":
            x = values[node.args[0].name].transpose(0, 1).flatten(1)  # type: ignore[union-attr]
            found[node.name] = x.mean(1), x.var(1)

    program.run(torch.cat(data), watch=watch)
    return found


def assert_consistent(program: Program, data: Data) -> None:
    """What defines the result: the program, with its statistics, gives each BatchNorm inputs that have them."""
    for name, (mean, variance) in calibrated(program, data).items():
        module = program.module_of(program.node(name))
        torch.testing.assert_close(module.get_buffer("running_mean"), mean)
        torch.testing.assert_close(module.get_buffer("running_var"), variance)


def reestimates(model: nn.Module, data: Data, rewrites: int, skips: Sequence[str] = ()) -> Program:
    return assert_pass(ReestimateBatchNorm(), model, (data[0],), rewrites=rewrites, skips=skips, calibration=data)


class Residual(nn.Module):
    """BatchNorms of different depths that meet, one of them at the end of a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.skip = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(3, 4, 3)
        self.norm1, self.norm2, self.norm3 = nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False), nn.BatchNorm2d(4)
        self.head, self.norm4 = nn.Linear(4, 6), nn.BatchNorm1d(6, momentum=None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm1(self.conv1(x)).relu_()
        y = self.norm2(self.conv2(y)) + self.norm3(self.skip(x))
        return self.norm4(self.head(y.mean((2, 3)))).relu()


def test_several_batches_of_odd_sizes() -> None:
    data = batches(5, 3, 1, 7, shape=(3, 6, 6))
    assert_consistent(reestimates(destroyed(Residual()), data, 4), data)


def test_the_first_norm_has_the_moments_of_the_data_themselves() -> None:
    data = batches(5, 3, shape=(3, 4))
    program = reestimates(destroyed(nn.Sequential(nn.BatchNorm1d(3))), data, 1)
    values = torch.cat(data).transpose(0, 1).reshape(3, -1)
    norm = program.module.get_submodule("0")
    torch.testing.assert_close(norm.running_mean, values.sum(1) / 32)
    squares = (values - values.mean(1, keepdim=True)).square().sum(1)
    torch.testing.assert_close(norm.running_var, squares / 31)


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (lambda: nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(4), nn.ReLU(), nn.BatchNorm1d(4)), (4, 5)),
        (lambda: nn.Sequential(nn.Conv3d(2, 4, 2, groups=2), nn.BatchNorm3d(4)), (2, 3, 4, 3)),
        (lambda: nn.Sequential(nn.ConvTranspose1d(2, 4, 3), nn.SyncBatchNorm(4)), (2, 6)),
    ],
)
def test_ranks(model: Any, shape: tuple[int, ...]) -> None:
    data = batches(3, 4, shape=shape)
    module = destroyed(model())
    assert_consistent(reestimates(module, data, sum(isinstance(item, _BatchNorm) for item in module)), data)


def test_windows_that_fit_into_memory_are_pooled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each window is normalized by its own statistics: with one batch to a window, as by PyTorch in training mode."""
    monkeypatch.setattr(norm_inputs, "_MEMORY", 1)
    data = batches(5, 3, 4, shape=(3, 6))
    model = destroyed(nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Conv1d(4, 2, 1)))
    model.append(nn.BatchNorm1d(2).double()).eval()
    model.requires_grad_(requires_grad=False)
    program = reestimates(model, data, 2)
    first = [model[0](batch) for batch in data]
    variances = [value.var((0, 2)) for value in first]
    means = [value.mean((0, 2)) for value in first]
    behind = [
        model[3](F.batch_norm(value, mean, variance, model[1].weight, model[1].bias, eps=model[1].eps).relu())
        for value, mean, variance in zip(first, means, variances, strict=True)
    ]
    for name, values in (("1", torch.cat(first)), ("4", torch.cat(behind))):
        norm = program.module.get_submodule(name)
        torch.testing.assert_close(norm.running_mean, values.mean((0, 2)))
        torch.testing.assert_close(norm.running_var, values.var((0, 2)))


class Shared(nn.Module):
    """One BatchNorm at two places that see different values."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.second(self.norm(self.first(x)).relu()) * 5)


def test_a_shared_norm_gets_statistics_for_each_call_and_shares_its_weights() -> None:
    data = batches(5, 3, shape=(3, 4, 4))
    program = reestimates(destroyed(Shared()), data, 2)
    assert_consistent(program, data)
    assert [rewrite.what for rewrite in program.report.passes[0].rewrites] == [
        "re-estimate norm for this one of its 2 calls",
        "re-estimate norm for this one of its 2 calls",
    ]
    one, other = (program.module_of(node) for node in program.nodes if program.op(node) == "batch_norm")
    assert one is not other
    assert one.weight is other.weight
    assert one.num_batches_tracked is not other.num_batches_tracked


def test_a_model_with_destroyed_statistics_recovers_before_folding() -> None:
    data = batches(5, 3, 8, shape=(3, 6, 6))
    healthy = fxopt.optimize(destroyed(Residual()), data[0], ReestimateBatchNorm(), calibration=data).module
    broken = copy.deepcopy(healthy)
    for name, buffer in broken.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.mul_(40).add_(3)
    assert not torch.allclose(broken(data[0]), healthy(data[0]), rtol=0.1)
    passes = ["reestimate_batch_norm", "fold_batch_norm"]
    program = fxopt.optimize(broken, data[0], passes, calibration=data, on_failure="raise")
    assert_equivalent(healthy, program, data[1], tolerance=1e-10)
    assert not any(program.op(node) == "batch_norm" for node in program.nodes)


def test_what_was_removed_is_made_up_for_where_the_norms_normalize() -> None:
    """Scaling a layer in front of BatchNorm changes nothing once the statistics follow."""
    data = batches(6, 5, shape=(3, 6, 6))
    program = fxopt.optimize(destroyed(Residual()), data[0], ReestimateBatchNorm(), calibration=data)
    scaled = copy.deepcopy(program.module)
    scaled.conv1.weight.data.mul_(7)
    scaled.conv1.bias.data.add_(3)
    for norm in (scaled.norm1, program.module.norm1):
        norm.eps = 0.0
    after = fxopt.optimize(scaled, data[0], ReestimateBatchNorm(), calibration=data)
    before = fxopt.optimize(program.module, data[0], ReestimateBatchNorm(), calibration=data)
    assert_equivalent(before, after, data[1], tolerance=1e-10)


def test_a_plan_replays_on_another_checkpoint() -> None:
    data = batches(5, 3, shape=(3, 6, 6))
    pass_ = ReestimateBatchNorm()
    torch.manual_seed(1)
    plan = Plan.of(pass_, capture(destroyed(Residual()), data[0], calibration=data))
    stored = json.loads(json.dumps([rewrite._asdict() for rewrite in plan.rewrites]))
    assert stored[0] == {"node": "norm1", "what": "re-estimate norm1", "params": {}}
    torch.manual_seed(2)
    program = capture(destroyed(Residual()), data[0], calibration=data)
    for rewrite in stored:
        pass_.apply(program, Rewrite(**rewrite))
    assert_consistent(program, data)


class Counted:
    def __init__(self, data: Data) -> None:
        self.data, self.reads = data, 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        self.reads += 1
        return iter(self.data)


def test_the_data_are_read_once() -> None:
    """By planning, and applying one rewrite after the other; once more where a plan is replayed."""
    data = Counted(batches(5, 3, shape=(3, 6, 6)))
    program = capture(destroyed(Residual()), data.data[0], calibration=data)
    result = fxopt.PassManager("reestimate_batch_norm").run(program)
    assert data.reads == 1
    whys = [f"norm{n} has the statistics of the calibration data already" for n in (1, 2, 3, 4)]
    assert_skips(ReestimateBatchNorm(), result, whys=whys)
    assert data.reads == 1
    for rewrite in Plan.of(ReestimateBatchNorm(), program).rewrites:
        ReestimateBatchNorm().apply(program, rewrite)
    assert data.reads == 2


def test_training_between_two_runs_is_noticed() -> None:
    data = batches(8, shape=(3, 6, 6))
    program = fxopt.optimize(destroyed(Residual()), data[0], ReestimateBatchNorm(), calibration=data)
    with torch.no_grad():
        for parameter in program.module.parameters():  # as an optimizer does
            parameter.mul_(1.5)
    again = fxopt.PassManager("reestimate_batch_norm").run(program)
    assert len(again.report.passes[-1].rewrites) == 4
    assert_consistent(again, data)


def test_data_are_asked_for() -> None:
    program = fxopt.capture(destroyed(Residual()), batches(2, shape=(3, 6, 6))[0])
    why = "reestimate_batch_norm needs data: pass calibration=, an iterable of unlabelled batches"
    with pytest.raises(InputError, match=why):
        fxopt.explain(program, passes="reestimate_batch_norm")
    with pytest.raises(InputError, match=why):
        fxopt.optimize(destroyed(Residual()), batches(2, shape=(3, 6, 6))[0], "reestimate_batch_norm")


def test_data_that_do_not_fit_are_an_error_and_no_rollback() -> None:
    example = batches(2, shape=(3, 6, 6))[0]
    with pytest.raises(InputError, match="calibration batch 0: "):
        fxopt.optimize(destroyed(Residual()), example, "reestimate_batch_norm", calibration=[{"z": example}])
    with pytest.raises(fxopt.PassError, match="plan failed: RuntimeError"):
        fxopt.optimize(destroyed(Residual()), example, "reestimate_batch_norm", calibration=[example[:, :2]])


def test_nothing_to_do_needs_no_data() -> None:
    assert_skips(ReestimateBatchNorm(), nn.Sequential(nn.Linear(3, 2)).eval(), torch.randn(2, 3), [])


def test_training_mode_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    why = "1 is in training mode: call model.eval() first"
    assert_skips(ReestimateBatchNorm(), model, torch.randn(2, 3, 5, 5), [why])


def test_missing_statistics_are_refused() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)).eval()
    why = "0 has no running statistics: it normalises by the batch at hand"
    assert_skips(ReestimateBatchNorm(), model, torch.randn(2, 3, 5, 5), [why])


def test_a_single_value_per_channel_is_refused() -> None:
    model = destroyed(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 4), nn.BatchNorm1d(4)))
    data = batches(1, shape=(3,))
    why = "the calibration data give a channel 1 value, and a variance takes two"
    assert_skips(ReestimateBatchNorm(), model, data[0], [why, why], calibration=data)


def test_values_that_are_not_finite_are_refused() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.norm1(x), self.norm2(x.log())

    data = batches(4, 3, shape=(3,))
    why = "its input is not finite on the calibration data"
    model = destroyed(Branches())
    program = reestimates(model, [batch.abs() for batch in data], 2)
    program = assert_pass(ReestimateBatchNorm(), model, data[0], rewrites=1, skips=[why], calibration=data)
    assert program.report.passes[0].rewrites[0].node == "norm1"


def test_a_frozen_norm_in_a_model_that_trains_is_re_estimated_and_stays_frozen() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4)).double().train()
    model[1].eval()
    data = batches(5, 3, shape=(3, 4, 4))
    program = reestimates(model, data, 1, ["3 is in training mode: call model.eval() first"])
    modes = {name: module.training for name, module in program.module.named_modules() if name in ("0", "1", "3")}
    assert modes == {"0": True, "1": False, "3": True}
    values = model[0](torch.cat(data)).transpose(0, 1).flatten(1)
    torch.testing.assert_close(program.module.get_buffer("1.running_mean"), values.mean(1).detach())
    torch.testing.assert_close(program.module.get_buffer("3.running_mean"), model[3].running_mean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision_counter_and_gradients_are_kept(dtype: torch.dtype) -> None:
    model = destroyed(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4))).to(dtype)
    model[1].num_batches_tracked.fill_(17)
    model[1].weight.requires_grad = False
    data = [batch.to(dtype) for batch in batches(64, 32, shape=(3,))]
    program = reestimates(model, data, 2)
    norm = program.module.get_submodule("1")
    assert norm.running_mean.dtype == norm.running_var.dtype == dtype
    assert norm.num_batches_tracked == 17
    assert {name: item.requires_grad for name, item in norm.named_parameters()} == {"weight": False, "bias": True}
    assert norm.momentum == model[1].momentum
    mean, variance = calibrated(program, data)["_1"]
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, variance)


@hypothesis.settings(max_examples=20, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(strategies.randoms(use_true_random=False))
def test_random_models(source: random.Random) -> None:
    model, inputs = random_program(source, dtype=torch.float64)
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    # one without statistics answers all batches at once otherwise than each
    hypothesis.assume(norms and all(norm.track_running_stats for norm in norms))
    plain = capture(model, inputs)
    data = [plain.inputs_with_batch(size, seed=size)[0] for size in (4, 7, 3)]
    program = capture(model, inputs, calibration=data)
    program = fxopt.PassManager(ReestimateBatchNorm(), on_no_match="ignore", on_failure="raise").run(program)
    assert program.report.passes[0].skips == []
    assert_consistent(program, data)


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
def test_torchvision(frontend: Any) -> None:
    models = pytest.importorskip("torchvision").models
    torch.manual_seed(0)
    model = destroyed(models.mobilenet_v3_small(weights=None, width_mult=0.25))
    data = batches(4, 6, shape=(3, 32, 32))
    program = capture(model, data[0], calibration=data, frontend=frontend)
    program = fxopt.PassManager(ReestimateBatchNorm()).run(program)
    assert len(program.report.passes[0].rewrites) == 34
    assert_consistent(program, data)
    folded = fxopt.PassManager(FoldBatchNorm()).run(program)
    assert_equivalent(program, folded, data[0])
