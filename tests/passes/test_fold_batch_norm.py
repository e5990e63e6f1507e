"""`fold_batch_norm`: what it folds, what it refuses, and that folding is exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from fxopt.passes import FoldBatchNorm
from fxopt.testing import assert_equivalent, assert_pass, assert_skips

DIMENSIONS = {1: (nn.Conv1d, nn.ConvTranspose1d, nn.BatchNorm1d), 2: (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d)}
DIMENSIONS[3] = (nn.Conv3d, nn.ConvTranspose3d, nn.BatchNorm3d)


def seasoned(model: nn.Module) -> nn.Module:
    """The model in evaluation mode, with statistics as training leaves them."""
    generator = torch.Generator().manual_seed(7)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            assert module.running_var is not None
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator))
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
            if module.affine:
                module.weight.data.copy_(torch.randn(module.num_features, generator=generator))
                module.bias.data.copy_(torch.randn(module.num_features, generator=generator))
    return model.eval()


def sample(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)


def folds_exactly(model: nn.Module, x: torch.Tensor, rewrites: int = 1, **options: Any) -> fxopt.Program:
    program = assert_pass(FoldBatchNorm(**options), model, (x,), rewrites=rewrites, skips=[], tolerance=1e-12)
    assert not any(program.op(node) == "batch_norm" for node in program.nodes)
    return program


def test_golden() -> None:
    model = seasoned(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()))
    program = assert_pass(
        FoldBatchNorm(),
        model,
        (sample(1, 3, 6, 6, dtype=torch.float32),),
        before="""
            %input_1 = input : f32[1, 3, 6, 6]
            %_0 = conv2d[0](%input_1) {3, 4, kernel_size=(3, 3), stride=(1, 1), bias=False} : f32[1, 4, 4, 4]
            %_1 = batch_norm[1](%_0) {4, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True} : f32[1, 4, 4, 4]
            %_2 = relu[2](%_1) : f32[1, 4, 4, 4]
            return (%_2,)
        """,  # noqa: E501 (golden text)
        after="""
            %input_1 = input : f32[1, 3, 6, 6]
            %_0 = conv2d[0](%input_1) {3, 4, kernel_size=(3, 3), stride=(1, 1)} : f32[1, 4, 4, 4]
            %_2 = relu[2](%_0) : f32[1, 4, 4, 4]
            return (%_2,)
        """,
        rewrites=1,
        skips=[],
    )
    assert sorted(dict(program.module.named_parameters())) == ["0.bias", "0.weight"]


@pytest.mark.parametrize("dimension", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_batch_norm_behind_a_convolution(
    dimension: int, transposed: bool, groups: int, bias: bool, affine: bool
) -> None:
    convolution, transpose, norm = DIMENSIONS[dimension]
    layer: Any = transpose if transposed else convolution
    model = nn.Sequential(layer(4, 6, 3, stride=2, padding=1, groups=groups, bias=bias), norm(6, affine=affine))
    folds_exactly(seasoned(model).double(), sample(2, 4, *[7] * dimension))


@pytest.mark.parametrize("dimension", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_batch_norm_before_a_convolution(dimension: int, groups: int, bias: bool) -> None:
    convolution, _, norm = DIMENSIONS[dimension]
    model = nn.Sequential(nn.ReLU(), norm(4), convolution(4, 6, 3, stride=2, groups=groups, bias=bias))
    folds_exactly(seasoned(model).double(), sample(2, 4, *[7] * dimension))


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_batch_norm_before_a_convolution_that_pads_with_values(mode: str) -> None:
    model = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=1, padding_mode=mode))
    folds_exactly(seasoned(model).double(), sample(2, 4, 7, 7))


def test_batch_norm_before_a_convolution_that_pads_with_zeros() -> None:
    model = seasoned(nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding="same"))).double()
    assert_skips(
        FoldBatchNorm(), model, sample(2, 4, 7, 7), ["behind an input; 1 pads with zeros, which BatchNorm would shift"]
    )


def test_batch_norm_that_shifts_nothing_may_stand_before_zero_padding() -> None:
    norm = nn.BatchNorm2d(4, affine=False)
    assert norm.running_var is not None
    norm.running_var.fill_(3.0)
    folds_exactly(nn.Sequential(norm, nn.Conv2d(4, 6, 3, padding=1)).double().eval(), sample(2, 4, 7, 7))
    transposed = nn.Sequential(norm, nn.ConvTranspose2d(4, 6, 3, groups=2)).double().eval()
    folds_exactly(transposed, sample(2, 4, 7, 7))


@pytest.mark.parametrize("order", ["behind", "before"])
def test_linear(order: str) -> None:
    layers = [nn.Linear(5, 5), nn.BatchNorm1d(5)]
    folds_exactly(seasoned(nn.Sequential(*(layers if order == "behind" else layers[::-1]))).double(), sample(3, 5))


def test_linear_over_sequences_keeps_its_batch_norm() -> None:
    model = seasoned(nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(4))).double()
    assert_skips(FoldBatchNorm(), model, sample(2, 4, 5), ["the channels of 0 are not on axis 1; before an output"])


def test_identities_and_dropout_may_stand_between() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Identity(), nn.Dropout2d(0.5), nn.BatchNorm2d(4))
    folds_exactly(seasoned(model).double(), sample(2, 3, 5, 5))


def test_chain_of_batch_norms() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    folds_exactly(seasoned(model).double(), sample(2, 3, 5, 5), rewrites=3)


def test_batch_norm_between_two_convolutions_goes_into_the_first() -> None:
    model = seasoned(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 1))).double()
    program = folds_exactly(model, sample(2, 3, 5, 5))
    assert program.report.passes[0].rewrites[0].what == "fold into 0 before it"


def test_batch_norm_before_two_convolutions_goes_into_both() -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.left, self.right = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 3)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            x = self.norm(x)
            return self.left(x), self.right(x)

    program = folds_exactly(seasoned(Fork()).double(), sample(2, 3, 5, 5))
    assert program.report.passes[0].rewrites[0].what == "fold into left, right behind it"


def test_training_mode_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).double()
    assert_skips(FoldBatchNorm(), model, sample(2, 3, 5, 5), ["1 is in training mode: call model.eval() first"])


def test_missing_statistics_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)).double().eval()
    why = "1 has no running statistics: it normalises by the batch at hand"
    assert_skips(FoldBatchNorm(), model, sample(2, 3, 5, 5), [why])


def test_second_user_of_the_convolution_is_refused() -> None:
    class Peek(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.conv(x)
            return x + self.norm(x)

    assert_skips(
        FoldBatchNorm(), seasoned(Peek()).double(), sample(2, 3, 5, 5), ["output of conv has 2 users; before add"]
    )


class SharedConvolution(nn.Module):
    """conv -> norm1 -> the same conv -> norm2, which torch.fx's own fusion gets wrong (pytorch#104593)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm1, self.norm2 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm2(self.conv(self.norm1(self.conv(x))))


def test_shared_convolution_is_refused() -> None:
    why = "conv is called at 2 places"
    model = seasoned(SharedConvolution()).double()
    assert_skips(FoldBatchNorm(), model, sample(2, 3, 5, 5), [f"{why}; {why}", f"{why}; before an output"])


def test_shared_convolution_is_cloned_on_request() -> None:
    program = folds_exactly(seasoned(SharedConvolution()).double(), sample(2, 3, 5, 5), rewrites=2, clone_shared=True)
    assert program.cost().params == 2 * (9 + 3)


def test_shared_batch_norm_is_folded_at_each_call() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.norm = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.second(self.norm(self.first(x)).relu()))

    folds_exactly(seasoned(Shared()).double(), sample(2, 3, 5, 5), rewrites=2)


def test_tied_weights_are_untied_where_one_is_folded() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 1))
    model[3].weight = model[0].weight
    folds_exactly(seasoned(model).double(), sample(2, 3, 5, 5))


def test_weights_that_would_overflow_are_refused() -> None:
    model = seasoned(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    model[1].weight.data.fill_(float("inf"))
    why = "the weights of 0 would not be finite; before an output"
    program = fxopt.capture(model, sample(2, 3, 5, 5, dtype=torch.float32))
    assert [skip.why for skip in fxopt.explain(program, passes="fold_batch_norm")[0].skips] == [why]


def test_half_precision_keeps_its_dtype() -> None:
    model = seasoned(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))).to(torch.bfloat16)
    program = assert_pass(FoldBatchNorm(), model, (sample(2, 3, 5, 5, dtype=torch.bfloat16),), rewrites=1)
    assert {parameter.dtype for parameter in program.module.parameters()} == {torch.bfloat16}


def test_frozen_layers_stay_frozen_and_others_train() -> None:
    model = seasoned(nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1, bias=False)))
    model.append(nn.BatchNorm2d(4)).eval()
    for parameter in model[0].parameters():
        parameter.requires_grad = False
    program = fxopt.optimize(model, sample(2, 3, 5, 5, dtype=torch.float32), "fold_batch_norm")
    trains = {name: parameter.requires_grad for name, parameter in program.module.named_parameters()}
    assert trains == {"0.weight": False, "0.bias": False, "2.weight": True, "2.bias": True}
    program.module(sample(2, 3, 5, 5, dtype=torch.float32)).sum().backward()
    assert all(parameter.grad is not None for parameter in program.module.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
@pytest.mark.parametrize(("name", "folded"), [("resnet18", 20), ("mobilenet_v2", 52), ("densenet121", 59)])
def test_torchvision(name: str, folded: int, frontend: Any) -> None:
    models = pytest.importorskip("torchvision").models
    torch.manual_seed(0)
    model = seasoned(models.get_model(name, weights=None))
    x = sample(2, 3, 64, 64, dtype=torch.float32)
    program = fxopt.optimize(model, (x,), "fold_batch_norm", frontend=frontend, on_failure="raise")
    assert len(program.report.passes[0].rewrites) == folded
    assert_equivalent(model, program, (x,))


def test_who_asks_for_the_shape_only_is_no_user() -> None:
    class Shaped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.last = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
            self.out = nn.Conv2d(4, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.conv(x)
            y = self.norm(x).relu() * x.shape[1]
            z = self.last(y)
            return self.out(z).reshape(z.size(0), z.shape[1], -1)

    folds_exactly(seasoned(Shaped()).double(), sample(2, 3, 5, 5), rewrites=2)
