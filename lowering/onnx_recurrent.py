"""LSTM, GRU and RNN as the operators that ONNX has for them, one for each layer, for sequences of any length.

torch's exporter gives the same operators, but finds the shapes of what they give by running a Python loop over the
steps: that takes seconds, and fixes the length wherever a shape is used. Here the shapes are told.

    gates:   torch i f g o, ONNX i o f g        torch r z n, ONNX z r n (the bias inside of the product with r)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from fxopt import edit
from fxopt.errors import BackendError
from fxopt.lowering.onnx_nodes import nodes

if TYPE_CHECKING:
    from fxopt.program import Program

__all__ = ["spell_recurrences"]

_PROJECTIONS = "ONNX has no LSTM with projections (proj_size): backend='eager' runs it"
_ORDERS = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2), "rnn_tanh": (0,), "rnn_relu": (0,)}


class _Kind(NamedTuple):
    """What a layer computes.

    Attributes:
        mode: one of `_ORDERS`.
        layers: how many in a row.
        directions: 1 or 2.
        biases: whether it has some.
        batch_first: whether the batch is the first axis of a sequence, and not the second.
    """

    mode: str
    layers: int
    directions: int
    biases: bool
    batch_first: bool


def spell_recurrences(program: Program) -> Program:
    """The program itself if it holds no such layer, else a copy where layers are what is exported as ONNX's operators.

    Raises:
        BackendError: for a layer with projections, which ONNX does not know, and torch's exporter gets wrong.
    """
    modules = [node.name for node in program.nodes if _is_sayable(program.module_of(node))]
    calls = [node.name for node in program.nodes if _is_sayable_call(node)]
    if not modules and not calls:
        return program
    spelled = program.copy()
    for name in modules:
        edit.set_module(
            spelled, spelled.node(name), _of_module(cast("nn.Module", program.module_of(program.node(name))))
        )
    for name in calls:
        node = spelled.node(name)
        edit.replace(spelled, node, _of_call(spelled, node), node.args[:2])
    return spelled


def _is_sayable(module: nn.Module | None) -> bool:
    if type(module) not in (nn.LSTM, nn.GRU, nn.RNN, InSingle):
        return False
    if _layer(module).proj_size:
        raise BackendError(_PROJECTIONS)
    return True


def _layer(module: Any) -> nn.RNNBase:
    return cast("nn.RNNBase", module.layer if isinstance(module, InSingle) else module)


def _of_module(module: nn.Module) -> nn.Module:
    layer = _layer(module)
    kind = _Kind(
        layer.mode.lower(), layer.num_layers, 2 if layer.bidirectional else 1, bool(layer.bias), layer.batch_first
    )
    # by name: the list that a layer keeps of its weights may be older than these
    weights = [getattr(layer, name) for names in layer._all_weights for name in names]
    spelled = _Recurrent(kind, weights, nested=True)
    return InSingle(spelled, module.dtype) if isinstance(module, InSingle) else spelled


def _is_sayable_call(node: fx.Node) -> bool:
    """Whether it is such an operator, over weights that are there."""
    if node.op != "call_function" or node.target not in _operators() or node.kwargs:
        return False
    _, _, weights, biases, layers, _, _, bidirectional, _ = node.args
    listed = cast("list[fx.Node]", weights)
    if len(listed) != cast("int", layers) * (2 if bidirectional else 1) * (4 if biases else 2):
        raise BackendError(_PROJECTIONS)
    return all(item.op == "get_attr" for item in listed)


def _of_call(program: Program, node: fx.Node) -> nn.Module:
    _, _, weights, biases, layers, _, _, bidirectional, batch_first = cast("tuple[Any, ...]", node.args)
    kind = _Kind(_operators()[node.target], layers, 2 if bidirectional else 1, biases, batch_first)
    return _Recurrent(kind, [cast("Tensor", program.tensor_of(item)) for item in weights], nested=False)


def _operators() -> dict[Any, str]:
    aten = torch.ops.aten
    return {
        aten.lstm.input: "lstm",
        aten.gru.input: "gru",
        aten.rnn_tanh.input: "rnn_tanh",
        aten.rnn_relu.input: "rnn_relu",
    }


class InSingle(nn.Module):
    """A recurrent layer of 16 bits that computes in float32.

    Attributes:
        layer: in float32.
        dtype: what it takes and gives.
    """

    def __init__(self, layer: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer = layer
        self.dtype = dtype

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = tree_map(lambda item: item.float() if isinstance(item, Tensor) else item, (args, kwargs))
        return tree_map(lambda item: item.to(self.dtype), self.layer(*given[0], **given[1]))


class _Recurrent(nn.Module):
    """The operators of one layer; it does not run.

    Attributes:
        nested: whether the states come as those of an `nn.RNNBase` do, or behind the output.
    """

    def __init__(self, kind: _Kind, weights: Sequence[Tensor], *, nested: bool) -> None:
        super().__init__()
        self.kind = kind
        self.nested = nested
        self.hidden = weights[1].shape[1]
        self.operator, _, activation = kind.mode.partition("_")
        self.attributes: dict[str, Any] = {
            "hidden_size": self.hidden,
            "direction": "bidirectional" if kind.directions == 2 else "forward",
        }
        if self.operator == "gru":
            self.attributes["linear_before_reset"] = 1
        if activation:
            self.attributes["activations"] = [activation.capitalize()] * kind.directions
        each = 4 if kind.biases else 2
        ordered = [_reordered(weight, _ORDERS[kind.mode]) for weight in weights]
        cells = [ordered[start : start + each] for start in range(0, len(ordered), each)]
        for index in range(kind.layers):
            mine = cells[index * kind.directions : (index + 1) * kind.directions]
            self.register_buffer(f"input_{index}", torch.stack([cell[0] for cell in mine]))
            self.register_buffer(f"recurrent_{index}", torch.stack([cell[1] for cell in mine]))
            if kind.biases:
                self.register_buffer(f"bias_{index}", torch.stack([torch.cat(cell[2:]) for cell in mine]))

    def forward(self, input: Tensor, hx: Any = None) -> Any:  # noqa: A002 (the name that torch gives it)
        alone = input.dim() == 2  # a sequence without a batch
        value = input.unsqueeze(1) if alone else input.transpose(0, 1) if self.kind.batch_first else input
        given = () if hx is None else hx if isinstance(hx, tuple | list) else (hx,)
        starts = [state.unsqueeze(1) if alone else state for state in given]
        ends: list[list[Tensor]] = []
        for index in range(self.kind.layers):
            mine = slice(index * self.kind.directions, (index + 1) * self.kind.directions)
            value, *states = self._layer(index, value, [state[mine] for state in starts])
            ends.append(states)
        last = [torch.cat(states) for states in zip(*ends, strict=True)]
        if alone:
            value, last = value.squeeze(1), [state.squeeze(1) for state in last]
        elif self.kind.batch_first:
            value = value.transpose(0, 1)
        if not self.nested:
            return (value, *last)
        return value, (last[0] if len(last) == 1 else tuple(last))

    def _layer(self, index: int, value: Tensor, starts: list[Tensor]) -> list[Tensor]:
        """What one layer gives: [steps, batch, directions x hidden], and its last states."""
        steps, batch, _ = value.shape
        state = (self.kind.directions, batch, self.hidden)
        shapes = [(steps, *state), *[state] * (2 if self.operator == "lstm" else 1)]
        found, *states = nodes(
            self.operator.upper(),
            [
                value,
                self.get_buffer(f"input_{index}"),
                self.get_buffer(f"recurrent_{index}"),
                self._buffers.get(f"bias_{index}"),
                *([None, *starts] if starts else []),
            ],
            [value.dtype] * len(shapes),
            shapes,
            self.attributes,
        )
        return [found.transpose(1, 2).flatten(2), *states]


def _reordered(tensor: Tensor, order: tuple[int, ...]) -> Tensor:
    """The gates in another order."""
    gates = tensor.detach().chunk(len(order))
    return torch.cat([gates[index] for index in order])
