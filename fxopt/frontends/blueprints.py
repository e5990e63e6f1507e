"""What a functional call that owns parameters would be as an `nn.Module`: its class, attributes and tensors.

One table maps every spelling of an operator (ATen overloads, `torch.nn.functional`) to a rule; a rule reads the call's
arguments by name and answers with a `Blueprint`, or None where no module computes exactly this call.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

__all__ = ["Blueprint", "blueprint"]

_CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_CONV_TRANSPOSE = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
# An activation of rank 2 or 3 is what BatchNorm1d takes; the other classes take one rank each.
_BATCH_NORM = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
_INSTANCE_NORM = {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}
_TENSORS = ("weight", "bias", "running_mean", "running_var")
_FEATURE_DROPOUT = {3: nn.Dropout1d, 4: nn.Dropout2d, 5: nn.Dropout3d}


class Blueprint(NamedTuple):
    """A module that computes one call.

    Attributes:
        module_class: the `nn.Module` class.
        attributes: its constructor's keyword arguments.
        tensors: get_attr nodes by the module's own parameter and buffer names; None for one it goes without.
        input: what the module is called with.
        training: the mode that the call itself asks for; None where it makes no difference.
    """

    module_class: type[nn.Module]
    attributes: Mapping[str, Any]
    tensors: Mapping[str, fx.Node | None]
    input: fx.Node
    training: bool | None = None


class _Call(NamedTuple):
    """A call's arguments by name, and what is known of the tensors behind them."""

    arguments: Mapping[str, Any]
    shape_of: Callable[[fx.Node], tuple[int, ...]]  # of a get_attr node
    rank: int | None  # of the input, None if unknown
    channels: int | None  # size of the input's axis 1, None if unknown


Rule = Callable[[_Call], "Blueprint | None"]


def blueprint(
    node: fx.Node, shape_of: Callable[[fx.Node], tuple[int, ...]], input_shape: tuple[int | None, ...] | None
) -> Blueprint | None:
    """The module that computes `node`, or None.

    Args:
        node: any node of a graph.
        shape_of: shape of the tensor behind a get_attr node.
        input_shape: shape of the call's first input, None per unknown size; None if its rank is unknown.
    """
    if node.op != "call_function":
        return None
    entry = _table().get(node.target)
    if entry is None:
        return None
    names, defaults, rule = entry
    arguments = {**defaults, **dict(zip(names, node.args, strict=False)), **node.kwargs}
    if not all(_is_attribute(arguments.get(name)) for name in _TENSORS):
        return None
    rank = None if input_shape is None else len(input_shape)
    channels = input_shape[1] if input_shape is not None and len(input_shape) > 1 else None
    found = rule(_Call(arguments, shape_of, rank, channels))
    if found is None or _holds_node(tuple(found.attributes.values())):
        return None
    source: Any = found.input
    return found if isinstance(source, fx.Node) else None


def _is_attribute(value: Any) -> bool:
    """Whether an argument is absent, or read from the model rather than computed."""
    return value is None or (isinstance(value, fx.Node) and value.op == "get_attr")


def _holds_node(values: Any) -> bool:
    if isinstance(values, tuple | list):
        return any(_holds_node(value) for value in values)
    return isinstance(values, fx.Node)


def _each(value: Any, rank: int) -> Any:
    """A convolution's stride, padding ... as a tuple of `rank` entries, or the padding mode as it is."""
    if isinstance(value, str):
        return value
    values = tuple(value) if isinstance(value, tuple | list) else (value,)
    return values * rank if len(values) == 1 else values


def _convolution(rank: int, *, transposed: bool = False) -> Rule:
    def rule(call: _Call) -> Blueprint | None:
        a = call.arguments
        if not isinstance(a["weight"], fx.Node):
            return None
        shape = call.shape_of(a["weight"])
        first, second = shape[0], shape[1] * a["groups"]
        attributes: dict[str, Any] = {
            "in_channels": first if transposed else second,
            "out_channels": second if transposed else first,
            "kernel_size": shape[2:],
            "stride": _each(a["stride"], rank),
            "padding": _each(a["padding"], rank),
            "dilation": _each(a["dilation"], rank),
            "groups": a["groups"],
            "bias": a["bias"] is not None,
        }
        if transposed:
            attributes["output_padding"] = _each(a["output_padding"], rank)
        module_class = (_CONV_TRANSPOSE if transposed else _CONV)[rank]
        return Blueprint(module_class, attributes, _weight_and_bias(a), a["input"])

    return rule


def _general_convolution(call: _Call) -> Blueprint | None:
    a = call.arguments
    if not isinstance(a["weight"], fx.Node) or not isinstance(a["transposed"], bool):
        return None
    rank = len(call.shape_of(a["weight"])) - 2
    if rank not in _CONV:
        return None
    return _convolution(rank, transposed=a["transposed"])(call)


def _weight_and_bias(arguments: Mapping[str, Any]) -> dict[str, fx.Node | None]:
    return {"weight": arguments["weight"], "bias": arguments["bias"]}


def _linear(call: _Call) -> Blueprint | None:
    a = call.arguments
    if not isinstance(a["weight"], fx.Node) or len(call.shape_of(a["weight"])) != 2:
        return None
    out_features, in_features = call.shape_of(a["weight"])
    attributes = {"in_features": in_features, "out_features": out_features, "bias": a["bias"] is not None}
    return Blueprint(nn.Linear, attributes, _weight_and_bias(a), a["input"])


def _embedding(call: _Call) -> Blueprint | None:
    a = call.arguments
    if not isinstance(a["weight"], fx.Node) or a.get("max_norm") is not None:
        return None
    count, size = call.shape_of(a["weight"])
    # ATen spells "no padding index" as -1; the functional form counts negative indices from the end.
    padding = a["padding_idx"]
    padding = None if padding == -1 and "indices" in a else padding
    attributes = {
        "num_embeddings": count,
        "embedding_dim": size,
        "padding_idx": padding,
        "scale_grad_by_freq": a["scale_grad_by_freq"],
        "sparse": a["sparse"],
    }
    return Blueprint(nn.Embedding, attributes, {"weight": a["weight"]}, a["indices"] if "indices" in a else a["input"])


def _prelu(call: _Call) -> Blueprint | None:
    a = call.arguments
    if not isinstance(a["weight"], fx.Node):
        return None
    shape = call.shape_of(a["weight"])
    if len(shape) != 1:
        return None
    return Blueprint(nn.PReLU, {"num_parameters": shape[0]}, {"weight": a["weight"]}, a["input"])


def _batch_norm(call: _Call) -> Blueprint | None:
    a = call.arguments
    module_class = None if call.rank is None else _BATCH_NORM.get(call.rank)
    features = _features(call, "running_mean", "weight")
    tracked = a["running_mean"] is not None
    if module_class is None or features is None or tracked != (a["running_var"] is not None):
        return None
    if not tracked and not a["training"]:
        return None
    attributes = {
        "num_features": features,
        "eps": a["eps"],
        # A BatchNorm of momentum None (cumulative average) passes 0.0 in evaluation, where momentum has no effect.
        "momentum": None if a["momentum"] == 0.0 and not a["training"] else a["momentum"],
        "affine": a["weight"] is not None,
        "track_running_stats": tracked,
    }
    tensors = _weight_and_bias(a) | {"running_mean": a["running_mean"], "running_var": a["running_var"]}
    return Blueprint(module_class, attributes, tensors, a["input"], a["training"] if tracked else None)


def _instance_norm(call: _Call) -> Blueprint | None:
    a = call.arguments
    module_class = None if call.rank is None else _INSTANCE_NORM.get(call.rank)
    features = _features(call, "running_mean", "weight") or call.channels
    tracked = a["running_mean"] is not None
    if module_class is None or features is None or tracked != (a["running_var"] is not None):
        return None
    if not tracked and not a["use_input_stats"]:
        return None
    attributes = {
        "num_features": features,
        "eps": a["eps"],
        "momentum": a["momentum"],
        "affine": a["weight"] is not None,
        "track_running_stats": tracked,
    }
    tensors = _weight_and_bias(a) | {"running_mean": a["running_mean"], "running_var": a["running_var"]}
    return Blueprint(module_class, attributes, tensors, a["input"], a["use_input_stats"] if tracked else None)


def _features(call: _Call, *names: str) -> int | None:
    for name in names:
        node = call.arguments[name]
        if isinstance(node, fx.Node):
            return call.shape_of(node)[0]
    return None


def _layer_norm(call: _Call) -> Blueprint | None:
    a = call.arguments
    if a["weight"] is None and a["bias"] is not None:
        return None
    attributes = {
        "normalized_shape": _shape(a["normalized_shape"]),
        "eps": a["eps"],
        "elementwise_affine": a["weight"] is not None,
        "bias": a["bias"] is not None,
    }
    return Blueprint(nn.LayerNorm, attributes, _weight_and_bias(a), a["input"])


def _rms_norm(call: _Call) -> Blueprint | None:
    a = call.arguments
    attributes = {
        "normalized_shape": _shape(a["normalized_shape"]),
        "eps": a["eps"],
        "elementwise_affine": a["weight"] is not None,
    }
    return Blueprint(nn.RMSNorm, attributes, {"weight": a["weight"]}, a["input"])


def _shape(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, tuple | list | torch.Size) else (value,)


def _group_norm(call: _Call) -> Blueprint | None:
    a = call.arguments
    channels = _features(call, "weight") or call.channels
    if channels is None or (a["weight"] is None) != (a["bias"] is None):
        return None
    attributes = {
        "num_groups": a["num_groups"],
        "num_channels": channels,
        "eps": a["eps"],
        "affine": a["weight"] is not None,
    }
    return Blueprint(nn.GroupNorm, attributes, _weight_and_bias(a), a["input"])


def _dropout(module_class: type[nn.Module], *, inplace: bool = False) -> Rule:
    def rule(call: _Call) -> Blueprint | None:
        a = call.arguments
        attributes = {"p": a["p"], "inplace": inplace or a.get("inplace", False)}
        return Blueprint(module_class, attributes, {}, a["input"], a["training"])

    return rule


def _feature_dropout(*, inplace: bool) -> Rule:
    def rule(call: _Call) -> Blueprint | None:
        module_class = None if call.rank is None else _FEATURE_DROPOUT.get(call.rank)
        return None if module_class is None else _dropout(module_class, inplace=inplace)(call)

    return rule


_Entry = tuple[tuple[str, ...], Mapping[str, Any], Rule]


@cache
def _table() -> Mapping[Any, _Entry]:
    aten = torch.ops.aten
    rules: dict[Any, Rule] = {
        aten.convolution.default: _general_convolution,
        aten.linear.default: _linear,
        aten.embedding.default: _embedding,
        aten.prelu.default: _prelu,
        aten.batch_norm.default: _batch_norm,
        aten.instance_norm.default: _instance_norm,
        aten.layer_norm.default: _layer_norm,
        aten.rms_norm.default: _rms_norm,
        aten.group_norm.default: _group_norm,
        aten.dropout.default: _dropout(nn.Dropout),
        aten.dropout_.default: _dropout(nn.Dropout, inplace=True),
        aten.feature_dropout.default: _feature_dropout(inplace=False),
        aten.feature_dropout_.default: _feature_dropout(inplace=True),
        aten.alpha_dropout.default: _dropout(nn.AlphaDropout),
        aten.alpha_dropout_.default: _dropout(nn.AlphaDropout, inplace=True),
        aten.feature_alpha_dropout.default: _dropout(nn.FeatureAlphaDropout),
        aten.feature_alpha_dropout_.default: _dropout(nn.FeatureAlphaDropout, inplace=True),
        aten.conv_transpose1d.default: _convolution(1, transposed=True),
        aten.conv_transpose2d.input: _convolution(2, transposed=True),
        aten.conv_transpose3d.input: _convolution(3, transposed=True),
        F.embedding: _embedding,
        F.batch_norm: _batch_norm,
        F.instance_norm: _instance_norm,
        F.layer_norm: _layer_norm,
        F.rms_norm: _rms_norm,
        F.group_norm: _group_norm,
        F.dropout: _dropout(nn.Dropout),
        F.dropout1d: _dropout(nn.Dropout1d),
        F.dropout2d: _dropout(nn.Dropout2d),
        F.dropout3d: _dropout(nn.Dropout3d),
        F.alpha_dropout: _dropout(nn.AlphaDropout),
        F.feature_alpha_dropout: _dropout(nn.FeatureAlphaDropout),
    }
    for rank, packet in {1: aten.conv1d, 2: aten.conv2d, 3: aten.conv3d}.items():
        rules[packet.default] = rules[packet.padding] = _convolution(rank)
    table = {target: (*_parameters(target), rule) for target, rule in rules.items()}
    return table | _builtins()


def _builtins() -> dict[Any, _Entry]:
    """Functions written in C++, which tell no signature."""
    plain = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    transposed = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
    defaults = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    entries: dict[Any, _Entry] = {
        F.linear: (plain[:3], {"bias": None}, _linear),
        F.prelu: (plain[:2], {}, _prelu),
    }
    convolutions: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
    upsampling: dict[int, Any] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
    for rank, function in convolutions.items():
        entries[function] = (plain, defaults, _convolution(rank))
    for rank, function in upsampling.items():
        entries[function] = (transposed, defaults | {"output_padding": 0}, _convolution(rank, transposed=True))
    return entries


def _parameters(target: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Names and defaults of a function's parameters; ATen's own names are those of the functional form."""
    if isinstance(target, torch._ops.OpOverload):
        renamed = {"self": "input", "train": "training"}
        arguments = target._schema.arguments
        names = tuple(renamed.get(item.name, item.name) for item in arguments)
        defaults = {
            name: item.default_value for name, item in zip(names, arguments, strict=True) if item.has_default_value()
        }
        return names, defaults
    parameters = inspect.signature(target).parameters
    defaults = {name: item.default for name, item in parameters.items() if item.default is not inspect.Parameter.empty}
    return tuple(parameters), defaults
