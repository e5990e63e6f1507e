"""Standardizing: opaque modules become traceable ones that compute the same from the same parameters."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

from fxopt.errors import CaptureError
from fxopt.frontends.attention import Attention
from fxopt.frontends.standardize import standardize
from fxopt.frontends.symbolic import trace_symbolic
from fxopt.sharing import share_module
from fxopt.signature import Signature


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def standardized(model: nn.Module) -> nn.Module:
    return standardize(copy.deepcopy(model))


def traced(model: nn.Module, inputs: Any) -> fx.GraphModule:
    signature, _ = Signature.of(model, inputs)
    return trace_symbolic(standardized(model), signature).module


OPTIONS: list[dict[str, Any]] = [
    {"batch_first": True},
    {"batch_first": False},
    {"batch_first": True, "bias": False},
    {"batch_first": True, "kdim": 6, "vdim": 10},
    {"batch_first": False, "kdim": 6, "vdim": 10, "bias": False},
]


def attention(**options: Any) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(8, 2, dtype=torch.float64, **options).eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def inputs_of(module: nn.MultiheadAttention, *, batched: bool = True) -> list[torch.Tensor]:
    lengths, widths = (5, 7, 7), (8, module.kdim, module.vdim)
    sizes = [(length, width) for length, width in zip(lengths, widths, strict=True)]
    if batched:
        sizes = [(3, *size) if module.batch_first else (size[0], 3, size[1]) for size in sizes]
    return [torch.rand(size, dtype=torch.float64) for size in sizes]


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("options", OPTIONS)
def test_attention_answers_like_the_original(options: dict[str, Any], average: bool, batched: bool) -> None:
    original = attention(**options)
    module = standardized(original)
    assert type(module) is Attention
    assert not module.training
    inputs = inputs_of(original, batched=batched)
    for need_weights in (True, False):
        settings = {"need_weights": need_weights, "average_attn_weights": average}
        close(module(*inputs, **settings), original(*inputs, **settings))


@pytest.mark.parametrize("kind", ["bool", "float", "per_head", "padding", "float_padding", "both"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_masks(kind: str, batch_first: bool) -> None:
    original = attention(batch_first=batch_first)
    module = standardized(original)
    mask = torch.ones(5, 7, dtype=torch.bool).triu(2)
    padding = torch.zeros(3, 7, dtype=torch.bool)
    padding[1, 5:] = True
    masks: dict[str, dict[str, Any]] = {
        "bool": {"attn_mask": mask},
        "float": {"attn_mask": torch.randn(5, 7, dtype=torch.float64)},
        "per_head": {"attn_mask": torch.randn(6, 5, 7, dtype=torch.float64)},
        "padding": {"key_padding_mask": padding},
        "float_padding": {"key_padding_mask": torch.randn(3, 7, dtype=torch.float64)},
        "both": {"attn_mask": mask, "key_padding_mask": padding},
    }
    inputs = inputs_of(original)
    for need_weights in (True, False):
        close(
            module(*inputs, need_weights=need_weights, **masks[kind]),
            original(*inputs, need_weights=need_weights, **masks[kind]),
        )


def test_attention_in_training_hands_out_the_dropped_weights() -> None:
    original = attention(batch_first=True, dropout=0.5).train()
    module = standardized(original)
    x = inputs_of(original)[0]
    torch.manual_seed(1)
    expected = original(x, x, x)
    torch.manual_seed(1)
    close(module(x, x, x), expected)


def test_where_the_parameters_go() -> None:
    original = attention(batch_first=True)
    module = standardize(original)
    assert dict(module.named_parameters()) == {
        "in_proj.weight": original.in_proj_weight,
        "in_proj.bias": original.in_proj_bias,
        "out_proj.weight": original.out_proj.weight,
        "out_proj.bias": original.out_proj.bias,
    }
    assert type(module.out_proj) is nn.Linear
    assert module.in_proj.weight is original.in_proj_weight
    split = standardize(attention(kdim=6, vdim=10))
    assert {path: tuple(tensor.shape) for path, tensor in split.named_parameters()} == {
        "q_proj.weight": (8, 8),
        "q_proj.bias": (8,),
        "k_proj.weight": (8, 6),
        "k_proj.bias": (8,),
        "v_proj.weight": (8, 10),
        "v_proj.bias": (8,),
        "out_proj.weight": (8, 8),
        "out_proj.bias": (8,),
    }


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = attention(batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attn(x, x, x)[0]


def test_traced_self_attention_is_one_projection_and_one_attention() -> None:
    model = SelfAttention()
    x = torch.rand(2, 5, 8, dtype=torch.float64)
    module = traced(model, (x,))
    assert [node.target for node in module.graph.find_nodes(op="call_module")] == ["attn.in_proj", "attn.out_proj"]
    module.graph.eliminate_dead_code()
    functions = [str(node.target) for node in module.graph.nodes if node.op != "call_module"]
    assert sum("scaled_dot_product_attention" in name for name in functions) == 1
    assert not any("softmax" in name for name in functions)
    for batch in (2, 4):
        x = torch.rand(batch, 5, 8, dtype=torch.float64)
        close(module(x)[0], model(x))


class CrossAttention(SelfAttention):
    def forward(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        return self.attn(x, memory, memory, need_weights=False)[0]


def test_traced_cross_attention_reads_the_packed_parameters() -> None:
    model = CrossAttention()
    x, memory = torch.rand(2, 5, 8, dtype=torch.float64), torch.rand(2, 7, 8, dtype=torch.float64)
    module = traced(model, (x, memory))
    assert {"attn.in_proj.weight", "attn.in_proj.bias"} == {
        str(node.target) for node in module.graph.find_nodes(op="get_attr")
    }
    close(module(x, memory)[0], model(x, memory))


class MaskInput(SelfAttention):
    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.attn(x, x, x, attn_mask=mask)[0]


def test_a_mask_that_is_an_input_cannot_be_traced() -> None:
    inputs = (torch.rand(2, 5, 8, dtype=torch.float64), torch.ones(5, 5, dtype=torch.bool))
    with pytest.raises(CaptureError, match="boolean or additive"):
        traced(MaskInput(), inputs)


class Subclass(nn.MultiheadAttention):
    pass


def test_what_is_left_alone() -> None:
    hooked = nn.MultiheadAttention(8, 2)
    hooked.register_forward_hook(lambda *_: None)
    for module in (
        nn.MultiheadAttention(8, 2, add_bias_kv=True),
        nn.MultiheadAttention(8, 2, add_zero_attn=True),
        Subclass(8, 2),
        hooked,
    ):
        assert standardize(module) is module
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    layer.self_attn = nn.MultiheadAttention(8, 2, add_zero_attn=True)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    assert type(standardize(model)) is nn.TransformerEncoder
    assert type(model.layers[0]) is nn.TransformerEncoderLayer


def test_a_module_in_two_places_is_replaced_by_one() -> None:
    shared = nn.MultiheadAttention(8, 2)
    model = standardize(nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)}))
    assert type(model["a"]) is Attention
    assert model["a"] is model["b"][0]


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_transformer_encoder(norm_first: bool, batch_first: bool, activation: str) -> None:
    layer = nn.TransformerEncoderLayer(
        8, 2, 16, activation=activation, batch_first=batch_first, norm_first=norm_first, dtype=torch.float64
    )
    model = nn.TransformerEncoder(layer, 2, nn.LayerNorm(8, dtype=torch.float64), enable_nested_tensor=False).eval()
    x = torch.rand(3, 5, 8, dtype=torch.float64)
    module = traced(model, (x,))
    assert sum(type(part) is nn.Linear for part in module.modules()) == 8
    renamed = {path.replace("in_proj_", "in_proj.") for path, _ in model.named_parameters()}
    assert {path for path, _ in module.named_parameters()} == renamed
    close(module(x)[0], model(x))
    mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1 if batch_first else 0], dtype=torch.float64)
    close(standardized(model)(x, mask=mask), model(x, mask=mask))


def test_whole_transformer() -> None:
    model = nn.Transformer(8, 2, 1, 2, 16, batch_first=True, dtype=torch.float64).eval()
    model.encoder.use_nested_tensor = False
    source, target = torch.rand(2, 5, 8, dtype=torch.float64), torch.rand(2, 4, 8, dtype=torch.float64)
    close(traced(model, (source, target))(source, target)[0], model(source, target))
    mask = nn.Transformer.generate_square_subsequent_mask(4, dtype=torch.float64)
    close(standardized(model)(source, target, tgt_mask=mask), model(source, target, tgt_mask=mask))


def test_transformer_layers_train_like_the_original() -> None:
    layer = nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0, dtype=torch.float64).train()
    module = standardized(layer)
    assert module.training
    x, memory = torch.rand(4, 2, 8, dtype=torch.float64), torch.rand(5, 2, 8, dtype=torch.float64)
    layer(x, memory).square().sum().backward()
    module(x, memory).square().sum().backward()
    for path, parameter in layer.named_parameters():
        twin = dict(module.named_parameters())[path.replace("in_proj_", "in_proj.")]
        close(twin.grad, parameter.grad)


@pytest.mark.parametrize("parametrization", [weight_norm, spectral_norm, orthogonal])
def test_parametrized_weights_are_baked_for_evaluation(parametrization: Any) -> None:
    model = nn.Sequential(parametrization(nn.Linear(4, 4)), nn.ReLU()).eval()
    x = torch.rand(2, 4)
    expected = model(x)
    private = standardized(model)
    assert type(private[0]) is nn.Linear
    assert not parametrize.is_parametrized(private[0])
    assert set(dict(private.named_parameters())) == {"0.weight", "0.bias"}
    assert torch.equal(private(x), expected)
    assert parametrize.is_parametrized(model[0])
    assert torch.equal(model(x), expected)


def test_baking_leaves_a_module_that_shares_tensors_alone() -> None:
    model = nn.Sequential(orthogonal(nn.Linear(4, 4)), nn.utils.spectral_norm(nn.Linear(4, 4))).eval()
    x = torch.rand(2, 4)
    expected = model(x)
    standardize(share_module(model))
    assert parametrize.is_parametrized(model[0])
    assert len(model[1]._forward_pre_hooks) == 1
    assert torch.equal(model(x), expected)


def test_parametrized_weights_stay_for_training() -> None:
    model = nn.Sequential(weight_norm(nn.Linear(4, 4))).train()
    assert parametrize.is_parametrized(standardize(model)[0])


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm"])
def test_older_norm_hooks_are_baked(name: str) -> None:
    model = nn.Sequential(getattr(nn.utils, name)(nn.Linear(4, 4))).eval()
    x = torch.rand(2, 4)
    expected = model(x)
    standardize(model)
    assert not model[0]._forward_pre_hooks
    assert set(dict(model.named_parameters())) == {"0.weight", "0.bias"}
    torch.testing.assert_close(model(x), expected)


def test_vision_transformer_of_torchvision() -> None:
    vision_transformer = pytest.importorskip("torchvision.models.vision_transformer")
    torch.manual_seed(0)
    model = vision_transformer.VisionTransformer(32, 16, 2, 2, 16, 32, num_classes=5).double().eval()
    nn.init.normal_(model.heads.head.weight)
    module = standardized(model)
    x = torch.rand(3, 3, 32, 32, dtype=torch.float64)
    close(module(x), model(x))
    assert sum(type(part) is Attention for part in module.modules()) == 2
