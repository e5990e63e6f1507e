"""Every classification, segmentation and video model of torchvision (quantized, detection and optical flow aside).

Inputs have the smallest size that any of the model's weights was evaluated at, clips 16 frames; segmentation, which
takes any size, runs at 128x128 to be affordable. Nothing is downloaded: sizes and parameter counts come from the
weights' metadata.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.suites import Case, Entry, Suite

SEGMENTATION_SIZE = 128
CLIP_FRAMES = 16


class TorchvisionSuite(Suite):
    """`torchvision.models.list_models()` of the three kinds."""

    def entries(self) -> Sequence[Entry]:
        return [Entry(name, kind, _metadata(name)["num_params"]) for name, kind in _names()]

    def build(self, name: str) -> Case:
        from torchvision import models

        kind = dict(_names())[name]
        options: dict[str, Any] = {"weights": None}
        if kind == "segmentation":
            options["weights_backbone"] = None
        if name in {"googlenet", "inception_v3"}:
            # torchvision warns unless the initialisation is chosen; the slow one is its default
            options["init_weights"] = True
        return Case(models.get_model(name, **options), (_shape(name, kind),))


def _names() -> Iterator[tuple[str, str]]:
    from torchvision import models

    for kind, module in (
        ("classification", models),
        ("segmentation", models.segmentation),
        ("video", models.video),
    ):
        for name in models.list_models(module=module):
            yield name, kind


def _metadata(name: str) -> dict[str, Any]:
    from torchvision import models

    meta: dict[str, Any] = models.get_model_weights(name).DEFAULT.meta
    return meta


def _shape(name: str, kind: str) -> tuple[int, ...]:
    from torchvision import models

    if kind == "segmentation":
        return (3, SEGMENTATION_SIZE, SEGMENTATION_SIZE)
    crops = [weights.transforms.keywords["crop_size"] for weights in models.get_model_weights(name)]
    # of vit_h_14's 224 and 518 it is the smaller that fits a model built without weights
    height, width = min((crop, crop) if isinstance(crop, int) else crop for crop in crops)
    return (3, CLIP_FRAMES, height, width) if kind == "video" else (3, height, width)
