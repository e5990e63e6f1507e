"""Inverted residuals for residual blocks: exact where a block is one, as far off as they say, and only for blocks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxopt
from fxopt.errors import InputError, PassError
from fxopt.frontends.capture import capture
from fxopt.manager import PassManager
from fxopt.nn import InvertedResidual
from fxopt.passes import PruneWeights, SubstituteInvertedResidual
from fxopt.passes import substitute_inverted_residual as module_of_the_pass
from fxopt.passes_base import Plan, Rewrite
from fxopt.testing import assert_pass, assert_skips
from tests.slow_backend import SlowBackend

DOUBLE = torch.float64


def data(*shape: int, batches: int = 3, dtype: torch.dtype = DOUBLE) -> list[Tensor]:
    """Inputs that are not negative, like those behind a ReLU, whose channels and positions depend on each other."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(shape[1], shape[1], generator=generator, dtype=DOUBLE) / shape[1] ** 0.5
    found = []
    for _ in range(batches):
        x = torch.randn(*shape, generator=generator, dtype=DOUBLE)
        x = F.avg_pool2d(F.pad(x, (1, 1, 1, 1)), 3, 1) * 3
        found.append(F.relu((x.movedim(1, -1) @ mix + 0.5).movedim(-1, 1)).to(dtype).contiguous())
    return found


class Residual(nn.Module):
    """A ReLU over a sum, as in a ResNet."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.branch, self.shortcut = branch, shortcut or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.branch(x) + self.shortcut(x))


class Basic(nn.Module):
    """The basic block of a ResNet."""

    def __init__(self, channels: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.shortcut: nn.Module | None = None
        if stride > 1 or channels != out:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        y += x if self.shortcut is None else self.shortcut(x)
        return F.relu(y)


def settled(model: nn.Module, batches: Sequence[Tensor]) -> Any:
    """With the running statistics of these batches and some weights of norms, in evaluation mode."""
    for item in model.modules():
        if isinstance(item, nn.BatchNorm2d):
            item.momentum = None
            nn.init.uniform_(item.weight, 0.5, 1.5)
            nn.init.normal_(item.bias, 0, 0.5)
    model.train()
    with torch.no_grad():
        for x in batches:
            model(x)
    return model.eval()


def basic_net(dtype: torch.dtype = DOUBLE) -> tuple[nn.Sequential, list[Tensor]]:
    torch.manual_seed(0)
    batches = data(8, 8, 8, 8, dtype=dtype)
    net = nn.Sequential(
        Basic(8, 8), Basic(8, 16, 2), Basic(16, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)
    )
    return settled(net.to(dtype), batches), batches


LIMITS: dict[str, tuple[dict[str, Any], bool]] = {
    "plain": ({"padding": 1}, True),
    "bias": ({"padding": 1, "bias": True}, True),
    "folded": ({"padding": 1, "bias": True}, False),
    "same": ({"kernel_size": 5, "padding": "same"}, True),
    "oblong": ({"kernel_size": (3, 1), "padding": (1, 0)}, True),
    "dilation": ({"padding": (2, 4), "dilation": (2, 4)}, True),
    "stride": ({"padding": 1, "stride": 2}, True),
    "stride of one axis": ({"kernel_size": (5, 3), "padding": (2, 1), "stride": (1, 2), "bias": True}, False),
}


@pytest.mark.parametrize("name", LIMITS)
def test_a_block_that_is_an_inverted_residual_is_found_again(name: str) -> None:
    options, has_norms = LIMITS[name]
    torch.manual_seed(0)
    options = {"kernel_size": 3, "bias": False, **options}
    first, last = nn.Conv2d(6, 9, **options).double(), nn.Conv2d(9, 6, 1, bias=options["bias"])
    with torch.no_grad():
        directions, taps = torch.rand(9, 6, 1, 1, dtype=DOUBLE), torch.randn(9, 1, *first.kernel_size, dtype=DOUBLE)
        first.weight.copy_(directions * taps)
    layers: list[nn.Module] = [first, nn.BatchNorm2d(9), nn.ReLU(), last, nn.BatchNorm2d(6)]
    if not has_norms:
        layers = [first, nn.ReLU(), last]
    shortcut: nn.Module | None = None
    if "stride" in options:
        # of which nothing but the bias is left, as an inverted residual has no shortcut there
        shortcut = nn.Conv2d(6, 6, 1, options["stride"])
        nn.init.zeros_(shortcut.weight)
    batches = data(8, 6, 10, 9)
    model = settled(Residual(nn.Sequential(*layers), shortcut).double(), batches)
    program = fxopt.optimize(
        model,
        batches[0],
        [SubstituteInvertedResidual(expansion=1.5, steps=0)],
        calibration=batches,
        on_failure="raise",
    )
    (rewrite,) = program.report.passes[0].rewrites
    assert "of 9 channels" in rewrite.what
    assert rewrite.what.endswith("loses 0.00% of the outputs")
    assert [program.op(node) for node in program.nodes].count("conv2d") == 3
    for x in batches:
        torch.testing.assert_close(program.run(x)[0], model(x), rtol=0, atol=1e-8)


def test_blocks_are_replaced_and_their_layers_have_the_names_of_the_building_block() -> None:
    net, batches = basic_net()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    program = fxopt.optimize(
        net, batches[0], [SubstituteInvertedResidual(steps=2, max_error=1)], calibration=batches, on_failure="raise"
    )
    report = program.report.passes[0]
    assert report.skips == []
    assert [rewrite.what.partition(" of the MACs")[0] for rewrite in report.rewrites] == [
        "an inverted residual of 8 channels, 5 x 5, for 0.conv1, 0.conv2: 28%",
        "an inverted residual of 24 channels, 5 x 5, for 1.conv1, 1.conv2: 49%",
        "an inverted residual of 40 channels, 5 x 5, for 2.conv1, 2.conv2: 49%",
    ]
    modules = program.module
    for path, block in {
        "1": InvertedResidual(8, 16, 5, stride=2, expansion=3),
        "2": InvertedResidual(16, 16, 5, expansion=2.5),
    }.items():
        state = {
            name.removeprefix(f"{path}."): tensor
            for name, tensor in modules.state_dict().items()
            if name.startswith(f"{path}.")
        }
        block.double().load_state_dict(state)
        assert all(item.requires_grad for item in modules.get_submodule(path).parameters())
    assert program.cost().macs < 0.55 * capture(net, batches[0]).cost().macs
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_the_error_is_what_is_lost_on_samples_that_were_not_fitted_to() -> None:
    torch.manual_seed(0)
    batches = data(8, 8, 8, 8)
    model = settled(Basic(8, 8).double(), batches)
    pass_ = SubstituteInvertedResidual(expansion=2, steps=3, max_error=1)
    program = fxopt.optimize(model, batches[0], [pass_], calibration=batches, on_failure="raise")
    (rewrite,) = program.report.passes[0].rewrites
    held = torch.cat(batches)[3::4]

    def sums(of: Any) -> Tensor:
        found: list[Tensor] = []
        of.run(held, watch=lambda node, value: found.append(value) if of.op(node) == "add" else None)
        return found[0].movedim(1, 0).flatten(1)

    wanted, got = sums(capture(model, batches[0])), sums(program)
    error = float((wanted - got).square().mean(1).sum() / wanted.var(1, correction=0).sum())
    assert rewrite.what.endswith(f"loses {error:.2%} of the outputs")
    assert 0.001 < error < 0.5


def test_steps_and_more_channels_make_the_error_smaller_and_a_limit_keeps_blocks() -> None:
    net, batches = basic_net()
    program = capture(net, batches[0], calibration=batches)

    def errors(**options: Any) -> list[float]:
        plan = Plan.of(SubstituteInvertedResidual(max_error=9, **options), program)
        return [float(item.what.rpartition("loses ")[2].partition("%")[0]) for item in plan.rewrites]

    closed, moved, wider = errors(steps=0), errors(steps=30), errors(steps=0, expansion=3)
    assert moved[0] < closed[0]
    assert wider[0] < closed[0]
    plan = Plan.of(SubstituteInvertedResidual(max_error=1e-4, steps=0), program)
    assert plan.skips[0].why == (f"it would lose {closed[0]:.1f}% of its outputs, and max_error is 0.0%")
    assert plan.rewrites == []


def test_only_what_is_faster_is_done_if_time_is_what_has_to_be_saved() -> None:
    net, batches = basic_net()

    def plan(by: str) -> Plan:
        pass_ = SubstituteInvertedResidual(max_error=9, steps=0, gate="time")
        return fxopt.explain(net, batches[0], [pass_], calibration=batches, backend=SlowBackend(by=by))[0]

    quick = plan("macs")
    assert len(quick.rewrites) == 3
    for rewrite in quick.rewrites:
        macs, time = (int(number) for number in re.findall(r"(\d+)% of the (?:MACs|time)", rewrite.what))
        assert macs <= time < 95
    # eight layers in the place of five or so
    slow = plan("layers")
    assert slow.rewrites == []
    assert all(re.search(r"of \d+ channels takes \d+% of the block's time$", skip.why) for skip in slow.skips)


def test_each_block_is_fitted_once_to_the_original_from_what_it_reads_by_then(monkeypatch: pytest.MonkeyPatch) -> None:
    net, batches = basic_net()
    original = capture(net, batches[0], calibration=batches)
    seen: list[Any] = []
    fit = module_of_the_pass.fit

    def spied(sizes: Any, first: Any, data: Any, steps: int) -> Any:
        seen.append(data)
        return fit(sizes, first, data, steps)

    monkeypatch.setattr(module_of_the_pass, "fit", spied)
    pass_ = SubstituteInvertedResidual(steps=0, max_error=1)
    program = PassManager([pass_]).run(original)
    assert len(seen) == 3
    # a plan that is carried out elsewhere, without what planning found out
    plan = Plan.of(pass_, original)
    assert len(seen) == 6
    fresh = capture(net, batches[0], calibration=batches)
    for rewrite in plan.rewrites:
        pass_.apply(fresh, rewrite)
    assert len(seen) == 9
    torch.testing.assert_close(fresh.run(batches[1]), program.run(batches[1]), rtol=0, atol=1e-9)
    values: dict[str, Tensor] = {}
    program.run(batches[1], watch=lambda node, value: values.update({node.name: value}))
    wanted: dict[str, Tensor] = {}
    original.run(batches[1], watch=lambda node, value: wanted.update({node.name: value}))
    for place, (source, end) in enumerate((("x", "add"), ("relu_1", "add_1"), ("relu_3", "add_2"))):
        if place:
            torch.testing.assert_close(seen[place][1].value, values[source], rtol=0, atol=1e-12)
        torch.testing.assert_close(seen[place][1].target, wanted[end], rtol=0, atol=1e-12)


class Sums(nn.Module):
    """Sums that are no residual block, one of each kind."""

    def __init__(self) -> None:
        super().__init__()

        def conv(**options: Any) -> nn.Conv2d:
            return nn.Conv2d(8, 8, 3, padding=1, **options)

        self.read, self.deep, self.grouped, self.twice = conv(), conv(), conv(groups=2), conv()
        self.tied, self.other, self.masked = conv(), conv(), conv()
        self.tied.weight = self.other.weight
        self.wide, self.pooled, self.small = conv(), conv(), nn.Conv2d(8, 8, 1)
        self.free = nn.Parameter(torch.randn(8, 8, 1, 1))
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + 1
        y = self.read(x)
        x = F.relu(y + x) * y
        x = F.relu(self.grouped(x) + x)
        x = F.relu(self.twice(self.twice(x)) + x)
        x = F.relu(self.tied(x) + x) + self.other(x)
        x = F.relu(torch.add(self.wide(x), x, alpha=2))
        x = F.relu(self.pooled(x) + F.avg_pool2d(x, 3, 1, 1))
        x = F.relu(self.small(x) + x)
        x = F.relu(F.conv2d(x, self.free * 2) + x)
        x = F.relu(self.deep(x) + x[:1])
        x = F.relu(x.sigmoid() + x)
        return self.masked(x) + self.deep(self.deep(x))


def test_sums_that_are_no_block_are_left_alone_with_the_reason() -> None:
    torch.manual_seed(0)
    x = torch.rand(4, 8, 8, 8)
    plan = Plan.of(SubstituteInvertedResidual(), capture(Sums().eval(), x, calibration=[x]))
    assert plan.rewrites == []
    assert [skip.why for skip in plan.skips] == [
        "it adds a constant",
        "read is read elsewhere too",
        "grouped is grouped, and a block is dense",
        "twice: it is called at 2 places",
        "tied: its weight is tied to another layer's",
        "its operands come from different values: add_4 (add) and add_3 (add)",
        "it scales what it adds",
        "its operands come from different values: add_6 (add) and avg_pool2d (avg_pool2d)",
        "an inverted residual of 8 channels takes 34,816 MACs, and the block 16,384",
        "its operands come from different values: conv2d (conv2d) and add_8 (add)",
        "what it adds has not the shape and type of the sum",
        "neither operand is made of two-dimensional convolutions of relu_8",
        "neither operand is relu_9 or a 1 x 1 convolution of it",
    ]


def test_without_data_in_training_mode_or_with_an_iterator_nothing_is_done() -> None:
    net, batches = basic_net(torch.float32)
    (x, *_) = batches
    pass_ = SubstituteInvertedResidual(ignore=("1.*",))
    data_missing = "it takes data to fit what comes in its place: pass calibration=, an iterable of batches"
    assert_skips(pass_, net, x, [data_missing, "ignored", data_missing])
    whys = {skip.why for skip in Plan.of(pass_, capture(net, x, calibration=iter(batches))).skips}
    assert whys == {
        "ignored",
        "it takes data to fit what comes in its place, and an iterator can be read once: pass a list",
    }
    with pytest.raises(InputError, match="the calibration data hold 3 samples, and a fit takes at least 4"):
        Plan.of(pass_, capture(net, x, calibration=[x[:2], x[2:3]]))
    training = {skip.why for skip in Plan.of(pass_, capture(net.train(), x, calibration=batches)).skips}
    assert training == {f"{path}.bn1 is in training mode: call model.eval() first" for path in (0, 1, 2)}
    costly = Plan.of(SubstituteInvertedResidual(expansion=20), capture(net.eval(), x, calibration=batches))
    assert costly.skips[0].why == ("an inverted residual of 160 channels takes 3,358,720 MACs, and the block 589,824")


def test_masked_layers_are_refused_with_the_order_that_works() -> None:
    net, batches = basic_net()
    masked = PassManager([PruneWeights(sparsity=0.5, ignore=("0.*", "2.*"))]).run(
        capture(net, batches[0], calibration=batches)
    )
    plan = Plan.of(SubstituteInvertedResidual(steps=0, max_error=1), masked)
    assert [skip.why for skip in plan.skips] == [
        "1.conv1 has a mask, which would be lost: substitute before prune_weights"
    ]
    assert [rewrite.node for rewrite in plan.rewrites] == ["add", "add_2"]


def test_it_folds_runs_in_onnx_and_trains() -> None:
    net, batches = basic_net(torch.float32)
    pass_ = SubstituteInvertedResidual(steps=1, max_error=1)
    compiled = fxopt.compile(net, batches[0], passes=[pass_, "default"], calibration=batches, backend="onnx")
    assert len(compiled.report.passes[0].rewrites) == 3
    program = fxopt.optimize(net, batches[0], [pass_], calibration=batches, on_failure="raise")
    torch.testing.assert_close(compiled(batches[1][:3]), program.module(batches[1][:3]), rtol=1e-3, atol=1e-4)
    module = program.module.train()
    module(batches[0]).square().sum().backward()
    assert all(item.grad is not None and item.requires_grad for item in module.parameters())
    # trained on, the program is another: what was fitted to the first is not taken again
    with torch.no_grad():
        module.get_parameter("0.expand.weight").zero_()
    again = fxopt.optimize(net, batches[0], [pass_], calibration=batches, on_failure="raise")
    assert again.module.get_parameter("0.expand.weight").abs().min() > 0


def test_a_saved_engine_answers_as_before(tmp_path: Any) -> None:
    net, batches = basic_net(torch.float32)
    pass_ = SubstituteInvertedResidual(steps=0, max_error=1)
    compiled = fxopt.compile(net, batches[0], passes=[pass_], calibration=batches)
    compiled.save(tmp_path / "engine")
    assert torch.equal(fxopt.load(tmp_path / "engine")(batches[1]), compiled(batches[1]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    net, batches = basic_net(torch.float32)
    halves = [x.to(dtype) for x in batches]
    program = fxopt.optimize(
        net.to(dtype), halves[0], [SubstituteInvertedResidual(steps=1, max_error=1)], calibration=halves
    )
    assert len(program.report.passes[0].rewrites) == 3
    assert {item.dtype for item in program.module.parameters()} == {dtype}


def test_bottlenecks_of_torchvision() -> None:
    resnet = pytest.importorskip("torchvision.models.resnet")
    torch.manual_seed(0)
    net = nn.Sequential(
        resnet.Bottleneck(32, 8),
        resnet.Bottleneck(32, 8, stride=2, downsample=nn.Sequential(nn.Conv2d(32, 32, 1, 2), nn.BatchNorm2d(32))),
        resnet.Bottleneck(32, 8, dilation=2),
    )
    batches = data(8, 32, 9, 9, dtype=torch.float32)
    settled(net, batches)
    for passes in ([], ["fold_batch_norm"]):
        pass_ = SubstituteInvertedResidual(steps=1, max_error=9)
        program = fxopt.optimize(net, batches[0], [*passes, pass_], calibration=batches, on_failure="raise")
        assert [rewrite.what.partition(":")[0] for rewrite in program.report.passes[-1].rewrites] == [
            "an inverted residual of 8 channels, 3 x 3, for 0.conv1, 0.conv2, 0.conv3",
            "an inverted residual of 8 channels, 3 x 3, for 1.conv1, 1.conv2, 1.conv3",
            "an inverted residual of 8 channels, 3 x 3, for 2.conv1, 2.conv2, 2.conv3",
        ]
        layer: Any = program.module.get_submodule("2.depthwise")
        assert (layer.padding, layer.dilation) == ((2, 2), (2, 2))


def test_a_single_convolution_and_the_contract_of_passes() -> None:
    torch.manual_seed(0)
    batches = data(8, 6, 8, 8)
    model = settled(Residual(nn.Conv2d(6, 6, 3, padding=1)).double(), batches)
    assert_pass(
        SubstituteInvertedResidual(expansion=1.5, max_error=1, steps=0),
        model,
        batches[0],
        rewrites=1,
        skips=[],
        calibration=batches,
    )
    program = capture(model, batches[0], calibration=batches)
    with pytest.raises(PassError, match="no residual block: it adds a constant"):
        SubstituteInvertedResidual().apply(capture(Plus(), batches[0]), Rewrite("add", "", {"hidden": 8}))
    assert program.edits == 0


class Plus(nn.Module):
    """Adds a constant."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expansion": 0}, "expansion must be 'auto' or a number above 0, not 0"),
        ({"expansion": "wide"}, "expansion must be 'auto' or a number above 0, not 'wide'"),
        ({"max_error": 0}, "max_error must be a share above 0, such as 0.1, not 0"),
        ({"steps": -1}, "steps must be an integer of at least 0, not -1"),
        ({"ignore": "head"}, "ignore must be a tuple"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SubstituteInvertedResidual(**options)
