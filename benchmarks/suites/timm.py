"""The smallest variant, by parameter count, of every model module of timm.

Which variant is smallest is found by building all of them on the meta device (a few minutes), and kept for the timm
version in `benchmarks/results/timm_smallest.json`.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn

from benchmarks.results import RESULTS, write_json
from benchmarks.suites import Case, Entry, Suite

SMALLEST = RESULTS / "timm_smallest.json"

logger = logging.getLogger(__name__)


class TimmSuite(Suite):
    """The smallest models of each of `timm.list_modules()`; an entry's kind is its module."""

    def entries(self) -> Sequence[Entry]:
        import timm

        found: dict[str, Any] = json.loads(SMALLEST.read_text(encoding="utf-8")) if SMALLEST.exists() else {}
        if found.get("timm") != timm.__version__:
            found = {"timm": timm.__version__, "modules": find_smallest()}
            write_json(SMALLEST, found)
        return [
            Entry(name, module, params)
            for module, each in found["modules"].items()
            for name, params in each["models"].items()
        ]

    def build(self, name: str) -> Case:
        import timm

        model = timm.create_model(name, pretrained=False)
        return Case(model, (_input_size(model),))


def find_smallest() -> dict[str, dict[str, Any]]:
    """The smallest variants of each module: `{module: {"models": {name: params}, "variants", "unbuildable"}}`.

    Of several with the same parameter count, the one with the smaller input. Where the smallest is a `test_` variant,
    made for timm's own tests, the smallest other one follows it. Variants that cannot be built on the meta device are
    named with the reason under `unbuildable`, and not considered.
    """
    import timm
    from rich.progress import track

    smallest = {}
    for module in track(timm.list_modules(), description="smallest variants"):
        variants = timm.list_models(module=module)
        measured, unbuildable = [], {}
        for name in variants:
            try:
                measured.append((*_measure(name), name))
            except Exception as error:  # noqa: BLE001 (any of timm's 1400 constructors may fail in its own way)
                unbuildable[name] = f"{type(error).__name__}: {error}".splitlines()[0]
                logger.warning("%s cannot be built on the meta device: %s", name, unbuildable[name])
        real = [each for each in measured if not each[-1].startswith("test_")]
        chosen = {min(each)[-1]: min(each)[0] for each in (measured, real) if each}
        smallest[module] = {"models": chosen, "variants": len(variants), "unbuildable": unbuildable}
    return smallest


def _measure(name: str) -> tuple[int, tuple[int, ...]]:
    import timm
    import torch

    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")  # timm's own deprecations of variants
        model = timm.create_model(name, pretrained=False)
    return sum(parameter.numel() for parameter in model.parameters()), _input_size(model)


def _input_size(model: nn.Module) -> tuple[int, ...]:
    configuration: Any = model.pretrained_cfg
    return tuple(configuration["input_size"])
