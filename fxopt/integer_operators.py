"""Operators that quantize what they read as they run, to compute with integers: `torch.ops.fxopt.*`.

    low = min(x, 0),  high = max(x, 0)      over all numbers of the tensor
    s   = (high - low) / 255,               1 where there is nothing but zero
    z   = round(clip(-low / s, 0, 255))
    q   = clip(round(x / s) + z, 0, 255)    halves to the even number

which is ONNX's DynamicQuantizeLinear. The sum of products (q - z) w is a whole number, held exactly; it is multiplied
by s times the scale of the output, and the bias is added in float32. Torch computes here what integer kernels give.
Importing this file registers the operators.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["DYNAMIC_GRU", "DYNAMIC_LINEAR", "DYNAMIC_LSTM"]

_HIGHEST = 255.0


class _Quantized(NamedTuple):
    """What stands for a tensor.

    Attributes:
        codes: whole numbers, the zero point subtracted, float64.
        scale: float32[].
    """

    codes: Tensor
    scale: Tensor


def _quantized(value: Tensor) -> _Quantized:
    if not value.numel():
        return _Quantized(value.double(), value.new_ones(()))
    low, high = value.amin().clamp(max=0), value.amax().clamp(min=0)
    scale = torch.where(high > low, (high - low) / _HIGHEST, 1.0)
    zero = (-low / scale).clamp(0, _HIGHEST).round()
    return _Quantized(((value / scale).round() + zero).clamp(0, _HIGHEST).sub(zero).double(), scale)


def _product(value: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """Of a value that is quantized on the way and integers, [..., inputs] and [inputs, outputs]."""
    read = _quantized(value)
    # in float64 sums of 2^37 such products are whole numbers; engines have them as int32
    return (read.codes @ codes.double()).float() * (read.scale * scale)


@torch.library.custom_op("fxopt::dynamic_linear", mutates_args=())
def _dynamic_linear(value: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer.

    Args:
        value: float32[..., inputs].
        codes: int8[inputs, outputs].
        scale: float32[outputs].
        bias: float32[outputs], or None.
    """
    found = _product(value, codes, scale)
    return found if bias is None else found + bias


@_dynamic_linear.register_fake
def _(value: Tensor, codes: Tensor, *_: Any) -> Tensor:
    return value.new_empty((*value.shape[:-1], codes.shape[1]))


def _recurrent(
    value: Tensor,
    states: Sequence[Tensor],
    codes: Tensor,
    scale: Tensor,
    bias: Tensor,
    step: Callable[[int, Tensor, Sequence[Tensor]], Sequence[Tensor]],
) -> tuple[Tensor, ...]:
    """One recurrent layer, forward or in both directions: what it gives, and its states at the end.

    Args:
        value: float32[steps, batch, inputs].
        states: at the beginning, float32[directions, batch, n] each.
        codes: int8[directions, inputs, gates], of what the input is multiplied by.
        scale: float32[directions, gates].
        bias: float32[directions, gates].
        step: the states behind a step, the first of which it gives, by direction, what the input gives and the states.
    """
    outputs, ends = [], []
    for direction in range(len(codes)):
        read = _product(value, codes[direction], scale[direction]) + bias[direction]
        now: Sequence[Tensor] = [state[direction] for state in states]
        given = list(read.unbind(0))
        for place in range(len(given)) if direction == 0 else reversed(range(len(given))):
            now = step(direction, given[place], now)
            given[place] = now[0]
        outputs.append(torch.stack(given))
        ends.append(now)
    return torch.cat(outputs, 2), *(torch.stack(last) for last in zip(*ends, strict=True))


@torch.library.custom_op("fxopt::dynamic_lstm", mutates_args=())
def _dynamic_lstm(
    value: Tensor,
    hidden: Tensor,
    cell: Tensor,
    codes: Tensor,
    scale: Tensor,
    recurrent_codes: Tensor,
    recurrent_scale: Tensor,
    bias: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer of an LSTM, forward or in both directions. Gates in ONNX's order: input, output, forget, cell.

    What is read is quantized as a whole, and the hidden state at every step. ONNX Runtime does the same on one thread;
    several share the batch, and find a range for each share of the hidden state.

    Args:
        value: float32[steps, batch, inputs].
        hidden: at the beginning, float32[directions, batch, n].
        cell: at the beginning, float32[directions, batch, n].
        codes: int8[directions, inputs, 4 n].
        scale: float32[directions, 4 n].
        recurrent_codes: int8[directions, n, 4 n].
        recurrent_scale: float32[directions, 4 n].
        bias: float32[directions, 4 n].

    Returns:
        What it gives, float32[steps, batch, directions * n], and the states at the end.
    """

    def step(direction: int, read: Tensor, states: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        h, c = states
        gates = read + _product(h, recurrent_codes[direction], recurrent_scale[direction])
        opened, shown, kept, new = gates.chunk(4, 1)
        c = kept.sigmoid() * c + opened.sigmoid() * new.tanh()
        return shown.sigmoid() * c.tanh(), c

    given, hidden, cell = _recurrent(value, (hidden, cell), codes, scale, bias, step)
    return given, hidden, cell


@_dynamic_lstm.register_fake
def _(value: Tensor, hidden: Tensor, cell: Tensor, codes: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    width = len(codes) * hidden.shape[2]
    return value.new_empty((*value.shape[:2], width)), torch.empty_like(hidden), torch.empty_like(cell)


@torch.library.custom_op("fxopt::dynamic_gru", mutates_args=())
def _dynamic_gru(
    value: Tensor,
    hidden: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor,
    recurrent_codes: Tensor,
    recurrent_scale: Tensor,
    recurrent_bias: Tensor,
) -> tuple[Tensor, Tensor]:
    """One layer of a GRU, forward or in both directions. Gates in torch's order: reset, update, new.

    What is read is quantized as a whole, and the state at every step.

    Args:
        value: float32[steps, batch, inputs].
        hidden: at the beginning, float32[directions, batch, n].
        codes: int8[directions, inputs, 3 n].
        scale: float32[directions, 3 n].
        bias: float32[directions, 3 n].
        recurrent_codes: int8[directions, n, 3 n].
        recurrent_scale: float32[directions, 3 n].
        recurrent_bias: float32[directions, 3 n].

    Returns:
        What it gives, float32[steps, batch, directions * n], and the states at the end.
    """

    def step(direction: int, read: Tensor, states: Sequence[Tensor]) -> tuple[Tensor]:
        (h,) = states
        mine = _product(h, recurrent_codes[direction], recurrent_scale[direction]) + recurrent_bias[direction]
        (reset, update, new), (to_reset, to_update, known) = read.chunk(3, 1), mine.chunk(3, 1)
        new = (new + (reset + to_reset).sigmoid() * known).tanh()
        return (new + (update + to_update).sigmoid() * (h - new),)

    given, hidden = _recurrent(value, (hidden,), codes, scale, bias, step)
    return given, hidden


@_dynamic_gru.register_fake
def _(value: Tensor, hidden: Tensor, codes: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return value.new_empty((*value.shape[:2], len(codes) * hidden.shape[2])), torch.empty_like(hidden)


DYNAMIC_LINEAR: Any = torch.ops.fxopt.dynamic_linear.default
"""`dynamic_linear(value, codes, scale, bias)`"""

DYNAMIC_LSTM: Any = torch.ops.fxopt.dynamic_lstm.default
"""`dynamic_lstm(value, hidden, cell, codes, scale, recurrent_codes, recurrent_scale, bias)`"""

DYNAMIC_GRU: Any = torch.ops.fxopt.dynamic_gru.default
"""`dynamic_gru(value, hidden, codes, scale, bias, recurrent_codes, recurrent_scale, recurrent_bias)`"""
