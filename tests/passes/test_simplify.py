"""`simplify`: what it removes, what it must not, and that the batch stays free."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxopt
from fxopt.frontends.capture import Frontend
from fxopt.passes import Simplify
from fxopt.passes_base import Skip
from fxopt.testing import assert_equivalent, assert_pass, assert_skips


class Function(nn.Module):
    """A model that is one function of one tensor."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def sample(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def body(program: fxopt.Program) -> list[str]:
    """The operators between inputs and output."""
    return [program.op(node) for node in program.nodes if node.op not in ("placeholder", "output")]


def simplified(function: Callable[..., Any], x: Tensor, rewrites: int, **options: Any) -> list[str]:
    program = assert_pass(Simplify(), Function(function).eval(), (x,), rewrites=rewrites, **options)
    if program.batch is not None:
        original = fxopt.capture(Function(function).eval(), (x,))
        for size in (1, 3, 5):
            assert_equivalent(original, program, program.inputs_with_batch(size, seed=size), flat=True)
    return body(program)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.same = nn.Identity()
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.same(self.conv(x))
        y = F.relu(x) + F.relu(x)
        n, c, h, w = y.shape
        return self.head(self.drop(y.reshape(n, c, h * w).mean(2)))


def test_golden() -> None:
    assert_pass(
        Simplify(),
        Block().eval(),
        (sample(2, 3, 6, 6),),
        rewrites=5,
        skips=[],
        before="""
            %x = input : f32[2, 3, 6, 6]
            %conv = conv2d[conv](%x) {3, 8, kernel_size=(3, 3), stride=(1, 1)} : f32[2, 8, 4, 4]
            %same = identity[same](%conv) : f32[2, 8, 4, 4]
            %relu = relu(%same, inplace=False) : f32[2, 8, 4, 4]
            %relu_1 = relu(%same, inplace=False) : f32[2, 8, 4, 4]
            %add = add(%relu, %relu_1) : f32[2, 8, 4, 4]
            %getattr_1 = getattr(%add, 'shape') : (2, 8, 4, 4)
            %getitem = getitem(%getattr_1, 0) : 2
            %getitem_1 = getitem(%getattr_1, 1) : 8
            %getitem_2 = getitem(%getattr_1, 2) : 4
            %getitem_3 = getitem(%getattr_1, 3) : 4
            %mul = mul(%getitem_2, %getitem_3) : 16
            %reshape = reshape(%add, %getitem, %getitem_1, %mul) : f32[2, 8, 16]
            %mean = mean(%reshape, 2) : f32[2, 8]
            %drop = dropout[drop](%mean) {p=0.5, inplace=False} : f32[2, 8]
            %head = linear[head](%drop) {in_features=8, out_features=4, bias=True} : f32[2, 4]
            return (%head,)
        """,
        after="""
            %x = input : f32[2, 3, 6, 6]
            %conv = conv2d[conv](%x) {3, 8, kernel_size=(3, 3), stride=(1, 1)} : f32[2, 8, 4, 4]
            %relu = relu(%conv, inplace=False) : f32[2, 8, 4, 4]
            %add = add(%relu, %relu) : f32[2, 8, 4, 4]
            %getattr_1 = getattr(%add, 'shape') : (2, 8, 4, 4)
            %getitem = getitem(%getattr_1, 0) : 2
            %reshape = reshape(%add, %getitem, 8, 16) : f32[2, 8, 16]
            %mean = mean(%reshape, 2) : f32[2, 8]
            %head = linear[head](%mean) {in_features=8, out_features=4, bias=True} : f32[2, 4]
            return (%head,)
        """,
    )


def test_training_keeps_dropout_and_says_so() -> None:
    program = assert_pass(
        Simplify(), Block().train(), (sample(2, 3, 6, 6),), skips=[Skip("drop", "drops in training mode")]
    )
    assert "dropout" in body(program)
    assert "identity" not in body(program)


IDENTITIES: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "add 0": (lambda x: (x + 0).sin(), 1),
    "0 + x": (lambda x: (0 + x).sin(), 1),
    "sub 0": (lambda x: (x - 0.0).sin(), 1),
    "mul 1": (lambda x: (x * 1.0).sin(), 1),
    "div 1": (lambda x: (x / 1).sin(), 1),
    "float": (lambda x: x.float().sin(), 1),
    "to": (lambda x: x.to(torch.float32).sin(), 1),
    "to the device": (lambda x: x.to("cpu").sin(), 1),
    "functional dropout": (lambda x: F.dropout(x, 0.5, training=False).sin(), 1),
    "dropout of nothing": (lambda x: F.dropout(x, 0.0, training=True).sin(), 1),
    "view": (lambda x: x.view(-1, 6, 4).sin(), 1),
    "flatten": (lambda x: x.flatten(2).sin(), 1),
    "reshape to its shape": (lambda x: x.reshape(x.shape[0], 6, -1).sin(), 1),
    "there and back": (lambda x: x.view(-1, 24).view(-1, 6, 4).sin(), 1),
    "squeeze of unsqueeze": (lambda x: x.unsqueeze(1).squeeze(1).sin(), 1),
    "permute": (lambda x: x.permute(0, 1, -1).sin(), 1),
    "two transposes": (lambda x: x.transpose(1, 2).transpose(-1, -2).sin(), 1),
    "permutations that cancel": (lambda x: x.permute(1, 2, 0).permute(2, 0, 1).sin(), 1),
    "expand": (lambda x: x.expand(-1, 6, 4).sin(), 1),
    "slice": (lambda x: x[:, 0:6, :].sin(), 1),
    "ellipsis": (lambda x: x[...].sin(), 1),
    "narrow": (lambda x: x.narrow(1, 0, 6).sin(), 1),
    "cat of one": (lambda x: torch.cat([x], 1).sin(), 1),
    "clone": (lambda x: x.clone().sin(), 1),
    "contiguous": (lambda x: x.contiguous().sin(), 1),
    "pad by nothing": (lambda x: F.pad(x, (0, 0, 0, 0)).sin(), 1),
    "a chain": (lambda x: ((x + 0) * 1).view(-1, 6, 4).contiguous().sin(), 4),
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_identities(name: str) -> None:
    function, rewrites = IDENTITIES[name]
    assert simplified(function, sample(2, 6, 4), rewrites) == ["sin"]


def test_relu_of_relu() -> None:
    assert simplified(lambda x: F.relu(F.relu(F.relu(x))), sample(2, 6), 2) == ["relu"]


def test_removes_no_more_than_it_may() -> None:
    x = sample(2, 6, 4)
    for function in (
        lambda x: x.double().sin(),
        lambda x: x + 1,
        lambda x: x * 0,
        lambda x: torch.div(x, 1, rounding_mode="floor"),
        lambda x: 1 / x,
        lambda x: 0 - x,
        lambda x: (x > 0) + 0,
        lambda x: x.detach(),
        lambda x: x[:, 1:],
        lambda x: x[None],
        lambda x: x[:, [1, 0, 2, 3, 4, 5]],
        lambda x: x.transpose(1, 2),
        lambda x: torch.stack([x]),
        lambda x: F.leaky_relu(F.leaky_relu(x)),
        lambda x: x.flip(1),
        lambda x: x.view(-1, 4, 6).transpose(1, 2).sin(),
    ):
        program = fxopt.capture(Function(function).eval(), (x,))
        assert_pass(Simplify(), program, after=program.text(), rewrites=0, skips=[])


def test_a_batch_of_one_proves_nothing() -> None:
    """At a batch of 1, each of these looks as if it changed nothing."""
    x = sample(1, 6)
    for function in (
        lambda x: x.sum(0, keepdim=True).expand(x.shape[0], 6).sin(),
        lambda x: x[:1].sin(),
        lambda x: x.reshape(1, -1).sin(),
        lambda x: x.flatten().unsqueeze(0).sin(),
        lambda x: (x * x.shape[0]).sin(),
    ):
        program = fxopt.capture(Function(function).eval(), (x,))
        assert program.batch is not None
        assert_pass(Simplify(), program, after=program.text())


def test_a_fixed_batch_is_a_fixed_size() -> None:
    assert simplified(lambda x: x.view(2, 6).sin() * x.size(0), sample(2, 6), 2) == ["sin", "mul"]


def test_copies_that_something_needs() -> None:
    x = sample(2, 6, 4)
    assert_skips(
        Simplify(),
        Function(lambda x: x.transpose(1, 2).contiguous().view(-1, 24)).eval(),
        (x,),
        [Skip("contiguous", "view needs the memory layout that contiguous makes")],
    )
    assert_skips(
        Simplify(),
        Function(lambda x: x.transpose(1, 2).contiguous().relu().view(-1, 24)).eval(),
        (x,),
        [Skip("contiguous", "view needs the memory layout that contiguous makes")],
    )
    assert_skips(
        Simplify(),
        Function(lambda x: x.clone()).eval(),
        (x,),
        [Skip("clone", "an output hands out the copy that clone makes")],
    )
    assert_skips(
        Simplify(), Function(lambda x: x + 0).eval(), (x,), [Skip("add", "an output hands out the copy that add makes")]
    )
    assert simplified(lambda x: x.transpose(1, 2).contiguous().exp().sum(2), x, 1) == ["transpose", "exp", "sum"]


def test_reshapes_merge() -> None:
    assert_pass(
        Simplify(),
        Function(lambda x: x.view(-1, 24).view(-1, 2, 12).reshape(x.shape[0], 4, 6)).eval(),
        (sample(2, 6, 4),),
        rewrites=2,
        after="""
            %x = input : f32[2, 6, 4]
            %reshape_1 = reshape(%x, (-1, 4, 6)) : f32[2, 4, 6]
            return (%reshape_1,)
        """,
    )


def test_a_reshape_that_copies_is_not_merged_before_a_view() -> None:
    """transpose-reshape copies; without the reshape, the last view would meet memory that it cannot view."""
    function = lambda x: x.transpose(1, 2).reshape(-1, 24).view(-1, 6, 2, 2).view(-1, 12, 2)  # noqa: E731
    program = assert_pass(Simplify(), Function(function).eval(), (sample(2, 6, 4),))
    assert_equivalent(Function(function), program, program.inputs_with_batch(3), flat=False)


def test_permutations_merge() -> None:
    assert_pass(
        Simplify(),
        Function(lambda x: x.transpose(1, 2).permute(2, 0, 1)).eval(),
        (sample(2, 6, 4),),
        rewrites=1,
        after="""
            %x = input : f32[2, 6, 4]
            %permute_1 = permute(%x, (1, 0, 2)) : f32[6, 2, 4]
            return (%permute_1,)
        """,
    )


def test_duplicates_merge_in_one_plan() -> None:
    def twice(x: Tensor) -> Tensor:
        return torch.sin(x.relu() * 2).exp() + torch.sin(x.relu() * 2).exp()

    program = fxopt.capture(Function(twice).eval(), (sample(2, 6),))
    (plan,) = fxopt.explain(program, passes="simplify")
    assert [rewrite.node for rewrite in plan.rewrites] == ["relu_1", "mul_1", "sin_1", "exp_1"]
    assert simplified(twice, sample(2, 6), 4) == ["relu", "mul", "sin", "exp", "add"]


class Twice(nn.Module):
    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) - self.second(x)


def test_the_same_module_is_called_once() -> None:
    shared = nn.Linear(6, 6)
    assert body(assert_pass(Simplify(), Twice(shared, shared).eval(), (sample(2, 6),), rewrites=1)) == ["linear", "sub"]
    assert body(assert_pass(Simplify(), Twice(nn.ReLU(), nn.ReLU()), (sample(2, 6),), rewrites=1)) == ["relu", "sub"]


def test_what_differs_is_called_twice() -> None:
    x = sample(2, 3, 6, 6)
    for first, second in (
        (nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)),
        (nn.MaxPool2d(3, 1), nn.MaxPool2d(3, 1, dilation=1, padding=0, ceil_mode=True)),
        (nn.LeakyReLU(0.1), nn.LeakyReLU(0.2)),
        (nn.ReLU(), nn.ReLU6()),
    ):
        program = fxopt.capture(Twice(first, second).eval(), (x,))
        assert_pass(Simplify(), program, after=program.text(), rewrites=0)
    for function in (
        lambda x: x.clamp(0, 1) + x.clamp(0, 2),
        lambda x: (x + 1) - (x + True),
        lambda x: F.dropout(x, 0.5, training=True) - F.dropout(x, 0.5, training=True),
        lambda x: torch.rand_like(x) - torch.rand_like(x),
        lambda x: torch.bernoulli(x, 0.5) - torch.bernoulli(x, 0.5),
    ):
        program = fxopt.capture(Function(function).eval(), (x,), frontend="symbolic")
        assert_pass(Simplify(), program, after=program.text(), rewrites=0)


def test_random_and_stateful_calls_are_not_merged_in_training() -> None:
    drop, norm = nn.Dropout(0.5), nn.BatchNorm1d(6)
    for module in (drop, norm):
        program = fxopt.capture(Twice(module, module).train(), (sample(4, 6),))
        after = assert_pass(Simplify(), program, rewrites=0)
        assert after.text() == program.text()
    assert body(assert_pass(Simplify(), Twice(norm, norm).eval(), (sample(4, 6),), rewrites=1)) == ["batch_norm", "sub"]


class Standardized(nn.Module):
    """A convolution whose weight is computed from a parameter, and a table that is looked up at fixed places."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)
        self.table = nn.Parameter(torch.arange(12.0).view(6, 2))
        self.register_buffer("places", torch.tensor([0, 2, 4, 5, 1, 3, 0, 0]))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.conv.weight - self.conv.weight.mean((1, 2, 3), keepdim=True)
        y = F.conv2d(x, weight, self.conv.bias)
        return y + self.table[self.places][:, 0].view(1, 8, 1, 1) * torch.ones(1, 8, 1, 1)


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
def test_constants_fold_and_train(frontend: Frontend) -> None:
    model, x = Standardized().eval(), sample(2, 3, 6, 6)
    program = assert_pass(Simplify(), model, (x,), frontend=frontend, skips=[])
    assert body(program) == ["conv2d", "get_attr", "add"]
    names = [name for name, _ in program.module.named_parameters()]
    assert sorted(names) == ["conv.bias", "conv.weight", "table_folded"]
    assert isinstance(program.module.get_submodule("conv"), nn.Conv2d)
    program.module.train()
    program.module(x).sum().backward()
    assert all(parameter.grad is not None for parameter in program.module.parameters())


def test_golden_fold() -> None:
    assert_pass(
        Simplify(),
        Standardized().eval(),
        (sample(2, 3, 6, 6),),
        rewrites=3,
        after="""
            %x = input : f32[2, 3, 6, 6]
            %conv = conv2d[conv](%x) {3, 8, kernel_size=(1, 1), stride=(1, 1)} : f32[2, 8, 6, 6]
            %table_folded = get_attr[table_folded] : f32[1, 8, 1, 1]
            %add = add(%conv, %table_folded) : f32[2, 8, 6, 6]
            return (%add,)
        """,
    )


def test_frozen_parameters_stay_frozen() -> None:
    model = Standardized().eval().requires_grad_(False)
    program = assert_pass(Simplify(), model, (sample(2, 3, 6, 6),))
    assert isinstance(program.module.get_submodule("conv"), nn.Conv2d)
    assert not any(parameter.requires_grad for parameter in program.module.parameters())


def test_parameters_that_train_are_not_folded() -> None:
    program = fxopt.capture(Standardized().train(), (sample(2, 3, 6, 6),))
    after = assert_pass(
        Simplify(),
        program,
        skips=[
            "computed from conv.weight, which trains: folding would cut it off",
            "computed from table, which trains: folding would cut it off",
        ],
    )
    assert {name for name, _ in after.module.named_parameters()} == {"conv.weight", "conv.bias", "table"}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.embed(x) @ self.embed.weight.exp()


def test_tied_parameters_stay_tied() -> None:
    why = "computed from embed.weight, which embed reads too: folding would untie them"
    assert_skips(Simplify(), Tied().eval(), (sample(2, 6),), [Skip("exp", why)])


def test_large_constants_stay_computed() -> None:
    program = fxopt.capture(
        Function(lambda x: x + torch.ones(6).expand(400000, 6).sum()).eval(), (sample(2, 6),), frontend="export"
    )
    after = assert_pass(Simplify(), program)
    assert body(after) == ["get_attr", "add"]
    large = Function(lambda x: x @ torch.eye(600)).eval()
    program = fxopt.capture(large, (sample(2, 600),), frontend="export")
    why = "constant, but holds 1.4 MiB, and folding would free 0.0 MiB only"
    assert_skips(Simplify(), program, whys=[Skip("eye", why)])


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        return x * (self.count * 2)


def test_state_that_is_written_is_no_constant() -> None:
    program = fxopt.capture(Counting().train(), (sample(2, 6),), frontend="export")
    after = assert_pass(Simplify(), program, rewrites=0)
    assert after.text() == program.text()


def test_numbers_from_data_are_not_sizes() -> None:
    program = fxopt.capture(Function(lambda x: x * x.sum().item()).eval(), (sample(2, 6),), frontend="symbolic")
    assert_pass(Simplify(), program, after=program.text(), rewrites=0)


def test_plan_of_an_earlier_round_survives_what_was_left_out() -> None:
    """Bisection applies any part of a plan: each rewrite must hold without the others."""
    program = fxopt.capture(Block().eval(), (sample(2, 3, 6, 6),))
    (plan,) = fxopt.explain(program, passes="simplify")
    for left_out in range(len(plan.rewrites)):
        partial = program.copy()
        for index, rewrite in enumerate(plan.rewrites):
            if index != left_out:
                Simplify().apply(partial, rewrite)
        assert_equivalent(program, partial, program.inputs_with_batch(3), flat=True)


TORCHVISION = {
    "densenet121": (64, 433, 429),
    "googlenet": (64, 199, 198),
    "shufflenet_v2_x0_5": (64, 369, 305),
}


def torchvision_model(name: str) -> nn.Module:
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    if name == "vit":
        return models.VisionTransformer(32, 8, 2, 4, 64, 128, num_classes=10)  # type: ignore[no-any-return]
    if name == "swin":
        return models.SwinTransformer([4, 4], 16, [2, 2], [2, 4], [4, 4], num_classes=10)  # type: ignore[no-any-return]
    options = {"init_weights": False} if name == "googlenet" else {}
    return getattr(models, name)(weights=None, **options)  # type: ignore[no-any-return]


def check(model: nn.Module, size: int, frontend: Frontend) -> tuple[int, int]:
    """Nodes before and after, with the outputs at three batch sizes compared."""
    program = fxopt.capture(model, (sample(2, 3, size, size),), frontend=frontend)
    assert program.batch is not None
    after = fxopt.PassManager(Simplify(), on_failure="raise", on_no_match="ignore").run(program)
    assert not fxopt.explain(after, passes="simplify")[0].rewrites
    for batch in () if program.training else (1, 3, 5):
        assert_equivalent(program, after, program.inputs_with_batch(batch, seed=batch), flat=True)
    return len(program.nodes), len(after.nodes)


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name: str) -> None:
    size, before, after = TORCHVISION[name]
    assert check(torchvision_model(name).eval(), size, "symbolic") == (before, after)


@pytest.mark.parametrize(("name", "size"), [("vit", 32), ("swin", 32)])
def test_torchvision_by_export(name: str, size: int) -> None:
    before, after = check(torchvision_model(name).eval(), size, "export")
    assert after < before


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
def test_torchvision_in_training(frontend: Frontend) -> None:
    check(torchvision_model("vit").train(), 32, frontend)


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
def test_standardized_convolutions_of_timm_become_modules(frontend: Frontend) -> None:
    resnetv2 = pytest.importorskip("timm.models.resnetv2")
    model = resnetv2.ResNetV2(layers=(1, 1), channels=(128, 256), stem_chs=32, num_classes=10).eval()
    standardized = [module for module in model.modules() if "Std" in type(module).__name__]
    program = fxopt.capture(model, (sample(2, 3, 32, 32),), frontend=frontend)
    after = fxopt.PassManager(Simplify(), on_failure="raise").run(program)
    convolutions = [node for node in after.nodes if after.op(node) == "conv2d"]
    assert len(convolutions) == len(standardized) + 1  # and the classifier
    assert len(standardized) > 6
    assert all(isinstance(after.module_of(node), nn.Conv2d) for node in convolutions)
    assert {name for name, _ in after.module.named_parameters()} == {name for name, _ in model.named_parameters()}
    for batch in (1, 3, 5):
        assert_equivalent(program, after, program.inputs_with_batch(batch, seed=batch), flat=True)
