"""Low-rank factorization: exact at full rank, as far off as it says, within its budget, and only where it pays."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt import Program
from fxopt.errors import InputError, PassError
from fxopt.frontends.capture import capture
from fxopt.low_rank import methods_for
from fxopt.manager import PassManager
from fxopt.passes import FactorizeLowRank, PruneWeights
from fxopt.passes_base import Plan, Rewrite
from tests.slow_backend import SlowBackend

DOUBLE = torch.float64


def data(*shape: int, batches: int = 3) -> list[Tensor]:
    """Inputs whose channels depend on each other, with another mean and deviation each."""
    generator = torch.Generator().manual_seed(0)
    channels = shape[1]
    mix = torch.randn(channels, channels, generator=generator, dtype=DOUBLE) / channels**0.5
    found = []
    for _ in range(batches):
        x = torch.randn(*shape, generator=generator, dtype=DOUBLE)
        found.append((x.movedim(1, -1) @ mix + 0.5).movedim(-1, 1).contiguous())
    return found


def full_ranks(layer: Any, method: str) -> list[int]:
    outputs = layer.weight.shape[0] // getattr(layer, "groups", 1)
    inputs = layer.weight.shape[1]
    if method == "svd":
        return [outputs]
    height, width = (*layer.weight.shape[2:], 1)[:2]
    return [min(inputs * height, width * outputs)] if method == "spatial" else [inputs, outputs]


LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (nn.Linear(8, 6), (5, 8)),
    "linear over tokens": (nn.Linear(8, 6, bias=False), (4, 8, 8)),
    "conv": (nn.Conv2d(4, 6, 3, padding=1), (3, 4, 9, 8)),
    "stride and dilation": (
        nn.Conv2d(4, 6, 3, stride=(2, 1), padding=(2, 0), dilation=(2, 1), bias=False),
        (3, 4, 9, 8),
    ),
    "groups": (nn.Conv2d(8, 6, 3, padding=1, groups=2), (3, 8, 6, 7)),
    "same": (nn.Conv2d(4, 5, (5, 3), padding="same"), (2, 4, 9, 8)),
    "reflect": (nn.Conv2d(4, 5, (3, 5), padding=(1, 2), padding_mode="reflect"), (2, 4, 9, 8)),
    "circular": (nn.Conv2d(4, 5, 3, padding=1, padding_mode="circular"), (2, 4, 9, 8)),
    "1 x k": (nn.Conv2d(4, 5, (1, 3)), (2, 4, 9, 8)),
    "pointwise": (nn.Conv2d(6, 5, 1, stride=2), (2, 6, 9, 8)),
    "conv1d": (nn.Conv1d(6, 8, 5, stride=2, padding=2, groups=2), (4, 6, 15)),
    "conv3d": (nn.Conv3d(3, 4, (3, 2, 2), padding=(1, 0, 0)), (2, 3, 5, 4, 4)),
}
CASES = [(name, method) for name, (layer, _) in LAYERS.items() for method in methods_for(layer)]


@pytest.mark.parametrize("seen", [False, True])
@pytest.mark.parametrize(("name", "method"), CASES)
def test_at_full_rank_a_layer_is_what_it_was(name: str, method: str, seen: bool) -> None:
    layer, shape = LAYERS[name]
    torch.manual_seed(0)
    model = nn.Sequential(layer).double().eval()
    layer.reset_parameters()
    batches = data(*shape)
    program = capture(model, batches[0], calibration=batches if seen else None)
    (node,) = (node for node in program.nodes if program.module_of(node) is not None)
    before = [program.run(x)[0] for x in batches]
    rewrite = Rewrite(node.name, "", {"method": method, "ranks": full_ranks(layer, method)})
    FactorizeLowRank(rank=1).apply(program, rewrite)
    assert len(program.module.state_dict()) > len(model.state_dict())
    for x, wanted in zip(batches, before, strict=True):
        torch.testing.assert_close(program.run(x)[0], wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("name", "method"), CASES)
def test_the_error_is_what_it_is_said_to_be(name: str, method: str) -> None:
    layer, shape = LAYERS[name]
    torch.manual_seed(1)
    model = nn.Sequential(layer).double().eval()
    layer.reset_parameters()
    batches = data(16 * shape[0], *shape[1:], batches=2)
    program = capture(model, batches[0], calibration=batches)
    pass_ = FactorizeLowRank(energy=0.5, method=method, fit=False, round_to=1)  # type: ignore[arg-type]
    (node,) = (node for node in program.nodes if program.module_of(node) is not None)
    found = pass_._low_rank(program, [node.name])[node.name]
    forms = found.forms
    wanted = [program.run(x)[0] for x in batches]
    for form in (forms[0], forms[len(forms) // 2], forms[-1]):
        smaller = program.copy()
        pass_.apply(smaller, Rewrite(node.name, "", {"method": form.method, "ranks": list(form.ranks)}))
        axis = -1 if isinstance(layer, nn.Linear) else 1
        off = (
            torch.cat([w - smaller.run(x)[0] for w, x in zip(wanted, batches, strict=True)]).movedim(axis, 0).flatten(1)
        )
        spread = torch.cat(wanted).movedim(axis, 0).flatten(1).var(1, correction=0).sum()
        assert float(off.mean(1).abs().max()) < 1e-6
        assert float(off.square().mean(1).sum() / spread) == pytest.approx(form.error, rel=1e-6, abs=1e-9)
        assert smaller.cost().macs == form.macs


def conv_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16, momentum=None),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16, momentum=None),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, groups=16),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 12),
    )


def trained_net(batches: Sequence[Tensor]) -> nn.Sequential:
    """With running statistics of these batches."""
    model = conv_net().double()
    for x in batches:
        model(x)
    return model.eval()


def test_every_layer_is_factorized_or_refused_with_the_reason() -> None:
    model = trained_net(data(4, 8, 10, 10))
    x = data(2, 8, 10, 10)[0]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan = Plan.of(FactorizeLowRank(ratio=0.5, method="svd", round_to=4, ignore=("3",)), capture(model, x))
    assert [(skip.node, skip.why) for skip in plan.skips] == [
        ("_3", "ignored"),
        ("_6", "no rank that is a multiple of 4 saves MACs"),
        ("_9", "no form takes 50% of its MACs or less"),
    ]
    (rewrite,) = plan.rewrites
    assert rewrite.what.startswith("svd of 0 through 4 channels: 31% of its MACs, loses ")
    program = fxopt.optimize(model, x, [FactorizeLowRank(ratio=0.5, method="svd", round_to=4, ignore=("3",))])
    names = [name for name, _ in program.module.named_parameters() if name.startswith("0")]
    assert names == ["0_reduce.weight", "0.weight"]
    assert program.module.get_parameter("0_reduce.weight").shape == (4, 8, 3, 3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_budget_is_kept_and_spent_where_it_saves_the_most_error() -> None:
    batches = data(8, 8, 10, 10)
    model = trained_net(batches)
    whole = capture(model, batches[0]).cost().macs
    noise = {}
    for share in (0.6, 0.3):
        pass_ = FactorizeLowRank(macs=share, round_to=1)
        program = fxopt.optimize(model, batches[0], [pass_], calibration=batches, on_failure="raise")
        assert 0.9 * share * whole < program.cost().macs <= share * whole
        noise[share] = program.report.passes[-1].sqnr_db or 0.0
    assert noise[0.6] > noise[0.3]
    with pytest.raises(InputError, match=r"macs of 0.3 cannot be reached: .* 100% are left"):
        fxopt.optimize(model, batches[0], [FactorizeLowRank(macs=0.3, ignore=("*",))])


def test_energy_and_rank_say_how_narrow_layers_become() -> None:
    batches = data(8, 8, 10, 10)
    program = capture(trained_net(batches), batches[0], calibration=batches)
    kept = {rewrite.node: rewrite for rewrite in Plan.of(FactorizeLowRank(energy=0.9, round_to=1), program).rewrites}
    assert {"_0", "_3"} <= set(kept)
    for rewrite in kept.values():
        if "method" in rewrite.params:
            assert float(rewrite.what.rpartition("loses ")[2].partition("%")[0]) <= 10
    plan = Plan.of(FactorizeLowRank(rank=3, method="svd", fit=False), program)
    assert [rewrite.params["ranks"] for rewrite in plan.rewrites] == [[3], [3], [3]]
    plan = Plan.of(FactorizeLowRank(rank=16, method="svd", fit=False), program)
    assert {skip.why for skip in plan.skips} == {"rank 16 saves no MACs"}


def test_what_was_seen_of_the_data_makes_the_error_smaller_and_the_fit_again() -> None:
    # inputs of few dimensions: what the plain SVD keeps is not what they need
    generator = torch.Generator().manual_seed(1)
    basis = torch.randn(3, 8, generator=generator, dtype=DOUBLE)
    batches = [(torch.randn(8, 10, 10, 3, generator=generator, dtype=DOUBLE) @ basis).movedim(-1, 1) for _ in range(3)]
    model = trained_net(batches)
    noise = []
    for options in ({"whiten": False, "fit": False}, {"fit": False}, {}):
        pass_ = FactorizeLowRank(ratio=0.4, round_to=1, **options)
        program = fxopt.optimize(model, batches[0], [pass_], calibration=batches, on_failure="raise")
        assert program.module.get_buffer("1.running_mean") is not model[1].running_mean
        assert [name for name, _ in program.module.named_parameters() if name in ("0.bias", "3.bias")] == []
        noise.append(program.report.passes[-1].sqnr_db or 0.0)
    assert noise[0] + 3 < noise[1] < noise[2]


def test_a_plan_replays_on_another_checkpoint_and_measures_each_layer_once(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = data(8, 8, 10, 10)
    program = capture(trained_net(batches), batches[0], calibration=batches)
    calls: list[Sequence[str]] = []
    from fxopt.passes import factorize_low_rank

    measure = factorize_low_rank.layer_moments

    def counted(program: Program, layers: Sequence[str], *rest: Any) -> Any:
        calls.append(layers)
        return measure(program, layers, *rest)

    monkeypatch.setattr(factorize_low_rank, "layer_moments", counted)
    pass_ = FactorizeLowRank(ratio=0.5, round_to=2)
    result = PassManager([pass_]).run(program)
    assert calls == [["_0", "_3", "_6", "_9"]]
    other = trained_net(batches)
    with torch.no_grad():
        other[0].weight.mul_(1.5)
    copied = capture(other, batches[0], calibration=batches)
    for rewrite in Plan.of(pass_, program).rewrites:
        pass_.apply(copied, rewrite)
    shapes = {name: item.shape for name, item in result.module.state_dict().items()}
    assert {name: item.shape for name, item in copied.module.state_dict().items()} == shapes


def test_layers_that_share_are_left_alone() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.twice, self.one, self.other = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
            self.other.weight = self.one.weight
            self.free = nn.Parameter(torch.randn(16, 16))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(self.other(self.one(self.twice(self.twice(x)))), self.free * 2)

    program = capture(Twice().eval(), torch.randn(3, 16))
    plan = Plan.of(FactorizeLowRank(rank=2), program)
    assert [skip.why for skip in plan.skips] == [
        "it is called at 2 places",
        "it is called at 2 places",
        "its weight is tied to another layer's",
        "its weight is tied to another layer's",
        "it is a function, not a module",
    ]
    with pytest.raises(PassError, match="has no spatial form"):
        FactorizeLowRank(rank=2).apply(program, Rewrite("one", "", {"method": "spatial", "ranks": [2]}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give one of rank, ratio, energy and macs, not none"),
        ({"rank": 2, "macs": 0.5}, "not rank and macs"),
        ({"ratio": 1.5}, "ratio must be a share between 0 and 1, not 1.5"),
        ({"rank": 0}, "rank must be an integer of at least 1, not 0"),
        ({"rank": 2, "round_to": 2.5}, "round_to must be an integer of at least 1, not 2.5"),
        ({"rank": 2, "method": "cp"}, "method must be one of 'auto', 'svd', 'spatial', 'tucker', not 'cp'"),
        ({"rank": 2, "gate": "size"}, "gate must be one of 'macs', 'time', not 'size'"),
        ({"rank": 2, "ignore": "head"}, "ignore must be a tuple"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FactorizeLowRank(**options)


def test_only_forms_that_are_faster_count_if_time_is_what_has_to_be_saved() -> None:
    x = data(2, 8, 10, 10)[0]
    model = trained_net([x])

    def plan(by: str, **options: Any) -> Plan:
        pass_ = FactorizeLowRank(gate="time", method="svd", round_to=4, **options)
        return fxopt.explain(model, x, [pass_], backend=SlowBackend(by=by))[0]

    by_macs = plan("macs", ratio=0.5)
    assert [rewrite.node for rewrite in by_macs.rewrites] == ["_0", "_3"]
    for rewrite in by_macs.rewrites:
        macs, time = re.findall(r"(\d+)% of its (?:MACs|time)", rewrite.what)
        assert abs(int(macs) - int(time)) < 25
    by_layers = plan("layers", ratio=0.5)
    assert by_layers.rewrites == []
    assert [
        bool(re.match(r"no form is faster: svd through \d+ channels takes \d+% of its", skip.why))
        for skip in by_layers.skips
    ] == [True, True, False, False]
    with pytest.raises(
        InputError, match=r"the narrowest form that was not found too slow of every layer \d+% are left"
    ):
        plan("layers", macs=0.5)
    with pytest.raises(InputError, match="pass backend="):
        fxopt.optimize(model, x, [FactorizeLowRank(ratio=0.5, gate="time")])


def test_it_trains_runs_in_onnx_at_any_batch_size_and_folds_behind() -> None:
    batches = [x.float() for x in data(8, 8, 10, 10)]
    model = trained_net([x.double() for x in batches]).float()
    compiled = fxopt.compile(
        model,
        batches[0],
        passes=[FactorizeLowRank(macs=0.5, round_to=2), "reestimate_batch_norm", "default"],
        calibration=batches,
    )
    assert compiled.report.passes[0].rewrites
    assert compiled(batches[0][:3]).shape == (3, 12)
    program = fxopt.optimize(model, batches[0], [FactorizeLowRank(macs=0.5, round_to=2)], calibration=batches)
    module = program.module.train()
    module(batches[0]).square().sum().backward()
    assert all(item.grad is not None and item.requires_grad for item in module.parameters())


def test_half_precision_and_a_model_in_training_mode() -> None:
    batches = [x.float() for x in data(8, 8, 10, 10)]
    model = trained_net([x.double() for x in batches]).to(torch.bfloat16)
    halves = [x.to(torch.bfloat16) for x in batches]
    program = fxopt.optimize(model, halves[0], [FactorizeLowRank(ratio=0.5, round_to=2)], calibration=halves)
    assert {item.dtype for item in program.module.parameters()} == {torch.bfloat16}
    training = fxopt.optimize(
        conv_net().train(), batches[0], [FactorizeLowRank(ratio=0.5, round_to=2)], calibration=batches
    )
    whys = {skip.why for skip in training.report.passes[-1].skips}
    assert "no layer is fitted to the data, as values are random in training mode" in whys


def test_masked_layers_are_neither_factorized_nor_fitted() -> None:
    batches = data(8, 8, 10, 10)
    pruned = fxopt.optimize(trained_net(batches), batches[0], [PruneWeights(sparsity=0.5, ignore=("0",))])
    masked = capture(pruned.module, batches[0], calibration=batches)
    plan = Plan.of(FactorizeLowRank(ratio=0.5, round_to=1), masked)
    whys = {skip.node: skip.why for skip in plan.skips}
    assert {"_3", "_6", "_9"} <= set(whys)
    zeros = int((masked.module.get_parameter("3.weight") == 0).sum())
    left = PassManager([FactorizeLowRank(ratio=0.5, round_to=1)]).run(masked)
    assert "0_reduce.weight" in left.module.state_dict()
    assert int((left.module.get_parameter("3.weight") == 0).sum()) == zeros
    reasons = [skip.why for skip in plan.skips if skip.node == "_3"]
    assert reasons == [
        "it has a mask, which other layers would lose: do this before prune_weights",
        "is not fitted to the data: it has a mask, which a fit would fill",
    ]
