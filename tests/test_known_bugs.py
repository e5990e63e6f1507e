"""Bugs that other tools have or had: each must not be ours."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import fxopt
from fxopt import NoMatchWarning, edit
from fxopt.passes import FoldBatchNorm
from fxopt.testing import assert_equivalent, assert_pass, assert_skips
from fxopt.verify import check_shapes, check_structure

IMAGE = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TOLERANCE = 1e-9


def conv() -> nn.Conv2d:
    return nn.Conv2d(4, 4, 3, padding=1)


def norm(eps: float = 1e-5) -> nn.BatchNorm2d:
    module = nn.BatchNorm2d(4, eps=eps)
    nn.init.uniform_(module.running_mean, -1, 1)  # type: ignore[arg-type]
    nn.init.uniform_(module.running_var, 0.3, 2)  # type: ignore[arg-type]
    nn.init.uniform_(module.weight, 0.5, 2)
    nn.init.uniform_(module.bias, -1, 1)
    return module


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# 1. torch.fx.experimental.optimization.fuse folds into modules that are used elsewhere (pytorch#104593, #197539).


class OneConvolutionTwoNorms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm1, self.norm2 = conv(), norm(), norm()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm2(self.conv(self.norm1(self.conv(x))))


class OneNormTwoConvolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.norm = conv(), conv(), norm()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv2(self.norm(self.conv1(x))))


class SecondUser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = conv(), norm()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        return self.norm(y) + y


def double(model: nn.Module) -> nn.Module:
    return model.eval().double()


def test_a_convolution_called_twice_is_not_folded_into() -> None:
    model = double(OneConvolutionTwoNorms())
    result = assert_pass(FoldBatchNorm(), model, IMAGE, rewrites=0)
    assert all("called at 2 places" in skip.why for skip in result.report.passes[0].skips)
    assert len(result.report.passes[0].skips) == 2


def test_a_convolution_called_twice_is_cloned_if_asked() -> None:
    model = double(OneConvolutionTwoNorms())
    result = assert_pass(FoldBatchNorm(clone_shared=True), model, IMAGE, rewrites=2)
    assert_equivalent(model, result, IMAGE, tolerance=TOLERANCE)


def test_a_norm_called_twice_is_folded_twice() -> None:
    model = double(OneNormTwoConvolutions())
    result = assert_pass(FoldBatchNorm(), model, IMAGE, rewrites=2)
    assert_equivalent(model, result, IMAGE, tolerance=TOLERANCE)


def test_a_convolution_whose_output_has_a_second_user_is_left_alone() -> None:
    model = double(SecondUser())
    assert_skips(FoldBatchNorm(), model, IMAGE, ["output of conv has 2 users; before add"])


# 2. subgraph_rewriter: submodules of pattern and replacement that share a name: the old one silently wins.


def test_a_new_module_never_hides_behind_an_old_name() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.relu = conv(), nn.ReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.relu(self.conv(x))

    program = fxopt.capture(double(Named()), IMAGE)
    replacement = conv().double()
    node = edit.insert_after(program, program.node("relu"), replacement, name="conv")
    assert program.module_of(node) is replacement
    assert program.module_of(program.node("conv")) is not replacement
    expected = replacement(torch.relu(program.module.get_submodule("conv")(IMAGE)))
    torch.testing.assert_close(program.module(IMAGE), expected)
    new = conv().double()
    edit.replace(program, program.node("conv"), new)
    assert program.module_of(program.node("conv")) is new


# 3. A pass that changes nothing after an upgrade and says nothing (pytorch#160095, #85851, #122070).


def test_a_pass_that_changes_nothing_says_so_and_why() -> None:
    model = double(nn.Sequential(nn.ReLU(), norm(), nn.ReLU()))
    with pytest.warns(NoMatchWarning, match="fold_batch_norm changed nothing: _1: behind relu; before relu"):
        fxopt.optimize(model, IMAGE, ["fold_batch_norm"])


# 4. graph.lint() accepts a shape-broken graph; stale code runs until recompile(); deepcopy shares node.meta.


def test_a_graph_with_broken_shapes_is_found() -> None:
    program = fxopt.capture(double(nn.Sequential(conv(), nn.Flatten(), nn.Linear(144, 2))), IMAGE)
    broken = program.copy()
    edit.bypass(broken, broken.node("_1"), broken.node("_0"))
    broken.graph.lint()
    assert check_structure(program, broken) is None
    assert str(check_shapes(program, broken)).startswith("an operator refuses its operands")


def test_no_stale_code_runs_after_an_edit() -> None:
    program = fxopt.capture(double(nn.Sequential(conv(), nn.ReLU())), IMAGE)
    program.module(IMAGE)
    edit.replace(program, program.node("_1"), torch.neg)
    with torch.no_grad():
        expected = -program.module.get_submodule("0")(IMAGE)
    for answer in (program.module(IMAGE), program.run(IMAGE)[0], program.flat_module()(IMAGE)[0]):
        torch.testing.assert_close(answer.detach(), expected)


def test_copies_share_no_metadata_of_nodes() -> None:
    program = fxopt.capture(double(nn.Sequential(conv(), nn.ReLU())), IMAGE)
    copy = program.copy()
    copy.node("_0").meta["mark"] = True
    assert "mark" not in program.node("_0").meta


# 5. BatchNorm eps reset on rewriting (ao#4107).


@pytest.mark.parametrize("eps", [1e-5, 1e-3, 0.5])
@pytest.mark.parametrize("frontend", ["symbolic", "export"])
def test_eps_and_momentum_survive_capture_and_folding(eps: float, frontend: str) -> None:
    model = double(nn.Sequential(conv(), norm(eps), nn.ReLU(), norm(eps)))
    model[1].momentum = model[3].momentum = 0.37
    program = fxopt.capture(model, IMAGE, frontend=frontend)  # type: ignore[arg-type]
    captured = [item for item in program.module.modules() if isinstance(item, nn.BatchNorm2d)]
    assert [(item.eps, item.momentum) for item in captured] == [(eps, 0.37), (eps, 0.37)]
    result = assert_pass(FoldBatchNorm(), program, rewrites=1)
    assert_equivalent(model, result, IMAGE, tolerance=TOLERANCE)
    (kept,) = (item for item in result.module.modules() if isinstance(item, nn.BatchNorm2d))
    assert (kept.eps, kept.momentum) == (eps, 0.37)


# 10. Device and dtype mismatch of inserted modules (nni#2918, sparseml#1009).


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_what_passes_put_in_has_the_models_dtype(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    branches = OneNormTwoConvolutions()
    model = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), norm(), nn.ReLU(), branches).eval().to(dtype)
    image = IMAGE.to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoMatchWarning)
        program = fxopt.optimize(model, image, ["default"])
    assert sum(len(item.rewrites) for item in program.report.passes) >= 3
    assert {item.dtype for item in program.module.parameters()} == {dtype}
    assert_equivalent(model, program, image)


def test_what_passes_put_in_is_on_the_models_device() -> None:
    # the meta device stands for any other device: a tensor that was made elsewhere could not be mixed with it
    model = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), norm()).eval().double()
    program = fxopt.capture(model, IMAGE)
    (rewrite,) = fxopt.explain(program, passes=[FoldBatchNorm()])[0].rewrites
    program.module.to("meta")
    FoldBatchNorm().apply(program, rewrite)
    assert {item.device.type for item in program.module.parameters()} == {"meta"}


@pytest.mark.gpu
def test_what_passes_put_in_is_on_the_gpu() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), norm(), OneNormTwoConvolutions()).eval().cuda().double()
    program = fxopt.optimize(model, IMAGE.cuda(), ["default"])
    assert {item.device.type for item in program.module.parameters()} == {"cuda"}
    assert_equivalent(model, program, IMAGE.cuda(), tolerance=1e-7)
