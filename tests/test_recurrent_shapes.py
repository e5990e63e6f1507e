from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from fxopt.analysis.shapes import record_shapes, shapes
from fxopt.recurrent_shapes import ShapesAlone, whole_recurrences

LAYERS = [
    nn.LSTM(5, 4, num_layers=2, bidirectional=True),
    nn.LSTM(5, 4, proj_size=3, batch_first=True),
    nn.GRU(5, 4, bidirectional=True),
    nn.RNN(5, 4, nonlinearity="relu"),
]


@pytest.mark.parametrize("layer", LAYERS, ids=["lstm", "projected", "gru", "rnn"])
def test_shapes_are_those_of_a_run(layer: nn.Module) -> None:
    program = fxopt.capture(layer.eval(), torch.randn(6, 2, 5))
    found = shapes(program)
    record_shapes(program)
    assert found == program.analysis(shapes)


def test_no_step_is_run_without_data() -> None:
    layer = nn.LSTM(5, 4).to("meta")
    with torch.device("meta"), ShapesAlone():
        given, (hidden, cell) = layer(torch.empty(100_000_000, 2, 5))  # steps would take days
    assert given.shape == (100_000_000, 2, 4)
    assert hidden.shape == cell.shape == (1, 2, 4)


def test_packed_sequences_are_left_to_torch() -> None:
    packed = nn.utils.rnn.pack_sequence([torch.randn(3, 5), torch.randn(2, 5)])
    layer = nn.GRU(5, 4)
    with ShapesAlone():
        found = layer(packed)[0].data
    assert torch.equal(found, layer(packed)[0].data)


@pytest.mark.filterwarnings("ignore:The tensor attributes? .*_flat_weights")
@pytest.mark.parametrize("layer", LAYERS, ids=["lstm", "projected", "gru", "rnn"])
def test_export_keeps_the_length_free(layer: nn.Module) -> None:
    auto: Any = torch.export.Dim.AUTO
    before = dict(torch.ops.aten.lstm.input.py_kernels)
    with whole_recurrences():
        exported = torch.export.export(layer.eval(), (torch.randn(6, 2, 5),), dynamic_shapes=({0: auto},), strict=False)
    assert torch.ops.aten.lstm.input.py_kernels == before
    x = torch.randn(9, 2, 5)
    torch.testing.assert_close(exported.module(check_guards=False)(x), layer(x))
