from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from fxopt.errors import BackendError
from fxopt.lowering import OnnxBackend

BACKEND = OnnxBackend(num_threads=1)


class Started(nn.Module):
    """A layer that is given its first state."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor, *states: torch.Tensor) -> Any:
        return self.layer(x, states[0] if len(states) == 1 else states)


def operators(compiled: fxopt.Compiled) -> list[str]:
    return [layer["type"] for layer in compiled.engine.layers()]


@pytest.mark.parametrize(
    "layer",
    [
        nn.LSTM(5, 4, num_layers=2, bidirectional=True),
        nn.GRU(5, 4, num_layers=2, bias=False, batch_first=True),
        nn.RNN(5, 4, bidirectional=True, nonlinearity="relu"),
        nn.RNN(5, 4, batch_first=True),
    ],
    ids=["lstm", "gru", "relu", "tanh"],
)
def test_layers_are_operators_of_onnx(layer: nn.RNNBase) -> None:
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    states = [torch.randn(count, 3, 4) for _ in range(2 if isinstance(layer, nn.LSTM) else 1)]
    x = torch.randn(3, 7, 5) if layer.batch_first else torch.randn(7, 3, 5)
    model = Started(layer).eval()
    compiled = fxopt.compile(model, (x, *states), passes=[], backend=BACKEND, dynamic_batch=False)
    torch.testing.assert_close(compiled(x, *states), model(x, *states), rtol=1e-4, atol=1e-5)
    names = [name for name in operators(compiled) if layer.mode.startswith(name)]
    assert len(names) == layer.num_layers


def test_a_sequence_without_a_batch() -> None:
    layer = nn.LSTM(5, 4).eval()
    x = torch.randn(7, 5)
    compiled = fxopt.compile(layer, x, passes=[], backend=BACKEND, dynamic_axes={"input": {0: "length"}})
    for length in (7, 11):
        x = torch.randn(length, 5)
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("inside", [True, False], ids=["module", "operator"])
def test_projections_are_refused(inside: bool) -> None:
    layer = nn.LSTM(5, 4, proj_size=2)
    program = fxopt.capture((nn.Sequential(layer) if inside else layer).eval(), torch.randn(3, 2, 5))
    with pytest.raises(BackendError, match=r"ONNX has no LSTM with projections \(proj_size\)"):
        BACKEND.lower(program, dynamic_batch=True)
