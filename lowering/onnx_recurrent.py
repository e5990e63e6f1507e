"""LSTM, GRU and RNN as the operators that ONNX has for them, one for each layer, for sequences of any length.

torch's exporter gives the same operators, but finds the shapes of what they give by running a Python loop over the
steps: that takes seconds, and fixes the length wherever a shape is used. Here the shapes are told.

    gates:   torch i f g o, ONNX i o f g        torch r z n, ONNX z r n (the bias inside of the product with r)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from fxopt.lowering.onnx_nodes import nodes

if TYPE_CHECKING:
    from fxopt.program import Program

__all__ = ["recurrent_layers", "spelled"]

_ORDERS = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN_TANH": (0,), "RNN_RELU": (0,)}


def recurrent_layers(program: Program) -> list[str]:
    """The names of the nodes that call a layer which ONNX has an operator for."""
    return [node.name for node in program.nodes if _is_sayable(program, node)]


def spelled(layer: nn.Module) -> nn.Module:
    """A module that is called like the layer and is exported as the operators of ONNX; it does not run."""
    assert isinstance(layer, nn.RNNBase)
    return _Recurrent(layer)


def _is_sayable(program: Program, node: fx.Node) -> bool:
    module = program.module_of(node)
    return isinstance(module, nn.RNNBase) and type(module) in (nn.LSTM, nn.GRU, nn.RNN) and not module.proj_size


class _Recurrent(nn.Module):
    """The operators of one `nn.RNNBase`."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.operator, _, activation = layer.mode.partition("_")
        self.batch_first = layer.batch_first
        self.layers = layer.num_layers
        self.directions = 2 if layer.bidirectional else 1
        self.hidden = layer.hidden_size
        self.attributes: dict[str, Any] = {
            "hidden_size": self.hidden,
            "direction": "bidirectional" if layer.bidirectional else "forward",
        }
        if self.operator == "GRU":
            self.attributes["linear_before_reset"] = 1
        if activation:
            self.attributes["activations"] = [activation.capitalize()] * self.directions
        order = _ORDERS[layer.mode]
        ends = ("", "_reverse")[: self.directions]
        for index in range(self.layers):
            for kind in ("weight_ih", "weight_hh"):
                parts = [_reordered(getattr(layer, f"{kind}_l{index}{end}"), order) for end in ends]
                self.register_buffer(f"{kind}_{index}", torch.stack(parts))
            if layer.bias:
                named = [[f"{kind}_l{index}{end}" for kind in ("bias_ih", "bias_hh")] for end in ends]
                pairs = [torch.cat([_reordered(getattr(layer, name), order) for name in names]) for names in named]
                self.register_buffer(f"bias_{index}", torch.stack(pairs))

    def forward(self, input: Tensor, hx: Any = None) -> Any:  # noqa: A002 (the name that torch gives it)
        alone = input.dim() == 2  # a sequence without a batch
        value = input.unsqueeze(1) if alone else input.transpose(0, 1) if self.batch_first else input
        given = () if hx is None else hx if isinstance(hx, tuple | list) else (hx,)
        starts = [state.unsqueeze(1) if alone else state for state in given]
        ends: list[list[Tensor]] = []
        for index in range(self.layers):
            mine = slice(index * self.directions, (index + 1) * self.directions)
            value, *states = self._layer(index, value, [state[mine] for state in starts])
            ends.append(states)
        last = [torch.cat(states) for states in zip(*ends, strict=True)]
        if alone:
            value, last = value.squeeze(1), [state.squeeze(1) for state in last]
        elif self.batch_first:
            value = value.transpose(0, 1)
        return value, (last[0] if len(last) == 1 else tuple(last))

    def _layer(self, index: int, value: Tensor, starts: list[Tensor]) -> list[Tensor]:
        """What one layer gives: [steps, batch, directions x hidden], and its last states."""
        steps, batch, _ = value.shape
        state = (self.directions, batch, self.hidden)
        shapes = [(steps, *state), *[state] * (2 if self.operator == "LSTM" else 1)]
        found, *states = nodes(
            self.operator,
            [
                value,
                self.get_buffer(f"weight_ih_{index}"),
                self.get_buffer(f"weight_hh_{index}"),
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
