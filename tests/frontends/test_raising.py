"""Raising: functional calls become modules at their parameters' path, exactly, whichever way they are spelled."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import fxopt
from fxopt.frontends.export import trace_export
from fxopt.frontends.raising import raise_to_modules
from fxopt.program import BatchAxis
from fxopt.signature import Signature

ATTRIBUTES = (
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "groups",
    "output_padding",
    "padding_mode",
    "in_features",
    "out_features",
    "num_features",
    "eps",
    "momentum",
    "affine",
    "track_running_stats",
    "normalized_shape",
    "elementwise_affine",
    "num_groups",
    "num_channels",
    "num_embeddings",
    "embedding_dim",
    "padding_idx",
    "scale_grad_by_freq",
    "sparse",
    "num_parameters",
    "p",
    "inplace",
    "training",
)

# torch says so once per process, in whichever test comes first
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

IMAGE = (6, 8, 8)


def norm1d(**options: bool) -> nn.Module:
    return nn.BatchNorm1d(6, **options)


# One entry per module: how to make it, and the shape of its input without the batch.
MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(6, 4, 3, stride=2, padding=1, dilation=2, groups=2), (6, 9)),
    "conv1d_same": (lambda: nn.Conv1d(6, 4, 4, padding="same"), (6, 9)),
    "conv2d": (lambda: nn.Conv2d(6, 4, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), IMAGE),
    "conv2d_depthwise": (lambda: nn.Conv2d(6, 12, 3, groups=6, bias=False), IMAGE),
    "conv2d_same": (lambda: nn.Conv2d(6, 4, 3, padding="same", bias=False), IMAGE),
    "conv2d_valid": (lambda: nn.Conv2d(6, 4, 3, padding="valid"), IMAGE),
    "conv3d": (lambda: nn.Conv3d(6, 4, (1, 2, 3), padding=(0, 1, 1)), (6, 3, 4, 5)),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(6, 4, 3, stride=2, output_padding=1), (6, 9)),
    "conv_transpose2d": (
        lambda: nn.ConvTranspose2d(6, 4, 3, stride=(2, 3), padding=1, output_padding=(1, 2), groups=2, dilation=2),
        IMAGE,
    ),
    "conv_transpose2d_no_bias": (lambda: nn.ConvTranspose2d(6, 4, 2, 2, bias=False), IMAGE),
    "conv_transpose3d": (lambda: nn.ConvTranspose3d(6, 4, 2, stride=2), (6, 2, 3, 4)),
    "linear": (lambda: nn.Linear(6, 5), (7, 6)),
    "linear_no_bias": (lambda: nn.Linear(6, 5, bias=False), (6,)),
    "batch_norm1d": (lambda: norm1d(), (6,)),
    "batch_norm1d_sequence": (lambda: norm1d(affine=False), (6, 7)),
    "batch_norm2d": (lambda: nn.BatchNorm2d(6, eps=1e-3, momentum=0.3), IMAGE),
    "batch_norm2d_cumulative": (lambda: nn.BatchNorm2d(6, momentum=None), IMAGE),
    "batch_norm2d_frozen_momentum": (lambda: nn.BatchNorm2d(6, momentum=0.0), IMAGE),
    "batch_norm2d_no_statistics": (lambda: nn.BatchNorm2d(6, track_running_stats=False), IMAGE),
    "batch_norm3d": (lambda: nn.BatchNorm3d(6), (6, 2, 3, 4)),
    "layer_norm": (lambda: nn.LayerNorm((8, 8), eps=1e-3), IMAGE),
    "layer_norm_no_bias": (lambda: nn.LayerNorm(6, bias=False), (7, 6)),
    "layer_norm_plain": (lambda: nn.LayerNorm(6, elementwise_affine=False), (7, 6)),
    "rms_norm": (lambda: nn.RMSNorm(6, eps=1e-3), (7, 6)),
    "rms_norm_default_eps": (lambda: nn.RMSNorm(6), (7, 6)),
    "group_norm": (lambda: nn.GroupNorm(3, 6, eps=1e-3), IMAGE),
    "group_norm_plain": (lambda: nn.GroupNorm(3, 6, affine=False), IMAGE),
    "instance_norm1d": (lambda: nn.InstanceNorm1d(6, affine=True), (6, 9)),
    "instance_norm2d": (lambda: nn.InstanceNorm2d(6, affine=True, track_running_stats=True), IMAGE),
    "instance_norm2d_plain": (lambda: nn.InstanceNorm2d(6), IMAGE),
    "instance_norm3d": (lambda: nn.InstanceNorm3d(6, affine=True), (6, 2, 3, 4)),
    "prelu": (lambda: nn.PReLU(6), IMAGE),
    "prelu_single": (lambda: nn.PReLU(), IMAGE),
    "dropout": (lambda: nn.Dropout(0.3), IMAGE),
    "dropout1d": (lambda: nn.Dropout1d(0.3), (6, 9)),
    "dropout2d": (lambda: nn.Dropout2d(0.3), IMAGE),
    "dropout3d": (lambda: nn.Dropout3d(0.3), (6, 2, 3, 4)),
    "alpha_dropout": (lambda: nn.AlphaDropout(0.3), IMAGE),
    "feature_alpha_dropout": (lambda: nn.FeatureAlphaDropout(0.3), IMAGE),
}


class Holder(nn.Module):
    """The module at a path of its own, with a parameter beside it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.stage = nn.Sequential(inner)
        self.scale = nn.Parameter(torch.rand(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.stage(x * self.scale)


def randomized(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)
    return module.double()


def export(model: nn.Module, *inputs: torch.Tensor) -> fx.GraphModule:
    signature, leaves = Signature.of(model, inputs)
    return trace_export(model, signature, leaves, batch=BatchAxis((0,), inputs[0].shape[0])).module


class Inline(fx.Tracer):
    """Traces into torch's own modules, so that their functional calls are in the graph."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return False


def symbolic(model: nn.Module) -> fx.GraphModule:
    graph = Inline(param_shapes_constant=True).trace(model)
    graph.output_node().args = ((graph.output_node().args[0],),)
    return fx.GraphModule(model, graph)


def functions(module: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in module.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", MODULES)
def test_aten_spelling(name: str, training: bool) -> None:
    if name == "batch_norm2d_cumulative" and training:
        pytest.skip("its momentum is computed from a counter, which export cannot trace")
    make, shape = MODULES[name]
    torch.manual_seed(0)
    model = Holder(randomized(make())).double().train(training)
    private = copy.deepcopy(model)
    raised = export(private, torch.rand(2, *shape, dtype=torch.float64))
    check(model, private, raised, shape)
    assert [name for name in functions(raised) if "mul" not in name] == []


# The forward of batch and instance norms branches on ranks, which symbolic tracing cannot follow: see NormAct.
SYMBOLIC = [name for name in MODULES if "instance" not in name and "batch" not in name]


@pytest.mark.parametrize("name", SYMBOLIC)
def test_functional_spelling(name: str) -> None:
    make, shape = MODULES[name]
    torch.manual_seed(0)
    model = Holder(randomized(make())).double().eval()
    private = copy.deepcopy(model)
    raised = symbolic(private)
    raise_to_modules(raised, training=False, original=private)
    if name == "group_norm_plain":  # nothing tells the number of channels
        assert not raised.graph.find_nodes(op="call_module")
        return
    check(model, private, raised, shape)
    assert [node.op for node in raised.graph.nodes].count("call_module") == 1


def check(model: Holder, private: nn.Module, raised: fx.GraphModule, shape: tuple[int, ...]) -> None:
    original, module = model.stage[0], raised.get_submodule("stage.0")
    assert type(module) is type(original)
    for attribute in ATTRIBUTES:
        assert getattr(module, attribute, None) == getattr(original, attribute, None), attribute
    assert list(dict(raised.named_modules())) == ["", "stage", "stage.0"]
    for kind in ("named_parameters", "named_buffers"):
        found, expected = dict(getattr(raised, kind)()), dict(getattr(private, kind)())
        assert found.keys() == expected.keys()
        for path, tensor in found.items():
            if not path.endswith("num_batches_tracked"):
                assert tensor is expected[path], path
    assert raised.state_dict().keys() == model.state_dict().keys()
    for batch in (2, 5):
        x = torch.rand(batch, *shape, dtype=torch.float64)
        torch.manual_seed(1)
        expected = model(x)
        torch.manual_seed(1)
        (found,) = raised(x)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for path, buffer in model.named_buffers():
        torch.testing.assert_close(dict(raised.named_buffers())[path], buffer, msg=path)


@pytest.mark.parametrize("spelling", ["aten", "functional"])
def test_embedding(spelling: str) -> None:
    model = Embed()
    private = copy.deepcopy(model)
    indices = torch.tensor([[1, 2, 9], [0, 3, 3]])
    raised = export(private, indices) if spelling == "aten" else symbolic(private)
    raise_to_modules(raised, training=True)
    table = raised.get_submodule("table")
    assert type(table) is nn.Embedding
    assert (table.num_embeddings, table.embedding_dim, table.padding_idx) == (10, 4, 9)
    assert table.weight is private.table.weight
    assert torch.equal(raised(indices)[0], model(indices))


class Embed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 4, padding_idx=-1)

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        return self.table(indices)


class Functional(nn.Module):
    """Calls functions on parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.rand(6, 4))
        self.kernel = nn.Parameter(torch.rand(5, 6, 1))
        self.gamma = nn.Parameter(torch.rand(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.linear(x, self.in_proj_weight)
        x = F.conv1d(x.transpose(1, 2), self.kernel)
        return F.dropout(x.transpose(1, 2), 0.25, self.training) * self.gamma


def test_parameters_with_unusual_names_get_readable_paths() -> None:
    model = nn.Sequential(Functional()).eval()
    x = torch.rand(2, 3, 4)
    raised = export(copy.deepcopy(model), x)
    targets = [str(node.target) for node in raised.graph.find_nodes(op="call_module")]
    paths = {path: type(raised.get_submodule(path)).__name__ for path in targets}
    assert paths == {"0.in_proj": "Linear", "0.conv1d": "Conv1d", "0.dropout": "Dropout"}
    assert {str(node.target) for node in raised.graph.find_nodes(op="get_attr")} == {"0.gamma"}
    assert torch.equal(raised(x)[0], model(x))
    assert not raised.get_submodule("0.dropout").training
    assert raised.train().get_submodule("0.dropout").training


class Shared(nn.Module):
    def __init__(self, *, strides: tuple[int, int]) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 3, padding=1)
        self.strides = strides

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for stride in self.strides:
            x = F.conv1d(x, self.conv.weight, self.conv.bias, stride, 1)
        return x


@pytest.mark.parametrize("strides", [(1, 1), (1, 2)])
def test_an_owner_called_twice(strides: tuple[int, int]) -> None:
    model = Shared(strides=strides)
    private = copy.deepcopy(model)
    x = torch.rand(2, 4, 8)
    raised = export(private, x)
    calls = [str(node.target) for node in raised.graph.find_nodes(op="call_module")]
    assert calls[0] == "conv"
    assert (calls[1] == "conv") is (strides == (1, 1))
    assert all(raised.get_submodule(path).weight is private.conv.weight for path in calls)
    assert torch.equal(raised(x)[0], model(x))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.table.weight

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        return self.head(self.table(indices))


def test_tied_weights_stay_tied() -> None:
    model = Tied()
    indices = torch.tensor([[1, 2], [3, 4]])
    raised = export(copy.deepcopy(model), indices)
    assert type(raised.table) is nn.Embedding
    assert type(raised.head) is nn.Linear
    assert raised.head.weight is raised.table.weight
    assert list(dict(raised.named_parameters())) == ["table.weight"]
    assert raised.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(raised(indices)[0], model(indices))


class NormAct(nn.BatchNorm2d):
    """A norm with a module below it, as timm's BatchNormAct2d."""

    def __init__(self, features: int) -> None:
        super().__init__(features, eps=1e-3, momentum=None)
        self.act = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        return self.act(x)


def test_a_stateless_module_below_an_owner_moves_beside_it() -> None:
    model = randomized(nn.Sequential(NormAct(6))).eval()
    private = copy.deepcopy(model)
    graph = fx.Tracer(param_shapes_constant=True).trace(private)
    raised = fx.GraphModule(private, graph)
    raise_to_modules(raised, training=False, original=private)
    assert [str(node.target) for node in raised.graph.find_nodes(op="call_module")] == ["0", "0_act"]
    norm = raised.get_submodule("0")
    assert type(norm) is nn.BatchNorm2d
    assert (norm.eps, norm.momentum, norm.training) == (1e-3, None, False)
    assert norm.num_batches_tracked is private[0].num_batches_tracked
    assert raised.state_dict().keys() == model.state_dict().keys()
    x = torch.rand(2, *IMAGE, dtype=torch.float64)
    assert torch.equal(raised(x), model(x))


class OtherParameters(nn.Module):
    """Its weight is a linear's, but it holds another parameter that stays in use."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4, 4))
        self.gain = nn.Parameter(torch.rand(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight) * self.gain


def test_an_owner_with_other_parameters_is_not_replaced() -> None:
    model = nn.Sequential(OtherParameters())
    private = copy.deepcopy(model)
    x = torch.rand(2, 4)
    raised = export(private, x)
    assert set(dict(raised.named_parameters())) == {"0.linear.weight", "0.gain"}
    assert raised.get_submodule("0.linear").weight is private[0].weight
    assert torch.equal(raised(x)[0], model(x))


class Computed(nn.Module):
    """Weight standardisation, a fixed blur kernel, dropout in evaluation: no module does that."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4, 4, 1))
        self.register_buffer("blur", torch.ones(4, 1, 3) / 3, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.conv1d(x, self.weight - self.weight.mean())
        x = F.conv1d(x, self.blur, groups=4)
        return F.dropout(x, 0.5, training=True)


def test_what_no_module_computes_stays_a_call() -> None:
    model = Computed().eval()
    x = torch.rand(2, 4, 6)
    raised = export(copy.deepcopy(model), x)
    assert not raised.graph.find_nodes(op="call_module")
    assert "blur" in dict(raised.named_buffers())
    assert "blur" not in raised.state_dict()
    torch.manual_seed(3)
    expected = model(x)
    torch.manual_seed(3)
    assert torch.equal(raised(x)[0], expected)


def test_frozen_norm_in_a_training_model_stays_frozen() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    model[0].eval()
    model[2].eval()
    x = torch.rand(3, 4)
    raised = export(copy.deepcopy(model), x)
    assert [raised.get_submodule(str(at)).training for at in range(3)] == [False, True, False]
    assert torch.equal(raised(x)[0], model(x))
    assert int(raised.get_submodule("0").num_batches_tracked) == 0
    assert int(raised.get_submodule("1").num_batches_tracked) == 1


def test_raising_again_changes_nothing() -> None:
    raised = export(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Holder(nn.PReLU())), torch.rand(2, 3, 8, 8))
    before, calls = str(raised.graph), raised.graph.find_nodes(op="call_module")
    modules = [raised.get_submodule(str(node.target)) for node in calls]
    raise_to_modules(raised, training=True)
    assert str(raised.graph) == before
    assert all(raised.get_submodule(str(node.target)) is module for node, module in zip(calls, modules, strict=True))


def test_aten_convolution_both_ways() -> None:
    for transposed, kind in ((False, nn.Conv2d), (True, nn.ConvTranspose2d)):
        graph = fx.Graph()
        x, weight = graph.placeholder("x"), graph.get_attr("c.weight")
        options = ([2, 2], [1, 1], [1, 1], transposed, [1, 1] if transposed else [0, 0], 2)
        call = graph.call_function(torch.ops.aten.convolution.default, (x, weight, None, *options))
        graph.output((call,))
        root = nn.Module()
        root.c = nn.Module()
        root.c.weight = nn.Parameter(torch.rand(4, 2, 3, 3) if not transposed else torch.rand(4, 3, 3, 3))
        module = fx.GraphModule(root, graph)
        value = torch.rand(2, 4, 8, 8)
        (expected,) = module(value)
        raise_to_modules(module, training=False)
        assert type(module.c) is kind
        assert torch.equal(module(value)[0], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_and_requires_grad_are_kept(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(dtype).eval()
    model[0].weight.requires_grad_(False)
    x = torch.rand(2, 3, 8, 8, dtype=dtype)
    raised = export(copy.deepcopy(model), x)
    assert {tensor.dtype for tensor in raised.parameters()} == {dtype}
    assert [tensor.requires_grad for tensor in raised.parameters()] == [False, True, True, True]
    assert torch.equal(raised(x)[0], model(x))


def test_raising_draws_no_random_numbers() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Embedding(4, 4))
    graph = fx.Tracer().trace(model[0])
    before = torch.get_rng_state()
    raise_to_modules(fx.GraphModule(model[0], graph), training=True)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
def test_a_parameter_of_an_unusual_name_is_raised_at_its_owner(
    frontend: Literal["symbolic", "export"],
) -> None:
    class Kernel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(4, 3, 3, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.conv2d(x, self.kernel)

    program = fxopt.capture(nn.Sequential(Kernel()).eval(), torch.randn(1, 3, 8, 8), frontend=frontend)
    assert [name for name, _ in program.module.named_parameters()] == ["0.weight"]
