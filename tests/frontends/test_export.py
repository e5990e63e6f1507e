"""The export frontend: a flat, plain graph under the model's own names that answers and trains like the model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.graph import CodeGen
from torch.nn.utils.parametrizations import weight_norm

from fxopt.errors import CaptureError
from fxopt.frontends.captured import Captured
from fxopt.frontends.export import trace_export
from fxopt.frontends.standardize import standardize
from fxopt.program import BatchAxis
from fxopt.signature import Signature


def export(model: nn.Module, inputs: Any, *, batch: tuple[int, ...] | None = (0,)) -> Captured:
    private = copy.deepcopy(model)
    signature, leaves = Signature.of(private, inputs)
    axis = None if batch is None else BatchAxis(batch, leaves[batch[0]].shape[0])
    captured = trace_export(private, signature, leaves, batch=axis)
    check_form(captured, signature)
    return captured


def check_form(captured: Captured, signature: Signature) -> None:
    graph = captured.module.graph
    assert type(graph._codegen) is CodeGen
    assert tuple(node.target for node in graph.find_nodes(op="placeholder")) == signature.names
    assert isinstance(graph.output_node().args[0], tuple)
    graph.lint()
    for node in graph.nodes:
        assert node.users or node.op in ("placeholder", "output") or node.is_impure(), node.format_node()
        assert "assert" not in str(node.target)
        assert "lift" not in str(node.target)
        assert not str(node.target).startswith("model.")
        assert "val" not in node.meta
    used = {str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")}
    for path, _ in (*captured.module.named_parameters(), *captured.module.named_buffers()):
        assert path in used or path.rpartition(".")[0] in used, path
    for path, module in captured.module.named_modules():
        assert not module._forward_hooks, path
        assert not module._forward_pre_hooks, path


def assert_same_answers(model: nn.Module, captured: Captured, *inputs: torch.Tensor) -> None:
    with torch.no_grad():
        expected = model(*inputs)
        found = captured.module(*inputs)
    expected = expected if isinstance(expected, tuple) else (expected,)
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


class Branching(nn.Module):
    """Branches on shapes, makes constants, keeps a temporary buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.token = nn.Parameter(torch.rand(1, 1, 4))
        self.register_buffer("shift", torch.rand(4, 1, 1), persistent=False)
        self.head = nn.Sequential(nn.LayerNorm(4), nn.Dropout(0.1), nn.Linear(4, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] % 2:
            x = F.pad(x, (0, 1))
        x = self.bn(self.conv(x)) + self.shift
        x = F.relu(x, inplace=True)
        x = x * torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=x.dtype).view(-1, 1, 1) + torch.arange(4).view(-1, 1, 1)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x.flatten(2).transpose(1, 2)], dim=1)
        return self.head(x[:, 0] + x[:, 1:].mean(1))


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_the_batch_is_free_and_names_are_kept(batch: int) -> None:
    model = Branching().eval()
    captured = export(model, (torch.rand(batch, 3, 9, 9),))
    assert captured.dynamic_batch
    assert captured.note is None
    for size in (1, 2, 5):
        assert_same_answers(model, captured, torch.rand(size, 3, 9, 9))
    parameters, expected = dict(captured.module.named_parameters()), dict(model.named_parameters())
    assert parameters.keys() == expected.keys()
    assert all(torch.equal(parameters[path], tensor) for path, tensor in expected.items())
    assert captured.module.state_dict().keys() == model.state_dict().keys()
    assert "shift" in dict(captured.module.named_buffers())
    assert not captured.module.training
    assert type(captured.module.get_submodule("head.1")) is nn.Dropout


def test_a_captured_model_trains() -> None:
    torch.manual_seed(0)
    model = Branching().train()
    captured = export(model, (torch.rand(2, 3, 9, 9),))
    assert captured.module.training
    assert captured.module.get_submodule("bn").training
    x = torch.rand(4, 3, 9, 9)
    for module in (model, captured.module):
        torch.manual_seed(1)
        for _ in range(2):
            outputs = module(x)
            outputs = outputs[0] if isinstance(outputs, tuple) else outputs
            outputs.square().sum().backward()
    for (path, parameter), other in zip(
        model.named_parameters(), dict(captured.module.named_parameters()).items(), strict=True
    ):
        twin = dict(captured.module.named_parameters())[path]
        assert other is not None
        assert torch.equal(twin.grad, parameter.grad), path
    for path, buffer in model.named_buffers():
        assert torch.equal(dict(captured.module.named_buffers())[path], buffer), path
    assert int(captured.module.get_submodule("bn").num_batches_tracked) == 2


def test_captured_for_evaluation_it_can_be_trained_again() -> None:
    model = Branching().eval()
    captured = export(model, (torch.rand(2, 3, 9, 9),))
    captured.module.train()
    model.train()
    x = torch.rand(4, 3, 9, 9)
    torch.manual_seed(1)
    expected = model(x)
    torch.manual_seed(1)
    assert torch.equal(captured.module(x)[0], expected)
    assert torch.equal(captured.module.get_submodule("bn").running_mean, model.bn.running_mean)


class FixedBatch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(2, -1)


def test_a_batch_that_cannot_be_free_is_fixed_and_says_why() -> None:
    model = FixedBatch()
    captured = export(model, (torch.rand(2, 3),))
    assert captured.dynamic_batch or captured.note is not None
    assert_same_answers(model, captured, torch.rand(2, 3))


class Branches(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if x.shape[0] == 2 else x - 1


def test_a_branch_on_the_batch_fixes_it() -> None:
    model = Branches()
    captured = export(model, (torch.rand(2, 3),))
    assert not captured.dynamic_batch
    assert captured.note is not None
    assert "batch" in captured.note
    assert_same_answers(model, captured, torch.rand(2, 3))


def test_without_a_batch_shapes_are_fixed() -> None:
    model = nn.Linear(3, 2)
    captured = export(model, (torch.rand(3),), batch=None)
    assert not captured.dynamic_batch
    assert_same_answers(model, captured, torch.rand(3))


class Scores(NamedTuple):
    logits: torch.Tensor
    aux: dict[str, Any]


class Structured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, batch: dict[str, torch.Tensor], factor: float, *, flip: bool = False) -> Scores:
        x = batch["a"] * factor + batch["b"]
        return Scores(self.linear(x.flip(-1) if flip else x), {"name": "scores", "hidden": [x, None]})


def test_nested_inputs_and_outputs() -> None:
    model = Structured()
    inputs = {"batch": {"a": torch.rand(2, 4), "b": torch.rand(2, 4)}, "factor": 2.0, "flip": True}
    captured = export(model, inputs, batch=(0, 1))
    assert captured.dynamic_batch
    a, b = torch.rand(3, 4), torch.rand(3, 4)
    found = captured.outputs.unflatten(captured.module(a, b))
    expected = model({"a": a, "b": b}, 2.0, flip=True)
    assert isinstance(found, Scores)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.aux["hidden"][0], expected.aux["hidden"][0])
    assert (found.aux["name"], found.aux["hidden"][1]) == ("scores", None)


class Contexts(nn.Module):
    """Gradients and autocast switched off in parts, one within the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            frozen = self.first(x)
            with torch.autocast("cpu", enabled=False):
                frozen = frozen.relu() + torch.tensor(2.0)
        return self.second(frozen) + self.second(x.detach() * self.first.bias)


@pytest.mark.parametrize("training", [False, True])
def test_contexts_are_inlined_and_keep_their_meaning(training: bool) -> None:
    model = Contexts().train(training)
    captured = export(model, (torch.rand(2, 4),))
    assert not any("higher_order" in str(node.target) for node in captured.module.graph.nodes)
    x = torch.rand(3, 4)
    assert_same_answers(model, captured, x)
    model(x).sum().backward()
    captured.module(x)[0].sum().backward()
    assert model.first.weight.grad is None
    assert captured.module.get_submodule("first").weight.grad is None
    assert torch.equal(captured.module.get_submodule("first").bias.grad, model.first.bias.grad)


class WritesThroughViews(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn(self.conv(x))
        x[:, 0] = 1.0
        x[:, 1:3].mul_(2.0)
        return x + torch.zeros(4, 1).index_fill_(0, torch.tensor([2]), 5.0)


def test_writes_through_views_become_values() -> None:
    model = WritesThroughViews().eval()
    model.bn.running_mean.normal_()
    captured = export(model, (torch.rand(2, 3, 8),))
    assert type(captured.module.get_submodule("bn")) is nn.BatchNorm1d
    assert captured.note is not None
    for node in captured.module.graph.nodes:
        assert not getattr(getattr(node.target, "_schema", None), "is_mutable", False)
    assert_same_answers(model, captured, torch.rand(3, 3, 8))
    assert_same_answers(model, captured, torch.rand(3, 3, 8))


class Autocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.linear(x)


def test_autocast_becomes_casts() -> None:
    model = Autocast().eval()
    captured = export(model, (torch.rand(2, 4),))
    assert_same_answers(model, captured, torch.rand(3, 4))


class DropPath(nn.Module):
    """Stochastic depth as timm writes it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        kept = x.new_empty((x.shape[0], 1)).bernoulli_(0.5)
        kept.div_(0.5)
        return x * kept + x.new_empty(x.shape).normal_(0.0, 2.0)


def test_random_fillings_have_pure_forms() -> None:
    model = DropPath().train()
    captured = export(model, (torch.rand(2, 4),))
    for node in captured.module.graph.nodes:
        assert not getattr(getattr(node.target, "_schema", None), "is_mutable", False)
    x = torch.rand(9, 4)
    torch.manual_seed(0)
    expected = model(x)
    torch.manual_seed(0)
    assert torch.equal(captured.module(x)[0], expected)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        return x + self.calls


def test_buffers_the_model_writes_stay_written() -> None:
    captured = export(Counting(), (torch.zeros(2, 3),))
    results = [float(captured.module(torch.zeros(2, 3))[0][0, 0]) for _ in range(3)]
    assert results == [1.0, 2.0, 3.0]


class SharedBlocks(nn.Module):
    """A module under two names: the first one counts, as in named_parameters()."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)
        self.block = nn.Sequential(nn.ReLU(), self.proj)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(self.block(x))


def test_a_tensor_with_two_names_has_the_first() -> None:
    model = SharedBlocks()
    captured = export(model, (torch.rand(2, 4),))
    assert list(dict(captured.module.named_parameters())) == ["proj.weight", "proj.bias"]
    assert [node.target for node in captured.module.graph.find_nodes(op="call_module")] == ["proj", "proj"]
    assert_same_answers(model, captured, torch.rand(3, 4))


class DataDependent(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if x.sum() > 0 else x - 1


def test_what_export_refuses_is_a_capture_error_with_its_reason() -> None:
    with pytest.raises(CaptureError, match=r"DataDependent: .*ata-dependent"):
        export(DataDependent(), (torch.rand(2, 3),))


class Recurrent(nn.Module):
    def __init__(self, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.rnn = kind(4, 5, num_layers=2, batch_first=True, bidirectional=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rnn(x)[0]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_keep_their_parameters(kind: Callable[..., nn.Module]) -> None:
    model = Recurrent(kind).eval()
    captured = export(model, (torch.rand(2, 7, 4),))
    assert set(dict(captured.module.named_parameters())) == set(dict(model.named_parameters()))
    assert_same_answers(model, captured, torch.rand(3, 7, 4))


def test_attention_in_evaluation_does_not_take_the_fused_path() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval().requires_grad_(False)
    captured = export(layer, (torch.rand(2, 5, 8),))
    assert {"linear1", "linear2", "norm1", "norm2", "self_attn.in_proj", "self_attn.out_proj"} <= {
        str(node.target) for node in captured.module.graph.find_nodes(op="call_module")
    }
    x = torch.rand(3, 5, 8)
    torch.testing.assert_close(captured.module(x)[0], layer(x), rtol=1e-5, atol=1e-6)
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_standardized_model_exports_to_fewer_steps() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(layer, weight_norm(nn.Linear(8, 3))).eval()
    plain, standard = (export(item, (torch.rand(2, 5, 8),)) for item in (model, standardize(copy.deepcopy(model))))
    assert len(standard.module.graph.nodes) < len(plain.module.graph.nodes)
    assert type(standard.module.get_submodule("1")) is nn.Linear
    x = torch.rand(3, 5, 8)
    for captured in (plain, standard):
        assert captured.dynamic_batch
        torch.testing.assert_close(captured.module(x)[0], model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_is_kept(dtype: torch.dtype) -> None:
    model = Branching().to(dtype).eval()
    captured = export(model, (torch.rand(2, 3, 9, 9, dtype=dtype),))
    assert_same_answers(model, captured, torch.rand(3, 3, 9, 9, dtype=dtype))


def test_hooks_stay_off_the_model() -> None:
    model = Branching().eval()
    signature, leaves = Signature.of(model, (torch.rand(2, 3, 9, 9),))
    trace_export(model, signature, leaves, batch=BatchAxis((0,), 2))
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_vit", "test_convnext"])
def test_timm_models(name: str) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    shape = model.default_cfg["input_size"]
    captured = export(model, (torch.rand(1, *shape),))
    assert captured.dynamic_batch
    assert set(dict(captured.module.named_parameters())) == set(dict(model.named_parameters()))
    assert_same_answers(model, captured, torch.rand(3, *shape))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_torchvision_models(name: str) -> None:
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, num_classes=7).eval()
    captured = export(model, (torch.rand(1, 3, 32, 32),))
    assert captured.dynamic_batch
    assert captured.module.state_dict().keys() == model.state_dict().keys()
    assert_same_answers(model, captured, torch.rand(3, 3, 32, 32))
    kinds = {
        kind: sum(type(module) is kind for module in model.modules()) for kind in (nn.Conv2d, nn.BatchNorm2d, nn.Linear)
    }
    for kind, count in kinds.items():
        assert sum(type(module) is kind for module in captured.module.modules()) == count
