"""prune_channels: which channels go, how many, what is refused, and what is left of the model."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from fxopt import PassManager, Program, Rewrite
from fxopt.errors import InputError, PassError, RegistryError
from fxopt.frontends.capture import capture
from fxopt.passes import PruneChannels
from fxopt.spec import configure, parse_spec
from fxopt.testing import assert_pass, assert_skips

X = torch.randn(2, 3, 12, 12)


def network(width: int = 16) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, width, 3),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, 5),
    ).eval()


def pruned(pass_: PruneChannels, model: nn.Module, x: torch.Tensor = X) -> Program:
    return fxopt.optimize(model, (x,), [pass_], on_failure="raise")


def sizes(program: Program) -> list[int]:
    return [len(module.weight) for module in program.module.modules() if isinstance(module, nn.Conv2d | nn.Linear)]


def test_the_least_important_channels_of_every_group_go() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 1, bias=False), nn.Conv2d(4, 2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([3.0, 0.1, 2.0, 0.2]).view(4, 1, 1, 1))
        model[1].weight.copy_(torch.ones(2, 4, 1, 1))
    assert_pass(
        PruneChannels(ratio=0.5),
        model,
        torch.randn(1, 1, 4, 4),
        after="""
            %input_1 = input : f32[1, 1, 4, 4]
            %_0 = conv2d[0](%input_1) {1, 2, kernel_size=(1, 1), stride=(1, 1), bias=False} : f32[1, 2, 4, 4]
            %_1 = conv2d[1](%_0) {2, 2, kernel_size=(1, 1), stride=(1, 1), bias=False} : f32[1, 2, 4, 4]
            return (%_1,)
        """,
        rewrites=1,
        skips=["1.weight: an output of the model"],
    )
    (plan,) = fxopt.explain(model, torch.randn(1, 1, 4, 4), [PruneChannels(ratio=0.5)])
    assert plan.rewrites == [
        Rewrite(
            "_0",
            "keep 2 of 4 channels of 0.weight, in 1.weight[1]",
            {"group": "0.weight", "size": 4, "kept": [0, 2], "members": ["0.weight[0]", "1.weight[1]"]},
        )
    ]


@pytest.mark.parametrize(
    ("pass_", "kept"),
    [
        (PruneChannels(ratio=0.25), [12, 24, 5]),
        (PruneChannels(ratio=0.25, round_to=8), [16, 24, 5]),
        (PruneChannels(ratio=0.3, round_to=8), [8, 24, 5]),
        (PruneChannels(ratio=0.5, ignore=("3",)), [8, 32, 5]),
        (PruneChannels(ratio=0.5, layers={"0": 0.25}), [12, 16, 5]),
        (PruneChannels(layers={"3": 0.75}), [16, 8, 5]),
        (PruneChannels(ratio=0.9, min_channels=4), [4, 4, 5]),
        (PruneChannels(ratio=0.5, min_channels=16), [16, 16, 5]),
        (PruneChannels(ratio=0.99), [2, 4, 5]),
    ],
    ids=str,
)
def test_how_many_go(pass_: PruneChannels, kept: list[int]) -> None:
    program = pruned(pass_, network())
    assert sizes(program) == kept
    assert program.module(torch.randn(4, 3, 12, 12)).shape == (4, 5)


@pytest.mark.parametrize("criterion", ["l1", "l2", "bn_scale", "taylor", "gram", "random"])
@pytest.mark.parametrize("scope", ["layer", "isomorphic", "global"])
@pytest.mark.parametrize("measure", ["macs", "params"])
def test_a_budget_is_met(criterion: str, scope: str, measure: str) -> None:
    model = network(48)
    with torch.no_grad():
        for index in (1, 4):
            model[index].weight.uniform_(0.1, 2)
    options: dict[str, Any] = {measure: 0.5, "criterion": criterion, "scope": scope}
    data = [(torch.randn(16, 3, 12, 12), torch.randint(0, 5, (16,)))]
    program = fxopt.optimize(model, X, [PruneChannels(**options)], calibration=data, on_failure="raise")
    (report,) = program.report.passes
    assert getattr(report.after, measure) / getattr(report.before, measure) == pytest.approx(0.5, abs=0.02)


def test_a_share_of_all_channels_by_one_threshold() -> None:
    model = network(50)
    with torch.no_grad():
        model[0].weight.mul_(torch.linspace(0.01, 2, 50).view(-1, 1, 1, 1))
    program = pruned(PruneChannels(ratio=0.4, scope="global", criterion="l1"), model)
    first, second, _ = sizes(program)
    assert first + second == pytest.approx(0.6 * 150, abs=1)
    assert first / 50 < second / 100


def test_groups_of_one_structure_share_a_ranking() -> None:
    torch.manual_seed(0)
    widths = (4, 50, 50, 50, 5)
    model = nn.Sequential(*(nn.Linear(before, after) for before, after in itertools.pairwise(widths)))
    model.insert(1, nn.LayerNorm(50))
    with torch.no_grad():
        # of the two that no norm reads, the channels of the first are less and less important
        model[2].weight.mul_(torch.linspace(0.001, 2, 50).view(-1, 1))
        model[3].weight.mul_(torch.linspace(0.001, 2, 50))
    program = fxopt.optimize(model, torch.randn(2, 4), [PruneChannels(ratio=0.4, scope="isomorphic", criterion="l2")])
    first, second, third, _ = (
        len(module.weight) for module in program.module.modules() if hasattr(module, "in_features")
    )
    assert first == 30
    assert second + third == pytest.approx(60, abs=1)
    assert second < third


def test_a_plan_with_data_fits_another_checkpoint_to_itself() -> None:
    pass_, data = PruneChannels(ratio=0.3), [torch.randn(16, 3, 12, 12) for _ in range(4)]
    (plan,) = fxopt.explain(network(), X, [pass_], calibration=data)
    stored = [Rewrite(**json.loads(json.dumps(rewrite._asdict()))) for rewrite in plan.rewrites]
    assert "fit" in stored[-1].params
    other = network()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    whole = fxopt.optimize(other, X, [], calibration=data)
    errors = []
    for rewrites in (stored, stored[:-1]):
        program = whole.copy()
        for rewrite in rewrites:
            pass_.apply(program, rewrite)
        errors.append(sum(float((program.run(x)[0] - whole.run(x)[0]).square().sum()) for x in data))
    assert errors[0] < 0.9 * errors[1]


def test_a_plan_is_json_and_prunes_another_checkpoint_alike() -> None:
    pass_ = PruneChannels(macs=0.4)
    (plan,) = fxopt.explain(network(), X, [pass_])
    stored = [Rewrite(**json.loads(json.dumps(rewrite._asdict()))) for rewrite in plan.rewrites]
    other = network()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_()
    program = fxopt.capture(other, X)
    for rewrite in reversed(stored):
        pass_.apply(program, rewrite)
    assert sizes(program) == sizes(pruned(pass_, network()))
    kept = stored[0].params["kept"]
    torch.testing.assert_close(program.module.get_submodule("0").weight, other[0].weight[kept])


def test_a_plan_for_another_model_is_refused() -> None:
    (plan,) = fxopt.explain(network(), X, [PruneChannels(ratio=0.5)])
    with pytest.raises(PassError, match=r"prune_channels at _0: the program has no group 0\.weight of 16 channels"):
        PruneChannels(ratio=0.5).apply(fxopt.capture(network(8), X), plan.rewrites[0])


def test_refusals() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Softmax(-1), nn.Linear(8, 6), nn.Linear(6, 1), nn.Linear(1, 2))
    assert_skips(
        PruneChannels(ratio=0.5, criterion="bn_scale", ignore=("2",)),
        model,
        torch.randn(2, 4),
        [
            "2.weight: ignored",
            "3.weight: has 1 channels, of which 1 are left at least",
            "0.weight: softmax over channels at _1",
            "4.weight: an output of the model",
        ],
    )
    assert_skips(
        PruneChannels(layers={"3": 0.5}),
        nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)),
        torch.randn(2, 4),
        ["0.weight: no pattern of layers names it", "1.weight: an output of the model"],
    )
    assert_skips(
        PruneChannels(ratio=0.5, criterion="bn_scale"),
        nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)),
        torch.randn(2, 4),
        ["0.weight: no batch norm to rank by", "1.weight: an output of the model"],
    )


def test_a_budget_that_cannot_be_reached_is_an_error() -> None:
    with pytest.raises(InputError, match=r"macs of 0\.01 cannot be reached: .* \d+% are left"):
        pruned(PruneChannels(macs=0.01), network())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give one of ratio, macs and params, not none"),
        ({"ratio": 0.5, "macs": 0.5}, "give one of ratio, macs and params, not ratio and macs"),
        ({"ratio": 1.0}, "ratio must be a share between 0 and 1, not 1.0"),
        ({"macs": 50}, "macs must be a share between 0 and 1, not 50"),
        ({"layers": {"a": 2}}, r"layers\['a'\] must be a share between 0 and 1, not 2"),
        ({"ratio": 0.5, "criterion": "magic"}, "criterion must be one of 'l1', .* not 'magic'"),
        ({"ratio": 0.5, "scope": "all"}, "scope must be one of None, 'layer', .* not 'all'"),
        ({"ratio": 0.5, "attention": True}, "attention must be one of 'heads', .* not True"),
        ({"ratio": 0.5, "round_to": 0}, "round_to must be an integer of at least 1, not 0"),
        ({"ratio": 0.5, "ignore": "head"}, r"ignore must be a tuple of patterns: write \('head',\) for this one alone"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PruneChannels(**options)
    with pytest.raises(RegistryError, match=message):
        configure(PruneChannels, options)


def test_spec_string() -> None:
    pass_ = PruneChannels(macs=0.5, ignore=("head.*",), layers={"layer4.*": 0.7}, round_to=8)
    name, options = parse_spec(str(pass_))
    assert (name, configure(PruneChannels, options)) == ("prune_channels", pass_)


@pytest.mark.parametrize(("compensate", "data"), [(False, None), (True, [torch.randn(8, 3, 12, 12).double()])])
def test_pruning_and_folding_agree_in_either_order(compensate: bool, data: list[torch.Tensor] | None) -> None:
    model = network()
    pass_ = PruneChannels(ratio=0.5, compensate=compensate)
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    (plan,) = fxopt.explain(model, X, [PruneChannels(ratio=0.5)])
    program = capture(model.double(), X.double(), calibration=data)
    folded = PassManager(["fold_batch_norm"]).run(program)
    for target in (program, folded):
        for rewrite in plan.rewrites:
            pass_.apply(target, rewrite)
    program = PassManager(["fold_batch_norm"]).run(program)
    assert program.text() == folded.text()
    x = torch.randn(3, 3, 12, 12, dtype=torch.float64)
    torch.testing.assert_close(program.run(x)[0], folded.run(x)[0], rtol=1e-10, atol=1e-10)


def test_the_pruned_model_compiles_and_trains() -> None:
    model = network()
    program = pruned(PruneChannels(ratio=0.5), model)
    compiled = fxopt.compile(model, (X,), passes=[PruneChannels(ratio=0.5), "default"], on_no_match="ignore")
    x = torch.randn(5, 3, 12, 12)
    torch.testing.assert_close(compiled(x), program.run(x)[0], rtol=1e-3, atol=1e-4)
    module = program.module.train()
    module(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


@pytest.mark.parametrize("attention", ["head_dim", "heads"])
def test_a_transformer_shrinks(attention: str) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 8, 64, dropout=0.0, batch_first=True)
    model = nn.Sequential(nn.Linear(10, 32), layer, nn.Linear(32, 3)).eval()
    program = pruned(configure(PruneChannels, {"ratio": 0.5, "attention": attention}), model, torch.randn(2, 6, 10))
    (report,) = program.report.passes
    assert report.after.params < 0.35 * report.before.params
    assert program.module(torch.randn(3, 6, 10)).shape == (3, 6, 3)
