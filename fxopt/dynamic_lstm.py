"""An LSTM whose matrix products are of integers; gates and states stay in float32.

Takes and gives what `torch.nn.LSTM` does. Each layer of it is an operator of `fxopt/integer_operators.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fxopt.integer_operators import DYNAMIC_LSTM

__all__ = ["DynamicLSTM", "LSTMLayer", "in_onnx_order"]


class LSTMLayer(NamedTuple):
    """The tensors of one layer, as `torch.ops.fxopt.dynamic_lstm` takes them."""

    codes: Tensor
    scale: Tensor
    recurrent_codes: Tensor
    recurrent_scale: Tensor
    bias: Tensor


def in_onnx_order(gates: Tensor) -> Tensor:
    """The rows of a weight of torch's LSTM (input, forget, cell, output) as input, output, forget, cell."""
    opened, kept, new, shown = gates.chunk(4)
    return torch.cat([opened, shown, kept, new])


class DynamicLSTM(nn.Module):
    """Computes with integers.

    Attributes:
        batch_first: whether the batch is on axis 0 of what it reads and gives.
        layers: how many there are; the tensors of layer i are `codes_i`, `scale_i` and so on.
    """

    def __init__(self, layers: Sequence[LSTMLayer], *, batch_first: bool) -> None:
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

    def layer(self, index: int) -> LSTMLayer:
        """The tensors of one layer."""
        return LSTMLayer(*(getattr(self, f"{name}_{index}") for name in LSTMLayer._fields))

    def run(self, index: int, value: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What one layer gives, steps on axis 0, and its states at the end."""
        found: tuple[Tensor, Tensor, Tensor] = DYNAMIC_LSTM(value, hidden, cell, *self.layer(index))
        return found

    def forward(
        self,
        input: Tensor,  # noqa: A002 (the name that torch gives it)
        hx: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """What the last layer gives, and the hidden and cell states of all at the end."""
        value = input.transpose(0, 1) if self.batch_first else input
        hiddens, cells = [], []
        for index in range(self.layers):
            layer = self.layer(index)
            directions, states = layer.recurrent_codes.shape[:2]
            if hx is None:
                hidden = cell = value.new_zeros(directions, value.shape[1], states)
            else:
                hidden, cell = (state[index * directions : (index + 1) * directions] for state in hx)
            value, hidden, cell = self.run(index, value, hidden, cell)
            hiddens.append(hidden)
            cells.append(cell)
        given = value.transpose(0, 1) if self.batch_first else value
        return given, (torch.cat(hiddens), torch.cat(cells))

    def macs(self, rows: int) -> int:
        """How many products it adds up for so many steps of samples."""
        return rows * sum(self.held.values())

    def extra_repr(self) -> str:
        """What the text of a program shows."""
        first = self.layer(0)
        directions, inputs, gates = first.codes.shape
        text = f"{inputs}, {gates // 4}, int8" + (f", num_layers={self.layers}" if self.layers > 1 else "")
        text += ", batch_first=True" if self.batch_first else ""
        return text + (", bidirectional=True" if directions > 1 else "")
