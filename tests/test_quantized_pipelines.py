"""Compressed, folded, quantized, and run by ONNX Runtime with integer kernels: whole pipelines, end to end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt.testing import assert_untouched, model_state

pytestmark = pytest.mark.usefixtures("integers_everywhere")

PIPELINES: dict[str, list[str]] = {
    "pruned": ["prune_channels(ratio=0.25, round_to=4, min_channels=4)", "fold_batch_norm", "quantize"],
    "low rank": ["factorize_low_rank(ratio=0.6, round_to=4)", "fold_batch_norm", "quantize"],
    "sparse": ["fold_batch_norm", "prune_weights(sparsity=0.5)", "quantize"],
    "depthwise": [
        "substitute_depthwise_separable(multiplier=4, max_error=None)",
        "reestimate_batch_norm",
        "fold_batch_norm",
        "quantize",
    ],
}


class Network(nn.Module):
    """Residual blocks, a branch and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = self.unit(3, 16)
        self.first, self.second = self.unit(16, 16), self.unit(16, 16)
        self.down = self.unit(16, 32, stride=2)
        self.branches = nn.ModuleList([self.unit(32, 16), self.unit(32, 24)])
        self.head = nn.Linear(40, 10)

    @staticmethod
    def unit(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.down(self.second(self.first(x)) + x)
        out: Tensor = self.head(torch.cat([branch(x) for branch in self.branches], 1).mean((2, 3)))
        return out


@pytest.fixture(scope="module")
def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(24, 3, 16, 16, generator=generator) for _ in range(3)]


@pytest.fixture(scope="module")
def model(batches: list[Tensor]) -> nn.Module:
    torch.manual_seed(0)
    network = Network()
    for batch in batches * 8:
        network(batch)
    return network.eval()


def centred_sqnr(expected: Tensor, found: Tensor) -> float:
    """Of what differs between samples."""
    return float(10 * torch.log10((expected - expected.mean(0)).square().sum() / (expected - found).square().sum()))


@pytest.mark.parametrize("name", PIPELINES)
def test_from_the_model_to_an_integer_engine(
    name: str, model: nn.Module, batches: list[Tensor], tmp_path: Path
) -> None:
    state = model_state(model)
    passes: list[Any] = PIPELINES[name]
    compiled = fxopt.compile(model, (batches[0][:2],), passes=passes, calibration=batches, backend="onnx")
    assert_untouched(model, state)
    for report in compiled.report.passes:
        assert report.rewrites, report.name
        assert not [skip for skip in report.skips if "rolled back" in skip.why]
    # what the integers cost, not what was cut away before
    cut = fxopt.optimize(model, (batches[0][:2],), passes[:-1], calibration=batches)
    with torch.no_grad():
        assert centred_sqnr(cut.module(batches[1]), compiled(batches[1])) > 20
    compiled.save(tmp_path / "engine")
    assert torch.equal(fxopt.load(tmp_path / "engine")(batches[2]), compiled(batches[2]))
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(tmp_path / "engine" / "model.onnx", options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert {"QLinearConv", "QLinearAdd", "QLinearConcat", "QGemm"} <= set(kinds)
    assert not {"Conv", "Gemm", "MatMul", "BatchNormalization"} & set(kinds)
