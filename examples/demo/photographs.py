"""Photographs that scikit-image ships, as input of the network, and the names of the classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy
import skimage.data
import torch
from timm.data import ImageNetInfo
from torch.nn import functional

from examples.demo.model import MEAN, SIZE, STD

PHOTOGRAPHS: Mapping[str, Callable[[], numpy.ndarray]] = {
    "coffee": skimage.data.coffee,
    "cat": skimage.data.chelsea,
    "rocket": skimage.data.rocket,
    "camera man": skimage.data.camera,
    "motorcycle": lambda: skimage.data.stereo_motorcycle()[0],
}


def load_photographs() -> torch.Tensor:
    """All photographs, preprocessed: (number of photographs, 3, 224, 224)."""
    return torch.cat([preprocess(load()) for load in PHOTOGRAPHS.values()])


def preprocess(pixels: numpy.ndarray) -> torch.Tensor:
    """Resizes the shorter side to 256, takes the centre and normalises.

    Args:
        pixels: (height, width, 3) or grey (height, width), values 0..255.

    Returns:
        (1, 3, 224, 224)
    """
    grey = pixels.ndim == 2
    image = torch.from_numpy(pixels.copy()).float()
    image = image.expand(3, *image.shape) if grey else image.permute(2, 0, 1)
    shorter = 256
    scale = shorter / min(image.shape[-2:])
    size = [max(shorter, round(side * scale)) for side in image.shape[-2:]]
    image = functional.interpolate(image[None], size=size, mode="bilinear", antialias=True)
    top, left = ((side - SIZE) // 2 for side in size)
    return (image[..., top : top + SIZE, left : left + SIZE] - MEAN) / STD


def class_name(index: int) -> str:
    """The English name of an ImageNet class."""
    info = ImageNetInfo("imagenet-1k")
    return info.label_name_to_description(info.index_to_label_name(index))
