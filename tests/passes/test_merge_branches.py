"""`merge_branches`: what it merges, what it refuses, and that merging is exact."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt.passes import FoldBatchNorm, MergeBranches, Simplify
from fxopt.testing import assert_equivalent, assert_pass, assert_skips

CONVOLUTIONS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class Added(nn.Module):
    """`combine(outputs, x)` of branches that all read `relu(x)`; the sum of the outputs by default."""

    def __init__(self, *branches: nn.Module, combine: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.combine = combine

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(x)
        outputs = [branch(x) for branch in self.branches]
        if self.combine is not None:
            return self.combine(outputs, x)
        total = outputs[0]
        for output in outputs[1:]:
            total = total + output
        return total


def seasoned(model: nn.Module) -> nn.Module:
    """The model in evaluation mode, with statistics as training leaves them."""
    generator = torch.Generator().manual_seed(7)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            assert module.running_var is not None
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator) * 0.2)
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
            if module.affine:
                module.weight.data.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
                module.bias.data.copy_(torch.randn(module.num_features, generator=generator) * 0.2)
    return model.eval()


def sample(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)


def merges(model: nn.Module, x: Tensor, *, rewrites: int = 1, layers: int = 1, sums: int = 0) -> fxopt.Program:
    """The pass must leave so many layers and sums, and no error in float64."""
    program = assert_pass(MergeBranches(), seasoned(model).double(), (x.double(),), rewrites=rewrites, tolerance=1e-12)
    operators = [program.op(node) for node in program.nodes]
    found = sum(item.startswith("conv") or item == "linear" for item in operators)
    assert (found, operators.count("add") + operators.count("sub")) == (layers, sums), program.text()
    assert "batch_norm" not in operators
    return program


def conv(inputs: int, outputs: int, size: int, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=options.pop("padding", size // 2), **options)


def test_golden() -> None:
    model = seasoned(
        Added(
            nn.Sequential(conv(4, 4, 1, bias=False), nn.BatchNorm2d(4)),
            nn.Sequential(conv(4, 4, 3, bias=False), nn.BatchNorm2d(4)),
            nn.BatchNorm2d(4),
        )
    )
    norm = "{4, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True} : f32[1, 4, 6, 6]"
    small = "{4, 4, kernel_size=(1, 1), stride=(1, 1), bias=False} : f32[1, 4, 6, 6]"
    large = "{4, 4, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), bias=False} : f32[1, 4, 6, 6]"
    program = assert_pass(
        MergeBranches(),
        model,
        (sample(1, 4, 6, 6, dtype=torch.float32),),
        before=f"""
            %x = input : f32[1, 4, 6, 6]
            %relu = relu(%x) : f32[1, 4, 6, 6]
            %branches_0_0 = conv2d[branches.0.0](%relu) {small}
            %branches_0_1 = batch_norm[branches.0.1](%branches_0_0) {norm}
            %branches_1_0 = conv2d[branches.1.0](%relu) {large}
            %branches_1_1 = batch_norm[branches.1.1](%branches_1_0) {norm}
            %branches_2 = batch_norm[branches.2](%relu) {norm}
            %add = add(%branches_0_1, %branches_1_1) : f32[1, 4, 6, 6]
            %add_1 = add(%add, %branches_2) : f32[1, 4, 6, 6]
            return (%add_1,)
        """,
        after=f"""
            %x = input : f32[1, 4, 6, 6]
            %relu = relu(%x) : f32[1, 4, 6, 6]
            %branches_1_0 = conv2d[branches.1.0](%relu) {large.replace(", bias=False", "")}
            return (%branches_1_0,)
        """,
        rewrites=1,
        skips=[],
    )
    what = "merge branches.0.0, branches.1.0 and the identity of relu into one 3x3 convolution"
    assert program.report.passes[-1].rewrites[0].what == what


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_all_orders_and_dimensions(dimensions: int, order: tuple[int, ...]) -> None:
    layer = CONVOLUTIONS[dimensions]
    branches = [layer(4, 4, 3, padding=1), layer(4, 4, 1, bias=False), nn.Identity()]
    program = merges(Added(*(branches[index] for index in order)), sample(2, 4, *(5,) * dimensions))
    module = next(module for module in program.module.modules() if isinstance(module, layer))
    assert module.kernel_size == (3,) * dimensions


@pytest.mark.parametrize("large", [3, 7])
@pytest.mark.parametrize("small", [1, 3])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("groups", [(1, 1), (2, 2), (4, 4), (1, 2), (1, 4), (2, 4)])
def test_sizes_strides_groups(large: int, small: int, stride: int, groups: tuple[int, int]) -> None:
    model = Added(
        conv(4, 8, large, stride=stride, groups=groups[0]),
        conv(4, 8, small, stride=stride, groups=groups[1], bias=False),
    )
    program = merges(model, sample(2, 4, 9, 8))
    module = program.module.get_submodule("branches.0")
    assert isinstance(module, nn.Conv2d)
    assert (module.kernel_size, module.groups, module.stride) == ((large, large), groups[0], (stride, stride))


@pytest.mark.parametrize(
    ("first", "second", "result"),
    [
        ({"kernel_size": 3, "dilation": 2, "padding": 2}, {"kernel_size": 1}, "kernel_size=(3, 3), dilation 2"),
        ({"kernel_size": 5, "padding": 2}, {"kernel_size": 3, "dilation": 2, "padding": 2}, "kernel_size=(5, 5)"),
        ({"kernel_size": 9, "padding": 4}, {"kernel_size": 3, "dilation": 3, "padding": 3}, "kernel_size=(9, 9)"),
        ({"kernel_size": 3, "padding": "same"}, {"kernel_size": 1, "padding": "valid"}, "kernel_size=(3, 3)"),
        ({"kernel_size": 4, "padding": "same"}, {"kernel_size": 2, "padding": "same"}, "kernel_size=(4, 4)"),
        ({"kernel_size": 4, "padding": "same"}, {"kernel_size": 1}, "kernel_size=(4, 4)"),
        ({"kernel_size": 4, "padding": "same"}, {"kernel_size": 3, "padding": 1}, "kernel_size=(4, 4)"),
        ({"kernel_size": 4, "padding": "same"}, {"kernel_size": 5, "padding": 2}, "kernel_size=(5, 5)"),
        ({"kernel_size": 2, "padding": "same", "dilation": 3}, {"kernel_size": 4, "padding": "same"}, "(4, 4)"),
        ({"kernel_size": 3}, {"kernel_size": 3}, "kernel_size=(3, 3)"),
        ({"kernel_size": 4, "padding": 1}, {"kernel_size": 2}, "kernel_size=(4, 4)"),
        ({"kernel_size": (3, 5), "padding": (1, 2)}, {"kernel_size": (1, 3), "padding": (0, 1)}, "(3, 5)"),
        ({"kernel_size": 1, "padding": 1}, {"kernel_size": 3, "padding": 2}, "kernel_size=(3, 3)"),
        (
            {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
            {"kernel_size": 1, "padding_mode": "reflect"},
            None,
        ),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_dilations_and_paddings(first: dict[str, Any], second: dict[str, Any], result: str | None) -> None:
    model = Added(nn.Conv2d(2, 3, **first), nn.Conv2d(2, 3, **second)).double().eval()
    if result is None:
        assert_skips(
            MergeBranches(), model, (sample(1, 2, 12, 11),), ["branches.0 pads with 'circular', not with zeros"]
        )
        return
    text = merges(model, sample(1, 2, 12, 11)).text()
    if result.endswith("dilation 2"):
        assert "dilation=(2, 2)" in text
    assert result.partition(", dilation")[0] in text


def test_asymmetric_kernels() -> None:
    def branches() -> list[nn.Module]:
        return [
            nn.Conv2d(4, 4, (1, 3), padding=(0, 1)),
            nn.Conv2d(4, 4, (3, 1), padding=(1, 0)),
            nn.Conv2d(4, 4, 3, padding=1),
        ]

    merges(Added(*branches()), sample(2, 4, 7, 7))
    # without the square kernel the identity has room in one of the two, and no more
    merges(Added(*branches()[:2], nn.Identity()), sample(2, 4, 7, 7), layers=2, sums=1)
    why = "one 3x3 convolution would cost more than the branches: 144 multiply-accumulates per position instead of 96"
    assert_skips(MergeBranches(), Added(*branches()[:2]).eval(), (sample(2, 4, 7, 7).float(),), [why])


def test_two_sets_of_branches_in_one_sum() -> None:
    """Costliest first, what does not pay stays; another round finds the second set."""
    model = Added(
        nn.Conv2d(4, 4, (1, 5), padding=(0, 2)),
        nn.Conv2d(4, 4, (5, 1), padding=(2, 0)),
        nn.Conv2d(4, 4, (1, 3), padding=(0, 1)),
        nn.Conv2d(4, 4, (3, 1), padding=(1, 0)),
    )
    merges(model, sample(1, 4, 7, 7), rewrites=2, layers=2, sums=1)


@pytest.mark.parametrize("spatial", [(), (5,), (5, 3)])
def test_linear_layers(spatial: tuple[int, ...]) -> None:
    branches = [nn.Linear(6, 6), nn.Linear(6, 6, bias=False), nn.Identity()]
    merges(Added(*branches), sample(2, *spatial, 6))
    merges(Added(branches[0], nn.Identity(), combine=lambda y, x: 2 * x - y[0] / 4 + y[1]), sample(2, *spatial, 6))
    if not spatial:
        merges(Added(branches[0], nn.BatchNorm1d(6)), sample(2, 6))


COMBINATIONS: dict[str, Callable[..., Tensor]] = {
    "builtin sum": lambda y, _: sum(y),
    "sub": lambda y, _: y[0] - y[1],
    "difference below": lambda y, x: x - (y[0] - y[1]),
    "alpha": lambda y, _: torch.add(y[0], y[1], alpha=0.3),
    "sub with alpha": lambda y, _: y[0].sub(y[1], alpha=2),
    "scales": lambda y, x: 0.5 * y[0] + y[1] / 3 - x * 2,
    "negation": lambda y, _: -(y[0] + -y[1]),
    "constants": lambda y, _: 1 - y[0] + (y[1] + 2.5),
    "in place": lambda y, _: y[0].add_(y[1]),
    "dropout": lambda y, _: nn.functional.dropout(y[0], training=False) + y[1],
    "all of it": lambda y, x: 2 * (x - 0.5 * (y[0] - (y[1] + 1) / 4)),
    "twice": lambda y, x: (y[0] + y[1]) + (x + x),
    "nested": lambda y, x: (y[0] + x) * 0.5 + (x - y[1]) * 2,
}


@pytest.mark.parametrize("name", COMBINATIONS)
def test_combinations(name: str) -> None:
    merges(Added(conv(4, 4, 3, bias=False), conv(4, 4, 1), combine=COMBINATIONS[name]), sample(2, 4, 6, 6))


class LayerScale(nn.Module):
    """x + gamma * (mixer(x) - norm(x)), as in RepMixer (FastViT)."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.mixer = nn.Sequential(conv(6, 6, 3, groups=6, bias=False), nn.BatchNorm2d(6))
        self.norm = nn.BatchNorm2d(6)
        self.gamma = nn.Parameter(torch.rand(shape))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma.view(-1, 1, 1) * (self.mixer(x) - self.norm(x))


@pytest.mark.parametrize("shape", [(6,), (6, 1, 1), (1,)])
def test_scale_per_channel(shape: tuple[int, ...]) -> None:
    program = merges(LayerScale(shape), sample(2, 6, 6, 6))
    assert not [name for name, _ in program.module.named_parameters() if "gamma" in name]


def test_norm_behind_the_sum() -> None:
    merges(nn.Sequential(Added(conv(4, 4, 3), nn.Identity()), nn.BatchNorm2d(4)), sample(2, 4, 6, 6))


def test_norms_without_affine_and_frozen_in_training() -> None:
    model = Added(conv(4, 4, 3), nn.BatchNorm2d(4, affine=False))
    merges(copy.deepcopy(model), sample(2, 4, 6, 6))
    model.branches[1].eval()
    assert model.training
    assert_pass(MergeBranches(), model.double(), (sample(2, 4, 6, 6),), rewrites=1, tolerance=1e-12)


def test_rest_of_a_sum_stays_in_order() -> None:
    model = Added(conv(4, 4, 1), conv(4, 4, 3), combine=lambda y, x: x.sigmoid() - y[0] + x.exp() + y[1] - x.tanh())
    program = merges(model, sample(2, 4, 6, 6), sums=3)
    values = [program.op(node) for node in program.nodes]
    assert [item for item in values if item in ("add", "sub")] == ["add", "add", "sub"]
    assert [node.args[1].name for node in program.nodes if program.op(node) in ("add", "sub")][1:] == ["exp", "tanh"]
    first = next(node for node in program.nodes if program.op(node) == "add")
    assert [item.name for item in first.all_input_nodes] == ["sigmoid", "branches_1"]


def test_constants_that_are_not_one_per_channel() -> None:
    class Spatial(Added):
        def __init__(self) -> None:
            super().__init__(conv(4, 4, 3), conv(4, 4, 1))
            self.register_buffer("mask", torch.rand(6))

        def forward(self, x: Tensor) -> Tensor:
            return self.branches[0](x) + self.branches[1](x) * self.mask

    assert_skips(
        MergeBranches(), Spatial().eval(), (sample(1, 4, 6, 6).float(),), ["a constant is not one per channel"]
    )


def test_norm_behind_a_sum_of_several_values() -> None:
    model = Added(conv(4, 4, 1), conv(4, 4, 3), combine=lambda y, x: y[0] + y[1] + x.tanh())
    program = assert_pass(
        MergeBranches(),
        seasoned(nn.Sequential(model, nn.BatchNorm2d(4))),
        (sample(2, 4, 6, 6).float(),),
        rewrites=1,
        skips=["the branches read different values: relu, tanh"],
    )
    assert [program.op(node) for node in program.nodes].count("batch_norm") == 1


def test_scaled_rest_of_a_sum() -> None:
    model = Added(conv(4, 4, 1), conv(4, 4, 3), combine=lambda y, x: torch.add(y[0], x.exp(), alpha=0.5) + y[1])
    merges(model, sample(2, 4, 6, 6), sums=1)


def test_blocks_in_a_row_without_activation() -> None:
    """The sum of one block is the input, and a branch, of the next."""

    class Row(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(conv(4, 4, size) for size in (3, 1, 3, 1))

        def forward(self, x: Tensor) -> Tensor:
            x = self.layers[0](x) + self.layers[1](x) + x
            return self.layers[2](x) + self.layers[3](x) + x

    merges(Row(), sample(2, 4, 6, 6), rewrites=2, layers=2)


def test_a_layer_called_elsewhere_stays_there() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.other = conv(4, 4, 3), conv(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.shared(x))
            return self.shared(x) + self.other(x)

    model = Shared().double().eval()
    program = merges(model, sample(2, 4, 6, 6), layers=2)
    assert torch.equal(program.module.get_submodule("shared").weight, model.shared.weight)


def test_a_layer_called_twice_in_the_sum() -> None:
    shared = conv(4, 4, 3)
    merges(Added(shared, shared), sample(2, 4, 6, 6))


def test_what_the_layers_had_is_kept() -> None:
    model = Added(conv(4, 4, 3, bias=False), conv(4, 4, 1, bias=False)).to(torch.bfloat16)
    model.requires_grad_(False)
    program = assert_pass(MergeBranches(), model.eval(), (sample(1, 4, 6, 6, dtype=torch.bfloat16),), rewrites=1)
    merged = program.module.get_submodule("branches.0")
    assert isinstance(merged, nn.Conv2d)
    assert merged.bias is None
    assert merged.weight.dtype == torch.bfloat16
    assert not merged.weight.requires_grad
    model.branches[0].requires_grad_(True)
    program = fxopt.optimize(model, (sample(1, 4, 6, 6, dtype=torch.bfloat16),), MergeBranches())
    assert program.module.get_submodule("branches.0").weight.requires_grad


def test_random_state_is_left_alone() -> None:
    program = fxopt.capture(Added(conv(4, 4, 3), conv(4, 4, 1)).eval(), (sample(1, 4, 6, 6).float(),))
    rewrite = next(iter(MergeBranches().plan(program)))
    state = torch.random.get_rng_state()
    MergeBranches().apply(program, rewrite)
    assert torch.equal(state, torch.random.get_rng_state())


class TwoUsers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(4, 4, 3), conv(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.a(x)
        return torch.relu(first) * (first + self.b(x))


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.weight = conv(4, 4, 1), nn.Parameter(torch.randn(4, 4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + nn.functional.conv2d(x, self.weight * x.mean())


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(4, 4, 3), conv(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(torch.relu(self.a(x)))


REFUSED: dict[str, tuple[nn.Module, str]] = {
    "two users": (TwoUsers(), "the output of a has 2 users"),
    "residual": (Residual(), "the branches read different values: x, relu"),
    "computed weight": (Functional(), "conv2d is a function of a computed weight, not a module"),
    "strides": (
        Added(conv(4, 4, 3, stride=2, padding=7), conv(4, 4, 1)),
        "strides differ: (2, 2) and (1, 1)",
    ),
    "paddings": (
        Added(conv(4, 4, 4, stride=2, padding=1), conv(4, 4, 3, stride=2, padding=1)),
        "paddings do not line up: at stride 1 the outputs would be larger than the input by (-1, -1) and (0, 0)",
    ),
    "depthwise and dense": (
        Added(conv(4, 4, 3, groups=4), conv(4, 4, 1)),
        "one 3x3 convolution would cost more than the branches: 144 multiply-accumulates per position instead of 52",
    ),
    "transposed": (
        Added(conv(4, 4, 3), nn.ConvTranspose2d(4, 4, 3, padding=1)),
        "branches.1 is a transposed convolution",
    ),
    "no statistics": (
        Added(conv(4, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)),
        "branches.1 has no running statistics: it normalises by the batch at hand",
    ),
    "kinds": (
        Added(nn.Linear(12, 12), conv(4, 4, 3)),
        "a convolution and a linear layer work on different axes",
    ),
    "channel axis": (
        Added(nn.Sequential(nn.Linear(12, 12), nn.BatchNorm2d(4)), nn.Linear(12, 12)),
        "a constant is not one per channel",
    ),
    "activation": (
        Added(nn.Linear(12, 12), combine=lambda y, x: y[0] + x.sigmoid()),
        "the branches read different values: relu, sigmoid",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    model, why = REFUSED[name]
    assert_skips(MergeBranches(), copy.deepcopy(model).eval(), (sample(1, 4, 12, 12).float(),), [why])


def test_training_mode_is_refused() -> None:
    model = Added(conv(4, 4, 3), nn.Sequential(conv(4, 4, 1), nn.BatchNorm2d(4)), nn.BatchNorm2d(4))
    assert_skips(
        MergeBranches(),
        Added(model.branches[0], model.branches[2]),
        (sample(2, 4, 6, 6).float(),),
        ["branches.1 is in training mode: call model.eval() first"],
    )
    # what does not normalise merges nevertheless
    program = assert_pass(
        MergeBranches(), Added(conv(4, 4, 1), *model.branches), (sample(2, 4, 6, 6).float(),), rewrites=1
    )
    assert "batch_norm" in [program.op(node) for node in program.nodes]


@pytest.mark.parametrize(
    "combine",
    [
        lambda _, x: x + x,
        lambda _, x: x + 0.5 * x,
        lambda y, _: torch.cat([y[0], y[1]], 1),
        lambda y, _: y[0] * y[1],
        lambda y, _: y[0] * 2 + 1,
        lambda y, _: torch.maximum(y[0], y[1]),
        lambda y, _: y[0] + y[1].mean(1, keepdim=True),
    ],
)
def test_no_candidate(combine: Callable[..., Tensor]) -> None:
    assert_skips(
        MergeBranches(), Added(conv(4, 4, 3), conv(4, 4, 1), combine=combine).eval(), (sample(1, 4, 6, 6).float(),)
    )


def test_resnet_has_no_parallel_branches() -> None:
    from torchvision.models import resnet50

    passes = [Simplify(), FoldBatchNorm(), MergeBranches()]
    program = fxopt.optimize(resnet50().eval(), (sample(1, 3, 64, 64).float(),), passes, on_no_match="ignore")
    report = program.report.passes[-1]
    assert not report.rewrites
    assert len(report.skips) == 16
    assert all(skip.why.startswith("the branches read different values: ") for skip in report.skips)


def counts(model: nn.Module) -> tuple[int, int]:
    """Convolutions and linear layers; normalisations."""
    modules = list(model.modules())
    return (
        sum(isinstance(module, nn.Conv2d | nn.Linear) for module in modules),
        sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in modules),
    )


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
@pytest.mark.parametrize(
    "name",
    [
        "repvgg_a0",
        pytest.param("repvit_m0_9", marks=pytest.mark.slow),
        pytest.param("fastvit_t8", marks=pytest.mark.slow),
        pytest.param("mobileone_s0", marks=pytest.mark.slow),
    ],
)
def test_as_few_layers_as_the_models_own_reparameterization(name: str, frontend: Any) -> None:
    import timm
    from timm.utils.model import reparameterize_model

    model = seasoned(timm.create_model(name, num_classes=10))
    x = sample(1, 3, 64, 64, dtype=torch.float32)
    program = fxopt.optimize(model, (x,), "default", frontend=frontend, on_no_match="ignore", on_failure="raise")
    peer = reparameterize_model(model)
    assert counts(program.module)[0] == counts(peer)[0] < counts(model)[0]
    assert counts(program.module)[1] == 0
    assert_equivalent(peer, program, (x,), tolerance=1e-4)
