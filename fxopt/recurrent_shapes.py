"""The shapes of what recurrent layers give, found without running their steps.

Where tensors have no data, torch runs a Python loop over the steps of a layer: a thousand of them take a minute.
`torch.export` does so too, though it keeps the layer as one operator, and fixes the length by it. The shapes follow
from the arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["ShapesAlone", "whole_recurrences"]

_KEY = torch._C.DispatchKey.CompositeImplicitAutograd


class ShapesAlone(TorchFunctionMode):
    """While it is open, recurrent layers give tensors that have a shape and no values: for tensors without data."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kernel, place = _FUNCTIONS.get(func, (None, 0))
        # a packed sequence has a tensor there
        if kernel is not None and not kwargs and isinstance(args[place], tuple | list):
            return kernel(*args)
        return func(*args, **(kwargs or {}))


@contextmanager
def whole_recurrences() -> Iterator[None]:
    """While it is open, `torch.export` takes sequences of any length through LSTM, GRU and RNN.

    It puts kernels into the tables that torch's tracing looks into, as torch's own patches of these operators do; calls
    that are not traced do not look there.
    """
    aten = torch.ops.aten
    shapes: dict[Any, Callable[..., Any]] = {
        aten.lstm.input: _lstm,
        aten.gru.input: _one_state,
        aten.rnn_tanh.input: _one_state,
        aten.rnn_relu.input: _one_state,
    }
    before = {operator: operator.py_kernels.get(_KEY) for operator in shapes}
    try:
        for operator, kernel in shapes.items():
            _put(operator, kernel)
        yield
    finally:
        for operator, kernel in before.items():
            _put(operator, kernel)


def _put(operator: Any, kernel: Any) -> None:
    if kernel is None:
        operator.py_kernels.pop(_KEY, None)
    else:
        operator.py_kernels[_KEY] = kernel
    operator._dispatch_cache.clear()  # what was called before is remembered there


def _lstm(value: Tensor, states: list[Tensor], *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    hidden, cell = states
    return _outputs(value, hidden, *arguments), hidden.new_empty(hidden.shape), cell.new_empty(cell.shape)


def _one_state(value: Tensor, hidden: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return _outputs(value, hidden, *arguments), hidden.new_empty(hidden.shape)


_FUNCTIONS: dict[Any, tuple[Callable[..., Any], int]] = {
    torch.lstm: (_lstm, 1),
    torch.gru: (_one_state, 2),
    torch.rnn_tanh: (_one_state, 2),
    torch.rnn_relu: (_one_state, 2),
}
"""Kernels, and the place of an argument that is a list."""


def _outputs(
    value: Tensor,
    hidden: Tensor,
    params: list[Tensor],  # noqa: ARG001 (torch's order of arguments)
    has_biases: bool,  # noqa: ARG001
    num_layers: int,  # noqa: ARG001
    dropout: float,  # noqa: ARG001
    train: bool,  # noqa: ARG001
    bidirectional: bool,
    batch_first: bool,  # noqa: ARG001
) -> Tensor:
    return value.new_empty((*value.shape[:-1], hidden.shape[-1] * (2 if bidirectional else 1)))
