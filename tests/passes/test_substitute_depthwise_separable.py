"""Depthwise separable convolutions: exact at the full multiplier, as far off as they say, and only where they pay."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt import Program
from fxopt.depthwise_separable import Order, full_multiplier
from fxopt.errors import InputError, PassError
from fxopt.frontends.capture import capture
from fxopt.manager import PassManager
from fxopt.passes import PruneWeights, SubstituteDepthwiseSeparable
from fxopt.passes_base import Plan, Rewrite
from fxopt.testing import assert_pass, assert_skips
from tests.slow_backend import SlowBackend

DOUBLE = torch.float64
ORDERS: tuple[Order, ...] = ("depthwise_first", "pointwise_first")


def data(*shape: int, batches: int = 3) -> list[Tensor]:
    """Inputs whose channels and places depend on each other, with another mean and deviation each."""
    generator = torch.Generator().manual_seed(0)
    channels = shape[1]
    mix = torch.randn(channels, channels, generator=generator, dtype=DOUBLE) / channels**0.5
    found = []
    for _ in range(batches):
        x = torch.randn(*shape, generator=generator, dtype=DOUBLE)
        x = x + x.roll(1, -1)
        found.append((x.movedim(1, -1) @ mix + 0.5).movedim(-1, 1).contiguous())
    return found


LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
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
    "conv1d": (nn.Conv1d(6, 8, 5, stride=2, padding=2, groups=2), (4, 6, 15)),
    "conv3d": (nn.Conv3d(3, 4, (3, 2, 2), padding=(1, 0, 0)), (2, 3, 5, 4, 4)),
}


def one_layer(name: str, size: int = 1) -> tuple[Program, list[Tensor]]:
    """A program of one layer, with calibration data."""
    layer, shape = LAYERS[name]
    torch.manual_seed(0)
    layer.reset_parameters()
    batches = data(size * shape[0], *shape[1:])
    return capture(nn.Sequential(layer).double().eval(), batches[0], calibration=batches), batches


def layer_node(program: Program) -> Any:
    (node,) = (node for node in program.nodes if program.module_of(node) is not None)
    return node


@pytest.mark.parametrize("fit", ["weights", "data"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", LAYERS)
def test_at_the_full_multiplier_a_layer_is_what_it_was(name: str, order: Order, fit: Any) -> None:
    program, batches = one_layer(name)
    before = [program.run(x)[0] for x in batches]
    node = layer_node(program)
    full = full_multiplier(LAYERS[name][0], order)
    rewrite = Rewrite(node.name, "", {"order": order, "multiplier": full})
    SubstituteDepthwiseSeparable(fit=fit).apply(program, rewrite)
    first = "0_depthwise" if order == "depthwise_first" else "0_pointwise"
    assert {path.partition(".")[0] for path in program.module.state_dict()} == {first, "0"}
    for x, wanted in zip(batches, before, strict=True):
        torch.testing.assert_close(program.run(x)[0], wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", LAYERS)
def test_error_and_macs_are_what_they_are_said_to_be_and_data_keep_more(name: str, order: Order) -> None:
    program, batches = one_layer(name, size=8)
    node = layer_node(program)
    wanted = torch.cat([program.run(x)[0] for x in batches]).movedim(1, 0).flatten(1)
    spread = wanted.var(1, correction=0).sum()
    errors = {}
    for fit in ("weights", "data"):
        pass_ = SubstituteDepthwiseSeparable(multiplier=1, order=order, max_error=None, fit=fit)  # type: ignore[arg-type]
        said = pass_._fitted(program, node.name, order, 1)
        changed = program.copy()
        pass_.apply(changed, Rewrite(node.name, "", {"order": order, "multiplier": 1}))
        off = wanted - torch.cat([changed.run(x)[0] for x in batches]).movedim(1, 0).flatten(1)
        errors[fit] = float(off.var(1, correction=0).sum() / spread)
        assert changed.cost().macs == said.form.macs
        if fit == "data":
            assert float(off.mean(1).abs().max()) < 1e-6
            assert said.error == pytest.approx(errors[fit], rel=1e-6)
    assert errors["data"] < errors["weights"]


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
        nn.Conv2d(16, 8, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 12),
    )


def trained_net(batches: Sequence[Tensor]) -> nn.Sequential:
    """With running statistics of these batches."""
    model = conv_net().double()
    for x in batches:
        model(x)
    return model.eval()


def separable(channels: int, outputs: int) -> nn.Conv2d:
    """A dense convolution whose weight is that of a depthwise separable one of multiplier 1."""
    generator = torch.Generator().manual_seed(1)
    conv = nn.Conv2d(channels, outputs, 3, padding=1)
    spatial = torch.randn(1, channels, 3, 3, generator=generator)
    conv.weight.data = torch.randn(outputs, channels, 1, 1, generator=generator) * spatial
    return conv


def test_golden() -> None:
    assert_pass(
        SubstituteDepthwiseSeparable(),
        nn.Sequential(separable(4, 6), nn.ReLU()).eval(),
        (torch.randn(1, 4, 5, 5, generator=torch.Generator().manual_seed(0)),),
        after="""
            %input_1 = input : f32[1, 4, 5, 5]
            %_0_depthwise = conv2d[0_depthwise](%input_1) {4, 4, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), groups=4, bias=False} : f32[1, 4, 5, 5]
            %_0 = conv2d[0](%_0_depthwise) {4, 6, kernel_size=(1, 1), stride=(1, 1)} : f32[1, 6, 5, 5]
            %_1 = relu[1](%_0) : f32[1, 6, 5, 5]
            return (%_1,)
        """,  # noqa: E501 (golden text)
        rewrites=1,
        skips=[],
        tolerance=1e-5,
    )


def test_every_convolution_is_substituted_or_refused_with_the_reason() -> None:
    batches = data(4, 8, 10, 10)
    model, x = trained_net(batches), batches[0]
    depthwise, pointwise = (
        "each output reads one channel: it is depthwise already",
        "its kernel has one place: it is pointwise already",
    )
    pass_ = SubstituteDepthwiseSeparable(multiplier=1, order="depthwise_first", max_error=None, ignore=("3",))
    plan = Plan.of(pass_, capture(model, x))
    assert [(skip.node, skip.why) for skip in plan.skips] == [("_3", "ignored"), ("_6", depthwise), ("_7", pointwise)]
    (rewrite,) = plan.rewrites
    # C T (K + outputs) of C K outputs
    assert rewrite.what.startswith("depthwise first with multiplier 1 for 0: 17% of its MACs, loses ")
    others = [depthwise, pointwise]
    assert_skips(
        SubstituteDepthwiseSeparable(multiplier=9, max_error=None),
        model,
        x,
        others + ["multiplier 9 saves no MACs"] * 2,
    )
    plan = Plan.of(SubstituteDepthwiseSeparable(multiplier=1, max_error=0.01), capture(model, x))
    assert plan.rewrites == []
    assert all(
        skip.why.startswith("at best it loses ") and skip.why.endswith("with multiplier 1; max_error is 1.00%")
        for skip in plan.skips[2:]
    )
    assert len(plan.skips) == 4
    small = nn.Sequential(nn.Conv2d(2, 1, (1, 2))).eval()
    assert_skips(SubstituteDepthwiseSeparable(), small, torch.randn(1, 2, 4, 4), ["no multiplier saves MACs"])


def test_a_long_patch_is_fitted_to_its_weights_and_refused_where_data_are_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from fxopt.passes import substitute_depthwise_separable

    monkeypatch.setattr(substitute_depthwise_separable, "LONGEST", 71)
    batches = data(4, 8, 10, 10)
    program = capture(nn.Sequential(separable(8, 8)).double().eval(), batches[0], calibration=batches)
    plan = Plan.of(SubstituteDepthwiseSeparable(fit="data"), program)
    assert [skip.why for skip in plan.skips] == [
        "each output reads 72 values, and 71 is the most that is fitted to data"
    ]
    assert len(Plan.of(SubstituteDepthwiseSeparable(), program).rewrites) == 2


def test_auto_takes_the_form_of_the_fewest_macs_that_is_good_enough() -> None:
    batches = data(8, 8, 10, 10)
    program = capture(trained_net(batches), batches[0], calibration=batches)
    name = "_3"
    layer = program.module_of(program.node(name))
    each = [
        SubstituteDepthwiseSeparable()._fitted(program, name, order, multiplier)
        for order in ORDERS
        for multiplier in range(1, full_multiplier(layer, order) + 1)  # type: ignore[arg-type]
    ]
    macs = []
    for max_error in (0.5, 0.3, 0.1):
        (found,) = SubstituteDepthwiseSeparable(max_error=max_error)._chosen(program, [name]).values()
        assert not isinstance(found, str)
        good = [fitted for fitted in each if fitted.error <= max_error]
        assert found.form.macs == min(fitted.form.macs for fitted in good)
        assert found.error == min(fitted.error for fitted in good if fitted.form.macs == found.form.macs)
        macs.append(found.form.macs)
    assert macs[0] < macs[1] < macs[2]


def test_a_pointwise_layer_in_front_of_a_stride_counts_at_the_size_of_the_input() -> None:
    program = capture(nn.Sequential(nn.Conv2d(8, 8, 3, stride=2, padding=1)).eval(), torch.randn(1, 8, 8, 8))
    pass_ = SubstituteDepthwiseSeparable(multiplier=2, max_error=None, order="pointwise_first")
    # 16 positions of the output, 64 of the input: 2 (64 * 8 * 8 + 16 * 8 * 9) against 16 * 8 * 8 * 9
    assert [skip.why for skip in Plan.of(pass_, program).skips] == ["multiplier 2 saves no MACs"]
    (rewrite,) = Plan.of(SubstituteDepthwiseSeparable(multiplier=2, max_error=None), program).rewrites
    assert rewrite.params == {"order": "depthwise_first", "multiplier": 2}


def test_layers_behind_make_up_for_what_is_lost() -> None:
    batches = data(8, 8, 10, 10)
    model = trained_net(batches)
    noise = []
    for fit in ("weights", "data"):
        pass_ = SubstituteDepthwiseSeparable(multiplier=1, max_error=None, fit=fit)  # type: ignore[arg-type]
        program = fxopt.optimize(model, batches[0], [pass_], calibration=batches, on_failure="raise")
        rewrites = program.report.passes[-1].rewrites
        assert [rewrite.params.get("fit") for rewrite in rewrites[2:]] == (
            [["_0", "_3", "_6", "_7", "_10"]] if fit == "data" else []
        )
        # offsets go into the BatchNorms
        assert not [name for name, _ in program.module.named_parameters() if name in ("0.bias", "3.bias")]
        noise.append(program.report.passes[-1].sqnr_db or 0.0)
    assert noise[0] + 3 < noise[1]


def test_few_data_of_few_dimensions_do_no_harm() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 1, 6, 6, generator=generator, dtype=DOUBLE).expand(2, 8, 6, 6).contiguous()
    x[:, 3] = 0.0
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1)).double().eval()
    with torch.no_grad():
        model[0].weight[2] = 0.0
    for order in ORDERS:
        pass_ = SubstituteDepthwiseSeparable(multiplier=2, max_error=None, order=order)
        program = fxopt.optimize(model, x, [pass_], calibration=[x], on_failure="raise")
        assert all(bool(item.isfinite().all()) for item in program.module.parameters())
        with torch.no_grad():
            wanted = model(x)
            off = program.run(x)[0] - wanted
        assert float(off.var() / wanted.var()) < 0.1


def test_only_what_is_faster_is_done_if_time_is_what_has_to_be_saved() -> None:
    batches = data(2, 8, 10, 10, batches=1)
    model, x = trained_net(batches), batches[0]
    pass_ = SubstituteDepthwiseSeparable(multiplier=1, max_error=None, gate="time", ignore=("6", "7"))
    (plan,) = fxopt.explain(model, x, [pass_], backend=SlowBackend(by="macs"))
    assert [rewrite.node for rewrite in plan.rewrites] == ["_0", "_3"]
    for rewrite in plan.rewrites:
        macs, time = (int(number) for number in re.findall(r"(\d+)% of its (?:MACs|time)", rewrite.what))
        assert macs <= time < 95
    (plan,) = fxopt.explain(model, x, [pass_], backend=SlowBackend(by="layers"))
    assert plan.rewrites == []
    whys = [skip.why for skip in plan.skips if skip.node in ("_0", "_3")]
    assert all(
        re.fullmatch(r"\w+ first with multiplier 1 takes \d+% of its MACs and \d+% of its time", why) for why in whys
    )
    assert len(whys) == 2
    with pytest.raises(InputError, match="pass backend="):
        fxopt.optimize(model, x, [pass_])


def test_a_plan_replays_on_another_checkpoint_and_measures_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from fxopt.passes import substitute_depthwise_separable

    batches = data(8, 8, 10, 10)
    program = capture(trained_net(batches), batches[0], calibration=batches)
    calls: list[Sequence[str]] = []
    measure = substitute_depthwise_separable.layer_moments

    def counted(program: Program, layers: Sequence[str], *rest: Any) -> Any:
        calls.append(layers)
        return measure(program, layers, *rest)

    monkeypatch.setattr(substitute_depthwise_separable, "layer_moments", counted)
    pass_ = SubstituteDepthwiseSeparable(max_error=0.2)
    result = PassManager([pass_]).run(program)
    assert calls == [["_0", "_3"]]
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
            self.twice, self.one, self.other = (nn.Conv1d(8, 8, 3, padding=1) for _ in range(3))
            self.other.weight = self.one.weight
            self.free = nn.Parameter(torch.randn(8, 8, 3))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.conv1d(self.other(self.one(self.twice(self.twice(x)))), self.free * 2)

    program = capture(Twice().eval(), torch.randn(3, 8, 9))
    pass_ = SubstituteDepthwiseSeparable(multiplier=1, max_error=None)
    assert [skip.why for skip in Plan.of(pass_, program).skips] == [
        "it is called at 2 places",
        "it is called at 2 places",
        "its weight is tied to another layer's",
        "its weight is tied to another layer's",
        "it is a function, not a module",
    ]
    with pytest.raises(PassError, match="conv1d is no convolution that is a module"):
        pass_.apply(program, Rewrite("conv1d", "", {"order": "depthwise_first", "multiplier": 1}))


def test_masked_layers_are_neither_substituted_nor_fitted() -> None:
    batches = data(8, 8, 10, 10)
    masked = PassManager([PruneWeights(sparsity=0.5, ignore=("0",))]).run(
        capture(trained_net(batches), batches[0], calibration=batches)
    )
    plan = Plan.of(SubstituteDepthwiseSeparable(multiplier=1, max_error=None), masked)
    assert [skip.why for skip in plan.skips if skip.node == "_3"] == [
        "it has a mask, which other layers would lose: do this before prune_weights",
        "is not fitted to the data: it has a mask, which a fit would fill",
    ]
    assert [rewrite.node for rewrite in plan.rewrites if "order" in rewrite.params] == ["_0"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"multiplier": 0}, "multiplier must be 'auto' or an integer of at least 1, not 0"),
        ({"multiplier": True}, "multiplier must be 'auto' or an integer of at least 1, not True"),
        ({"order": "first"}, "order must be one of 'auto', 'depthwise_first', 'pointwise_first', not 'first'"),
        ({"max_error": None}, "multiplier 'auto' is chosen by max_error: give it, or a multiplier such as 2"),
        ({"max_error": 1.5}, "max_error must be a share between 0 and 1, or None, not 1.5"),
        ({"max_error": "small"}, "max_error must be a share between 0 and 1, or None, not 'small'"),
        ({"fit": "both"}, "fit must be one of 'auto', 'weights', 'data', not 'both'"),
        ({"ignore": "head"}, "ignore must be a tuple"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SubstituteDepthwiseSeparable(**options)


def test_a_fit_to_data_needs_data() -> None:
    program = capture(conv_net().eval(), torch.randn(2, 8, 10, 10))
    with pytest.raises(InputError, match="fit='data' needs data: pass calibration="):
        Plan.of(SubstituteDepthwiseSeparable(fit="data"), program)


def test_it_trains_runs_in_onnx_at_any_batch_size_and_loads_again(tmp_path: Path) -> None:
    batches = [x.float() for x in data(8, 8, 10, 10)]
    model = trained_net([x.double() for x in batches]).float()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pass_ = SubstituteDepthwiseSeparable(multiplier=2, max_error=None)
    compiled = fxopt.compile(
        model, batches[0], passes=[pass_, "reestimate_batch_norm", "default"], calibration=batches, backend="onnx"
    )
    compiled.save(tmp_path / "saved")
    loaded = fxopt.load(tmp_path / "saved")
    torch.testing.assert_close(loaded(batches[0][:3]), compiled(batches[0][:3]))
    program = fxopt.optimize(model, batches[0], [pass_], calibration=batches)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    module = program.module.train()
    module(batches[0]).square().sum().backward()
    assert all(item.grad is not None and item.requires_grad for item in module.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_frozen_weights(dtype: torch.dtype) -> None:
    batches = [x.float() for x in data(8, 8, 10, 10)]
    model = trained_net([x.double() for x in batches]).to(dtype).requires_grad_(requires_grad=False)
    halves = [x.to(dtype) for x in batches]
    pass_ = SubstituteDepthwiseSeparable(multiplier=2, max_error=None)
    program = fxopt.optimize(model, halves[0], [pass_], calibration=halves)
    made = dict(program.module.named_parameters())
    assert "0_depthwise.weight" in made or "0_pointwise.weight" in made
    assert {(item.dtype, item.requires_grad) for item in made.values()} == {(dtype, False)}
