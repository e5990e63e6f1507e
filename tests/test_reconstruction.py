"""Layers behind removed channels are fitted to what they gave: with the right target, in the right order, or not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt import Program, edit
from fxopt.frontends.capture import capture
from fxopt.manager import PassManager
from fxopt.passes import PruneChannels
from fxopt.reconstruction import layers_behind, reconstruct

DOUBLE = torch.float64


def data(*shape: int, batches: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator, dtype=DOUBLE) for _ in range(batches)]


def captured(model: nn.Module, batches: Sequence[Tensor]) -> Program:
    return capture(model.double().eval(), batches[0], calibration=batches)


def whole(_: str, value: Tensor) -> Tensor:
    return value


def with_noise(program: Program, layers: dict[str, float]) -> Program:
    """The program with other weights in some layers."""
    torch.manual_seed(1)
    result = program.copy()
    for name, share in layers.items():
        layer: Any = result.module_of(result.node(name))
        weight = layer.weight.detach()
        noise = share * weight.std() * torch.randn_like(weight)
        edit.set_tensor(result, result.node(name), "weight", weight + noise)
    return result


def off(program: Program, other: Program, batches: Sequence[Tensor]) -> float:
    """How much the outputs differ, over the outputs."""
    pairs = [(program.run(x)[0], other.run(x)[0]) for x in batches]
    return float(sum((a - b).square().sum() for a, b in pairs) / sum(a.square().sum() for a, _ in pairs)) ** 0.5


class Residual(nn.Module):
    """A shortcut that is computed first or last, and a branch that ends in a BatchNorm and a scale."""

    def __init__(self, shortcut_first: bool) -> None:
        super().__init__()
        self.shortcut_first = shortcut_first
        self.shortcut, self.branch, self.norm = nn.Conv2d(4, 6, 1), nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.scale = nn.Parameter(torch.rand(6, 1, 1) + 0.5)
        with torch.no_grad():
            self.norm.running_var.uniform_(0.5, 2)
            self.norm.weight.uniform_(-2, 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.shortcut_first:
            shortcut = self.shortcut(x)
            return torch.relu(shortcut - self.scale * self.norm(self.branch(x)))
        branch = 0.5 * (self.scale * self.norm(self.branch(x)))
        return torch.relu(self.shortcut(x) + branch)


@pytest.mark.parametrize("shortcut_first", [True, False])
def test_the_other_operand_of_a_sum_is_made_up_for(shortcut_first: bool) -> None:
    torch.manual_seed(0)
    batches = data(8, 4, 6, 6)
    program = captured(Residual(shortcut_first), batches)
    # the branch sees all that the shortcut sees, so it can take over what the shortcut has lost; and, when it comes
    # last, the shortcut what the branch has lost at the centre of its kernel
    spoilt = with_noise(program, {"shortcut": 0.5} if shortcut_first else {"branch": 0.5})
    fitted = spoilt.copy()
    reconstruct(fitted, program, ["branch" if shortcut_first else "shortcut"], whole)
    before, after = off(program, spoilt, batches), off(program, fitted, batches)
    assert before > 0.05
    assert after < (1e-3 if shortcut_first else 0.97 * before)


def test_later_layers_make_up_for_what_those_before_lost() -> None:
    torch.manual_seed(0)
    batches = data(16, 6, batches=8)
    model = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 3))
    program = captured(model, batches)
    spoilt = with_noise(program, {"_0": 0.3})
    fitted = spoilt.copy()
    reconstruct(fitted, program, ["_4", "_2"], whole)  # in the order in which they are called
    last = spoilt.copy()
    reconstruct(last, program, ["_4"], whole)
    fresh = data(64, 6, batches=10)[8:]
    errors = [off(program, item, fresh) for item in (spoilt, last, fitted)]
    assert errors[2] < 0.8 * errors[1] < 0.8 * errors[0]


def test_a_program_that_is_right_already_stays_right() -> None:
    torch.manual_seed(0)
    batches = data(3, 4, 6, 6)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.ReLU(), nn.Conv2d(6, 6, 3, bias=False), nn.Flatten())
    program = captured(nn.Sequential(*model, nn.Linear(24, 5)), batches)
    fitted = program.copy()
    reconstruct(fitted, program, ["_0", "_2", "_4"], whole)
    assert off(program, fitted, data(7, 4, 6, 6)) < 1e-12


@pytest.mark.parametrize("size", [2, 4])
def test_one_small_batch_does_no_harm(size: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 3)).eval()
    fresh = data(200, 6)
    errors = {}
    for compensate in (True, False):
        program = captured(model, [fresh[0][:size]])
        pruned = PassManager([PruneChannels(ratio=0.25, criterion="l2", compensate=compensate)]).run(program)
        errors[compensate] = off(program, pruned, fresh)
    assert errors[True] < 1.3 * errors[False]


def test_the_plan_names_the_layers_and_why_others_are_left() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.twice = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)
            self.up, self.last = nn.ConvTranspose2d(8, 8, 2), nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.stem(x))
            return self.last(torch.relu(self.up(self.twice(torch.relu(self.twice(x))))))

    batches = data(2, 3, 8, 8)
    model = Net().double().eval()
    (plan,) = fxopt.explain(model, batches[0], [PruneChannels(ratio=0.5)], calibration=batches)
    fits = [rewrite for rewrite in plan.rewrites if "fit" in rewrite.params]
    assert [rewrite.params["fit"] for rewrite in fits] == [["last"]]
    assert plan.rewrites[-1] == fits[0]
    reasons = {skip.node: skip.why for skip in plan.skips if "fitted" in skip.why}
    assert reasons == {
        "twice": "is not fitted to the data: it is called at 2 places",
        "twice_1": "is not fitted to the data: it is called at 2 places",
        "up": "is not fitted to the data: it is a transposed convolution",
    }
    (without,) = fxopt.explain(model, batches[0], [PruneChannels(ratio=0.5, compensate=False)], calibration=batches)
    assert not any("fit" in rewrite.params for rewrite in without.rewrites)


def test_no_layer_is_fitted_in_training_mode() -> None:
    batches = data(4, 3, 8, 8)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Dropout(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1)).double()
    program = fxopt.optimize(model.train(), batches[0], [PruneChannels(ratio=0.5)], calibration=batches)
    (report,) = program.report.passes
    assert not any("fit" in rewrite.params for rewrite in report.rewrites)
    assert [skip.why for skip in report.skips if "training mode" in skip.why]


def test_layers_behind_some_nodes() -> None:
    program = captured(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 4)), data(2, 4))
    found = [node.name for node, _ in layers_behind(program, {program.node("_1")})]
    assert found == ["_2", "_3"]


@pytest.mark.parametrize("attention", ["heads", "head_dim"])
def test_a_second_pruning_fits_to_what_the_first_one_left(attention: str) -> None:
    torch.manual_seed(0)
    batches = data(16, 6)
    model = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 3)).double().eval()
    passes = [PruneChannels(ratio=0.5), PruneChannels(ratio=0.5, attention=attention)]
    program = fxopt.optimize(model, batches[0], passes, calibration=batches, on_failure="raise")
    assert program.module.get_submodule("2").weight.shape == (6, 6)
    assert [len(report.rewrites) for report in program.report.passes] == [3, 3]


def test_data_that_are_not_finite_are_refused() -> None:
    batches = data(4, 6)
    program = captured(nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2)), batches)
    broken = program.copy()
    broken.calibration = [torch.full_like(batches[0], torch.nan)]
    with pytest.raises(fxopt.FxoptError, match="_1 reads or gives is not finite"):
        reconstruct(program.copy(), broken, ["_1"], whole)


def test_batches_may_differ_in_size_and_in_positions() -> None:
    torch.manual_seed(0)
    batches = [torch.randn(4, 3, size, size, dtype=DOUBLE) for size in (8, 6, 10)]
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1)).double()
    program = fxopt.optimize(
        model.eval(), batches[0], [PruneChannels(ratio=0.5)], calibration=batches, on_failure="raise"
    )
    assert "fit" in program.report.passes[0].rewrites[-1].params


def test_tied_weights_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.a, self.b = nn.Embedding(50, 8), nn.Linear(8, 16), nn.Linear(16, 8)
            self.head = nn.Linear(8, 50, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x: Tensor) -> Tensor:
            y = self.embedding(x)
            return self.head(y + self.b(torch.relu(self.a(y))))

    batches = [torch.randint(0, 50, (4, 6)) for _ in range(4)]
    passes = [PruneChannels(layers={"a": 0.3}, compensate=True)]
    program = fxopt.optimize(Tied().eval(), batches[0], passes, calibration=batches, on_failure="raise")
    (report,) = program.report.passes
    assert report.after.params < report.before.params
    assert any("tied" in skip.why for skip in report.skips)


def test_data_that_can_be_read_once_are_not_fitted_to() -> None:
    batches = data(8, 6)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)).double().eval()
    program = fxopt.optimize(
        model, batches[0], [PruneChannels(ratio=0.5)], calibration=iter(batches), on_failure="raise"
    )
    assert any("read once" in skip.why for skip in program.report.passes[0].skips)


def test_half_precision_with_a_tiny_scale_behind() -> None:
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.norm, self.c = (
                nn.Conv2d(4, 8, 1),
                nn.Conv2d(8, 4, 1),
                nn.BatchNorm2d(4),
                nn.Conv2d(4, 2, 1),
            )
            with torch.no_grad():
                self.norm.weight.fill_(1e-6)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(x + self.norm(self.b(torch.relu(self.a(x)))))

    batches = [item.half() for item in data(4, 4, 6, 6)]
    passes = [PruneChannels(ratio=0.5)]
    program = fxopt.optimize(Net().half().eval(), batches[0], passes, calibration=batches, on_failure="raise")
    assert all(item.isfinite().all() for item in program.module.state_dict().values())


def test_patches_of_a_large_sample_are_looked_at_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = data(3, 2, 12, 12)
    original = captured(nn.Sequential(nn.Conv2d(2, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 3)), batches)
    noisy = with_noise(original, {"_0": 0.2})
    fitted = []
    for chunk in (2**24, 2**9):
        monkeypatch.setattr("fxopt.analysis.samples._CHUNK", chunk)
        program = noisy.copy()
        reconstruct(program, original, ["_2"], whole)
        fitted.append(program)
    assert off(*fitted, batches) < 1e-9
    assert off(original, fitted[0], batches) < 0.9 * off(original, noisy, batches)


def test_weights_in_front_of_a_batch_norm_keep_their_size_and_others_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, bias=False)]
    model = nn.Sequential(*layers, nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 1, bias=False))
    batches = data(8, 2, 12, 12)
    for x in batches:
        model.double()(x)
    original = captured(model, batches)
    pruned = PassManager([PruneChannels(ratio=0.5)]).run(original)

    def size(program: Program, layer: str) -> Tensor:
        weight: Tensor = program.module.get_parameter(f"{layer}.weight")
        return weight.detach().flatten(1).square().mean(1).sqrt()

    before = size(original, "3")
    assert all(torch.isclose(before, each).any() for each in size(pruned, "3"))
    assert not torch.allclose(size(pruned, "6"), size(original, "6"), rtol=0.01)
    monkeypatch.setattr("fxopt.reconstruction._keep_size", lambda *_: None)
    unscaled = PassManager([PruneChannels(ratio=0.5)]).run(original)
    assert not torch.allclose(size(unscaled, "3"), size(pruned, "3"), rtol=0.01)
    assert off(unscaled, pruned, batches) < 1e-9
