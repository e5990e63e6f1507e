"""The table of operators: every spelling of each. How it is read is in `ops.py`.

An entry names the arguments in the order of the torch function. Modules bring their configuration as attributes, so
only their call arguments are named. Classes of other libraries are known by qualified name and never imported.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fxopt import masking

__all__ = ["OPERATORS", "Operator"]

_CONV = "input weight bias stride padding dilation groups"
_CONV_TRANSPOSE = "input weight bias stride padding output_padding groups dilation"
_POOL = "input kernel_size stride padding"
_AVERAGE_POOL = f"{_POOL} ceil_mode count_include_pad divisor_override"
_AFFINE = "input scale zero_point quant_min quant_max dtype"


@dataclass(frozen=True)
class Operator:
    """One canonical operator and its spellings.

    Attributes:
        name: canonical name.
        parameters: argument names, in the order of the torch function.
        functions: torch functions, and functions of other libraries by qualified name.
        methods: tensor methods; one that ends in "_" works in place.
        aten: names of ATen operators; one that ends in "_" works in place.
        modules: module classes, and classes of other libraries by qualified name.
        variadic: the last parameter also takes its values spread out, as in `x.view(2, 3)`.
        elementwise: each output element depends on the elements at the same (broadcast) position only.
    """

    name: str
    parameters: tuple[str, ...]
    functions: tuple[Callable[..., Any] | str, ...] = ()
    methods: tuple[str, ...] = ()
    aten: tuple[str, ...] = ()
    modules: tuple[type[nn.Module] | str, ...] = ()
    variadic: bool = False
    elementwise: bool = False


def _op(
    name: str,
    parameters: str,
    *,
    functions: tuple[Any, ...] = (),
    methods: str = "",
    aten: str = "",
    modules: tuple[Any, ...] = (),
    variadic: bool = False,
    elementwise: bool = False,
) -> Operator:
    return Operator(
        name,
        tuple(parameters.split()),
        functions,
        tuple(methods.split()),
        tuple(aten.split()),
        modules,
        variadic,
        elementwise,
    )


def _unary(name: str, *functions: Any, modules: tuple[Any, ...] = (), extra: str = "", aten: str = "") -> Operator:
    """An elementwise function of one tensor, in its four spellings."""
    return _op(
        name,
        f"input {extra}",
        functions=functions,
        methods=f"{name} {name}_",
        aten=aten or f"{name} {name}_",
        modules=modules,
        elementwise=True,
    )


def _binary(name: str, *functions: Any, extra: str = "", aliases: str = "") -> Operator:
    """An elementwise function of two tensors, in its spellings."""
    names = [name, *aliases.split()]
    spellings = " ".join(f"{item} {item}_" for item in names)
    return _op(name, f"input other {extra}", functions=functions, methods=spellings, aten=spellings, elementwise=True)


OPERATORS: tuple[Operator, ...] = (
    # layers with parameters
    _op("conv1d", _CONV, functions=(F.conv1d, torch.conv1d), aten="conv1d", modules=(nn.Conv1d, masking.MaskedConv1d)),
    _op("conv2d", _CONV, functions=(F.conv2d, torch.conv2d), aten="conv2d", modules=(nn.Conv2d, masking.MaskedConv2d)),
    _op("conv3d", _CONV, functions=(F.conv3d, torch.conv3d), aten="conv3d", modules=(nn.Conv3d, masking.MaskedConv3d)),
    _op(
        "conv_transpose1d",
        _CONV_TRANSPOSE,
        functions=(F.conv_transpose1d, torch.conv_transpose1d),
        aten="conv_transpose1d",
        modules=(nn.ConvTranspose1d, masking.MaskedConvTranspose1d),
    ),
    _op(
        "conv_transpose2d",
        _CONV_TRANSPOSE,
        functions=(F.conv_transpose2d, torch.conv_transpose2d),
        aten="conv_transpose2d",
        modules=(nn.ConvTranspose2d, masking.MaskedConvTranspose2d),
    ),
    _op(
        "conv_transpose3d",
        _CONV_TRANSPOSE,
        functions=(F.conv_transpose3d, torch.conv_transpose3d),
        aten="conv_transpose3d",
        modules=(nn.ConvTranspose3d, masking.MaskedConvTranspose3d),
    ),
    _op("linear", "input weight bias", functions=(F.linear,), aten="linear", modules=(nn.Linear, masking.MaskedLinear)),
    _op("bilinear", "input1 input2 weight bias", functions=(F.bilinear,), aten="bilinear", modules=(nn.Bilinear,)),
    _op("codebook_weight", "", modules=("fxopt.codebook.CodebookWeight",)),
    _op("quantized_tensor", "", modules=("fxopt.quantization.QuantizedTensor",)),
    _op("packed_weight", "", modules=("fxopt.packed_weight.PackedWeight",)),
    _op("dynamic_linear", "input", modules=("fxopt.dynamic_linear.DynamicLinear",)),
    _op("dynamic_lstm", "input hx", modules=("fxopt.dynamic_recurrent.DynamicLSTM",)),
    _op("dynamic_gru", "input hx", modules=("fxopt.dynamic_recurrent.DynamicGRU",)),
    _op("fake_quantize", "input", modules=("fxopt.fake_quantization.FakeQuantize",)),
    _op("fake_quantized_weight", "", modules=("fxopt.fake_quantization.FakeQuantizedWeight",)),
    _op("quantize", _AFFINE, functions=("quantized_decomposed.quantize_per_tensor.default",)),
    _op("dequantize", _AFFINE, functions=("quantized_decomposed.dequantize_per_tensor.default",)),
    _op(
        "embedding",
        "input weight padding_idx max_norm norm_type scale_grad_by_freq sparse",
        functions=(F.embedding,),
        modules=(nn.Embedding,),
    ),
    _op(
        "batch_norm",
        "input running_mean running_var weight bias training momentum eps",
        functions=(F.batch_norm,),
        modules=(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    ),
    _op("layer_norm", "input normalized_shape weight bias eps", functions=(F.layer_norm,), aten="layer_norm", modules=(nn.LayerNorm,)),
    _op("group_norm", "input num_groups weight bias eps", functions=(F.group_norm,), aten="group_norm", modules=(nn.GroupNorm,)),
    _op(
        "instance_norm",
        "input running_mean running_var weight bias use_input_stats momentum eps",
        functions=(F.instance_norm,),
        modules=(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    ),
    _op("rms_norm", "input normalized_shape weight eps", functions=(F.rms_norm,), aten="rms_norm", modules=(nn.RMSNorm,)),
    _op("lstm", "input hx", aten="lstm", modules=(nn.LSTM,)),
    _op("gru", "input hx", aten="gru", modules=(nn.GRU,)),
    _op("rnn", "input hx", modules=(nn.RNN,)),
    _op("multi_head_attention", "query key value", modules=(nn.MultiheadAttention,)),
    # identities and regularisers
    _op("identity", "input", modules=(nn.Identity,), aten="alias", elementwise=True),
    _op("detach", "input", functions=(torch.detach,), methods="detach", aten="detach", elementwise=True),
    _op("contiguous", "input memory_format", methods="contiguous", aten="contiguous", elementwise=True),
    _op("clone", "input memory_format", functions=(torch.clone,), methods="clone", aten="clone", elementwise=True),
    _op("dropout", "input p training inplace", functions=(F.dropout,), aten="dropout dropout_", modules=(nn.Dropout,), elementwise=True),
    _op("dropout1d", "input p training inplace", functions=(F.dropout1d,), modules=(nn.Dropout1d,)),
    _op("dropout2d", "input p training inplace", functions=(F.dropout2d,), aten="feature_dropout", modules=(nn.Dropout2d,)),
    _op("dropout3d", "input p training inplace", functions=(F.dropout3d,), modules=(nn.Dropout3d,)),
    _op("alpha_dropout", "input p training inplace", functions=(F.alpha_dropout,), aten="alpha_dropout", modules=(nn.AlphaDropout,)),
    _op(
        "drop_path",
        "input p mode training",
        functions=("torchvision.ops.stochastic_depth.stochastic_depth",),
        modules=("torchvision.ops.stochastic_depth.StochasticDepth", "timm.layers.drop.DropPath"),
    ),
    # elementwise, one tensor
    _unary("relu", F.relu, F.relu_, torch.relu, torch.relu_, modules=(nn.ReLU,), extra="inplace"),
    _unary("relu6", F.relu6, modules=(nn.ReLU6,), extra="inplace"),
    _unary("leaky_relu", F.leaky_relu, modules=(nn.LeakyReLU,), extra="negative_slope inplace"),
    _unary("elu", F.elu, modules=(nn.ELU,), extra="alpha inplace"),
    _unary("selu", F.selu, torch.selu, modules=(nn.SELU,), extra="inplace"),
    _unary("celu", F.celu, torch.celu, modules=(nn.CELU,), extra="alpha inplace"),
    _unary("gelu", F.gelu, modules=(nn.GELU,), extra="approximate"),
    _unary("silu", F.silu, modules=(nn.SiLU,), extra="inplace"),
    _unary("mish", F.mish, modules=(nn.Mish,), extra="inplace"),
    _unary("hardswish", F.hardswish, modules=(nn.Hardswish,), extra="inplace"),
    _unary("hardsigmoid", F.hardsigmoid, modules=(nn.Hardsigmoid,), extra="inplace"),
    _unary("hardtanh", F.hardtanh, modules=(nn.Hardtanh,), extra="min_val max_val inplace"),
    _unary("softplus", F.softplus, modules=(nn.Softplus,), extra="beta threshold"),
    _unary("sigmoid", F.sigmoid, torch.sigmoid, modules=(nn.Sigmoid,)),
    _unary("tanh", F.tanh, torch.tanh, modules=(nn.Tanh,)),
    _op("prelu", "input weight", functions=(F.prelu, torch.prelu), methods="prelu", aten="prelu", modules=(nn.PReLU,)),
    _unary("neg", torch.neg, operator.neg),
    _unary("abs", torch.abs, abs),
    _unary("exp", torch.exp),
    _unary("log", torch.log),
    _unary("sqrt", torch.sqrt),
    _unary("rsqrt", torch.rsqrt),
    _unary("square", torch.square),
    _unary("sin", torch.sin),
    _unary("cos", torch.cos),
    _unary("erf", torch.erf),
    _unary("clamp", torch.clamp, extra="min max"),
    _unary("reciprocal", torch.reciprocal),
    _unary("log1p", torch.log1p),
    _unary("sign", torch.sign),
    _unary("floor", torch.floor),
    _unary("ceil", torch.ceil),
    _unary("round", torch.round),
    _unary("logsigmoid", F.logsigmoid, modules=(nn.LogSigmoid,), aten="log_sigmoid"),
    _unary("softsign", F.softsign, modules=(nn.Softsign,)),
    _unary("softshrink", F.softshrink, modules=(nn.Softshrink,), extra="lambd"),
    _unary("hardshrink", F.hardshrink, modules=(nn.Hardshrink,), extra="lambd"),
    _unary("tanhshrink", F.tanhshrink, modules=(nn.Tanhshrink,)),
    _op("to", "input dtype", functions=("fxopt.ops.cast",), methods="to", aten="to _to_copy", elementwise=True),
    _op("float", "input", methods="float", elementwise=True),
    _op("double", "input", methods="double", elementwise=True),
    _op("type_as", "input other", methods="type_as", aten="type_as"),
    # elementwise, two tensors
    _binary("add", torch.add, operator.add, operator.iadd, extra="alpha"),
    _binary("sub", torch.sub, operator.sub, operator.isub, extra="alpha"),
    _binary("rsub", torch.rsub, extra="alpha"),
    _binary("mul", torch.mul, operator.mul, operator.imul, aliases="multiply"),
    _binary("div", torch.div, operator.truediv, operator.itruediv, extra="rounding_mode", aliases="divide"),
    _binary("floor_div", operator.floordiv, torch.floor_divide, aliases="floor_divide"),
    _binary("pow", torch.pow, operator.pow),
    _binary("maximum", torch.maximum),
    _binary("minimum", torch.minimum),
    _binary("eq", torch.eq, operator.eq),
    _binary("ne", torch.ne, operator.ne),
    _binary("lt", torch.lt, operator.lt),
    _binary("le", torch.le, operator.le),
    _binary("gt", torch.gt, operator.gt),
    _binary("ge", torch.ge, operator.ge),
    _op("where", "condition input other", functions=(torch.where,), methods="where", aten="where", elementwise=True),
    _op("masked_fill", "input mask value", functions=(torch.masked_fill,), methods="masked_fill masked_fill_", aten="masked_fill masked_fill_", elementwise=True),
    # layout
    _op("view", "input shape", methods="view", aten="view _unsafe_view", variadic=True),
    _op("reshape", "input shape", functions=(torch.reshape,), methods="reshape", aten="reshape", variadic=True),
    _op("view_as", "input other", methods="view_as reshape_as", aten="view_as reshape_as"),
    _op("flatten", "input start_dim end_dim", functions=(torch.flatten,), methods="flatten", aten="flatten", modules=(nn.Flatten,)),
    _op("unflatten", "input dim sizes", functions=(torch.unflatten,), methods="unflatten", aten="unflatten", modules=(nn.Unflatten,)),
    _op("permute", "input dims", functions=(torch.permute,), methods="permute", aten="permute", variadic=True),
    _op("transpose", "input dim0 dim1", functions=(torch.transpose, torch.swapaxes), methods="transpose", aten="transpose"),
    _op("t", "input", functions=(torch.t,), methods="t", aten="t"),
    _op("squeeze", "input dim", functions=(torch.squeeze,), methods="squeeze squeeze_", aten="squeeze squeeze_"),
    _op("unsqueeze", "input dim", functions=(torch.unsqueeze,), methods="unsqueeze unsqueeze_", aten="unsqueeze unsqueeze_"),
    _op("expand", "input sizes", functions=(torch.Tensor.expand,), methods="expand", aten="expand", variadic=True),
    _op("expand_as", "input other", methods="expand_as", aten="expand_as", elementwise=True),
    _op("repeat_interleave", "input repeats dim", functions=(torch.repeat_interleave,), methods="repeat_interleave", aten="repeat_interleave"),
    _op("movedim", "input source destination", functions=(torch.movedim, torch.moveaxis), methods="movedim moveaxis", aten="movedim moveaxis"),
    _op("unfold", "input dim size step", methods="unfold", aten="unfold"),
    _op("im2col", "input kernel_size dilation padding stride", functions=(F.unfold,), aten="im2col", modules=(nn.Unfold,)),
    _op("col2im", "input output_size kernel_size dilation padding stride", functions=(F.fold,), aten="col2im", modules=(nn.Fold,)),
    _op("repeat", "input sizes", methods="repeat", aten="repeat", variadic=True),
    _op("cat", "tensors dim", functions=(torch.cat, torch.concat), aten="cat"),
    _op("stack", "tensors dim", functions=(torch.stack,), aten="stack"),
    _op("split", "input split_size dim", functions=(torch.split,), methods="split", aten="split split_with_sizes"),
    _op("chunk", "input chunks dim", functions=(torch.chunk,), methods="chunk", aten="chunk"),
    _op("unbind", "input dim", functions=(torch.unbind,), methods="unbind", aten="unbind"),
    _op("select", "input dim index", functions=(torch.select,), methods="select", aten="select"),
    _op("slice", "input dim start end step", aten="slice"),
    _op("narrow", "input dim start length", functions=(torch.narrow,), methods="narrow", aten="narrow"),
    _op("getitem", "input index", functions=(operator.getitem,)),
    _op("roll", "input shifts dims", functions=(torch.roll,), methods="roll", aten="roll"),
    _op("flip", "input dims", functions=(torch.flip,), methods="flip", aten="flip"),
    _op("pad", "input pad mode value", functions=(F.pad,), aten="pad", modules=(nn.ZeroPad2d,)),
    _op("constant_pad", "input pad value", aten="constant_pad_nd"),
    _op("pixel_shuffle", "input upscale_factor", functions=(F.pixel_shuffle,), aten="pixel_shuffle", modules=(nn.PixelShuffle,)),
    _op("pixel_unshuffle", "input downscale_factor", functions=(F.pixel_unshuffle,), aten="pixel_unshuffle", modules=(nn.PixelUnshuffle,)),
    _op("channel_shuffle", "input groups", functions=(F.channel_shuffle,), aten="channel_shuffle", modules=(nn.ChannelShuffle,)),
    _op("size", "input dim", methods="size", aten="sym_size"),
    _op("getattr", "input name", functions=(getattr,)),
    # contractions
    _op("matmul", "input other", functions=(torch.matmul, operator.matmul), methods="matmul", aten="matmul"),
    _op("mm", "input other", functions=(torch.mm,), methods="mm", aten="mm"),
    _op("bmm", "input other", functions=(torch.bmm,), methods="bmm", aten="bmm"),
    _op("addmm", "bias input other", functions=(torch.addmm,), methods="addmm", aten="addmm"),
    _op("einsum", "equation operands", functions=(torch.einsum,), aten="einsum", variadic=True),
    _op(
        "scaled_dot_product_attention",
        "query key value attn_mask dropout_p is_causal scale enable_gqa",
        functions=(F.scaled_dot_product_attention,),
        aten="scaled_dot_product_attention",
    ),
    # reductions and pooling
    _op("softmax", "input dim", functions=(F.softmax, torch.softmax), methods="softmax", aten="softmax _softmax", modules=(nn.Softmax,)),
    _op("log_softmax", "input dim", functions=(F.log_softmax, torch.log_softmax), methods="log_softmax", aten="log_softmax", modules=(nn.LogSoftmax,)),
    _op("mean", "input dim keepdim", functions=(torch.mean,), methods="mean", aten="mean"),
    _op("sum", "input dim keepdim", functions=(torch.sum,), methods="sum", aten="sum"),
    _op("amax", "input dim keepdim", functions=(torch.amax,), methods="amax", aten="amax"),
    _op("amin", "input dim keepdim", functions=(torch.amin,), methods="amin", aten="amin"),
    _op("var", "input dim unbiased keepdim", functions=(torch.var,), methods="var", aten="var"),
    _op("std", "input dim unbiased keepdim", functions=(torch.std,), methods="std", aten="std"),
    _op("norm", "input p dim keepdim", functions=(torch.norm, torch.linalg.vector_norm), methods="norm", aten="norm linalg_vector_norm"),
    _op("logsumexp", "input dim keepdim", functions=(torch.logsumexp,), methods="logsumexp", aten="logsumexp"),
    _op("glu", "input dim", functions=(F.glu,), aten="glu", modules=(nn.GLU,)),
    _op("normalize", "input p dim eps", functions=(F.normalize,)),
    _op("max_pool1d", _POOL, functions=(F.max_pool1d, torch.max_pool1d), aten="max_pool1d", modules=(nn.MaxPool1d,)),
    _op("max_pool2d", _POOL, functions=(F.max_pool2d, torch.max_pool2d), aten="max_pool2d", modules=(nn.MaxPool2d,)),
    _op("max_pool3d", _POOL, functions=(F.max_pool3d, torch.max_pool3d), aten="max_pool3d", modules=(nn.MaxPool3d,)),
    _op("avg_pool1d", _AVERAGE_POOL, functions=(F.avg_pool1d,), aten="avg_pool1d", modules=(nn.AvgPool1d,)),
    _op("avg_pool2d", _AVERAGE_POOL, functions=(F.avg_pool2d,), aten="avg_pool2d", modules=(nn.AvgPool2d,)),
    _op("avg_pool3d", _AVERAGE_POOL, functions=(F.avg_pool3d,), aten="avg_pool3d", modules=(nn.AvgPool3d,)),
    _op("adaptive_avg_pool1d", "input output_size", functions=(F.adaptive_avg_pool1d,), aten="adaptive_avg_pool1d", modules=(nn.AdaptiveAvgPool1d,)),
    _op("adaptive_avg_pool2d", "input output_size", functions=(F.adaptive_avg_pool2d,), aten="adaptive_avg_pool2d", modules=(nn.AdaptiveAvgPool2d,)),
    _op("adaptive_avg_pool3d", "input output_size", functions=(F.adaptive_avg_pool3d,), aten="adaptive_avg_pool3d", modules=(nn.AdaptiveAvgPool3d,)),
    _op("adaptive_max_pool2d", "input output_size", functions=(F.adaptive_max_pool2d,), aten="adaptive_max_pool2d", modules=(nn.AdaptiveMaxPool2d,)),
    _op("interpolate", "input size scale_factor mode align_corners", functions=(F.interpolate,), modules=(nn.Upsample,)),
)  # fmt: skip
