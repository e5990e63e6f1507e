"""LSTM and GRU whose matrix products are of integers; gates and states stay in float32.

They take and give what `torch.nn.LSTM` and `torch.nn.GRU` do. Each layer is an operator of
`fxopt/integer_operators.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from fxopt.integer_operators import DYNAMIC_GRU, DYNAMIC_LSTM

__all__ = ["DynamicGRU", "DynamicLSTM", "DynamicRecurrent", "GRULayer", "LSTMLayer", "in_onnx_order"]


class LSTMLayer(NamedTuple):
    """The tensors of one layer, as `torch.ops.fxopt.dynamic_lstm` takes them."""

    codes: Tensor
    scale: Tensor
    recurrent_codes: Tensor
    recurrent_scale: Tensor
    bias: Tensor


class GRULayer(NamedTuple):
    """The tensors of one layer, as `torch.ops.fxopt.dynamic_gru` takes them."""

    codes: Tensor
    scale: Tensor
    bias: Tensor
    recurrent_codes: Tensor
    recurrent_scale: Tensor
    recurrent_bias: Tensor


def in_onnx_order(gates: Tensor) -> Tensor:
    """The rows of a weight of torch's LSTM (input, forget, cell, output) as input, output, forget, cell."""
    opened, kept, new, shown = gates.chunk(4)
    return torch.cat([opened, shown, kept, new])


class DynamicRecurrent(nn.Module):
    """Computes with integers. Subclasses say what one layer does.

    Attributes:
        gates: how many products each state is made of.
        operator: what computes one layer.
        tensors: what it takes behind its input and its states.
        batch_first: whether the batch is on axis 0 of what it reads and gives.
        layers: how many there are; the tensors of layer i are `codes_i`, `scale_i` and so on.
    """

    gates: ClassVar[int]
    operator: ClassVar[Any]
    tensors: ClassVar[type[LSTMLayer] | type[GRULayer]]

    def __init__(self, layers: Sequence[LSTMLayer | GRULayer], *, batch_first: bool) -> None:
        super().__init__()
        self.layers, self.batch_first = len(layers), batch_first
        for index, layer in enumerate(layers):
            for name, tensor in layer._asdict().items():
                if isinstance(tensor, nn.Parameter):
                    self.register_parameter(f"{name}_{index}", tensor)
                else:
                    self.register_buffer(f"{name}_{index}", tensor)

    @property
    def held(self) -> Mapping[str, int]:
        """How many numbers of the model a buffer stands for."""
        names = [f"{name}_{index}" for index in range(self.layers) for name in ("codes", "recurrent_codes")]
        return {name: self.get_buffer(name).numel() for name in names}

    def layer(self, index: int) -> LSTMLayer | GRULayer:
        """The tensors of one layer."""
        return self.tensors(*(getattr(self, f"{name}_{index}") for name in self.tensors._fields))

    def run(self, index: int, value: Tensor, states: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What one layer gives, steps on axis 0, and its states at the end."""
        found: tuple[Tensor, ...] = self.operator(value, *states, *self.layer(index))
        return found

    def through(self, value: Tensor, states: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What the last layer gives, and the states of all at the end.

        Args:
            value: what the first one reads.
            states: at the beginning, of all layers.
        """
        value = value.transpose(0, 1) if self.batch_first else value
        ends = []
        for index in range(self.layers):
            directions = len(self.get_buffer(f"codes_{index}"))
            mine = slice(index * directions, (index + 1) * directions)
            value, *last = self.run(index, value, [state[mine] for state in states])
            ends.append(last)
        given = value.transpose(0, 1) if self.batch_first else value
        return given, *(torch.cat(states) for states in zip(*ends, strict=True))

    def zeros(self, value: Tensor) -> Tensor:
        """States to begin with, for what the first layer reads."""
        directions, states = self.get_buffer("recurrent_codes_0").shape[:2]
        return value.new_zeros(self.layers * directions, value.shape[0 if self.batch_first else 1], states)

    def macs(self, rows: int) -> int:
        """How many products it adds up for so many steps of samples."""
        return rows * sum(self.held.values())

    def extra_repr(self) -> str:
        """What the text of a program shows."""
        directions, inputs, products = self.get_buffer("codes_0").shape
        text = f"{inputs}, {products // self.gates}, int8" + (f", num_layers={self.layers}" if self.layers > 1 else "")
        text += ", batch_first=True" if self.batch_first else ""
        return text + (", bidirectional=True" if directions > 1 else "")


class DynamicLSTM(DynamicRecurrent):
    """An LSTM of `LSTMLayer`s."""

    gates, operator, tensors = 4, DYNAMIC_LSTM, LSTMLayer

    def forward(
        self,
        input: Tensor,  # noqa: A002 (the name that torch gives it)
        hx: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """What the last layer gives, and the hidden and cell states of all at the end."""
        given, hidden, cell = self.through(input, [self.zeros(input)] * 2 if hx is None else hx)
        return given, (hidden, cell)


class DynamicGRU(DynamicRecurrent):
    """A GRU of `GRULayer`s."""

    gates, operator, tensors = 3, DYNAMIC_GRU, GRULayer

    def forward(
        self,
        input: Tensor,  # noqa: A002 (the name that torch gives it)
        hx: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What the last layer gives, and the states of all at the end."""
        given, hidden = self.through(input, [self.zeros(input) if hx is None else hx])
        return given, hidden
