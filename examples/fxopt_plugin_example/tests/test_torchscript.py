"""The backend as users have it: found by name, right, saved, loaded, and clear about wrong calls."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import fxopt

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Linear(4, 5)

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.head(self.body(image).mean((2, 3))), "image": image}


@pytest.mark.parametrize("spec", ["torchscript", "torchscript(freeze=False)"])
def test_answers_like_the_model_and_is_saved(spec: str, tmp_path: Path) -> None:
    model = Net().eval()
    compiled = fxopt.compile(model, (IMAGE,), backend=spec)
    compiled.save(tmp_path / "engine")
    for engine in (compiled, fxopt.load(tmp_path / "engine")):
        for size in (1, 2, 5):
            image = torch.randn(size, 3, 8, 8)
            answer = engine(image)
            torch.testing.assert_close(answer["logits"], model(image)["logits"], rtol=1e-4, atol=1e-5)
            assert answer["image"].data_ptr() != image.data_ptr()


def test_integers() -> None:
    batches = [torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    compiled = fxopt.compile(
        Net().eval(), (IMAGE,), passes=["default", "quantize"], calibration=batches, backend="torchscript"
    )
    assert compiled.report.passes[-1].rewrites


def test_wrong_calls() -> None:
    compiled = fxopt.compile(Net().eval(), (IMAGE,), backend="torchscript", dynamic_batch=False)
    with pytest.raises(fxopt.InputError, match="expected shape"):
        compiled(IMAGE[:1])
    with pytest.raises(fxopt.InputError, match="convert it first"):
        compiled(IMAGE.double())


def test_a_file_that_is_none(tmp_path: Path) -> None:
    compiled = fxopt.compile(Net().eval(), (IMAGE,), backend="torchscript")
    compiled.save(tmp_path / "engine")
    (tmp_path / "engine" / "model.ts").write_bytes(b"nothing")
    with pytest.raises(fxopt.ArtifactError):
        fxopt.load(tmp_path / "engine")
