"""Any two passes run in either order, or are refused with an error that says which order works."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt import PipelineError, Program, RollbackWarning
from fxopt.registry import passes
from fxopt.testing import assert_untouched, model_state

SETTINGS = {
    "cast_precision": "cast_precision",
    "cluster_weights": "cluster_weights(bits=3)",
    "factorize_low_rank": "factorize_low_rank(ratio=0.6, round_to=2)",
    "fold_batch_norm": "fold_batch_norm",
    "freeze_quantization": "freeze_quantization",
    "merge_branches": "merge_branches",
    "prune_channels": "prune_channels(ratio=0.25, min_channels=2)",
    "prune_weights": "prune_weights(sparsity=0.5)",
    "quantize": "quantize",
    "reestimate_batch_norm": "reestimate_batch_norm",
    "simplify": "simplify",
    "substitute_depthwise_separable": "substitute_depthwise_separable(multiplier=2, max_error=None)",
    "substitute_inverted_residual": "substitute_inverted_residual(expansion=3, max_error=10.0, steps=0)",
}
"""Of every pass that is installed with fxopt: how it finds something to do in the model below."""

STRUCTURAL = ("factorize_low_rank", "prune_channels", "substitute_depthwise_separable", "substitute_inverted_residual")

REFUSED = {
    *itertools.product(("cluster_weights", "prune_weights"), STRUCTURAL),
    ("cluster_weights", "prune_weights"),
    ("cluster_weights", "quantize"),
    *itertools.product(
        ("quantize", "freeze_quantization"), (*STRUCTURAL, "prune_weights", "quantize", "freeze_quantization")
    ),
    *itertools.product(("cast_precision", "cluster_weights"), ("freeze_quantization",)),
    ("cast_precision", "substitute_inverted_residual"),
    ("cast_precision", "quantize"),
}
"""What may not come first, and what may not come behind it."""


class Branches(nn.Module):
    """As in RepVGG: two convolutions and the value itself, each behind a batch norm, added up."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.wide = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))
        self.narrow = nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels))
        self.identity = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        branches: Tensor = self.wide(x) + self.narrow(x) + self.identity(x)
        return branches.relu()


class Residual(nn.Module):
    """As in ResNet."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + x)


@pytest.fixture(scope="module")
def subject() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """A model with work for every pass, and batches of images with classes."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Identity(),
        Branches(8),
        Residual(8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(8, 24),
        nn.ReLU(),
        nn.Linear(24, 5),
    )
    batches = [(torch.randn(16, 3, 8, 8), torch.randint(0, 5, (16,))) for _ in range(3)]
    with torch.no_grad():
        for images, _ in batches:
            model(images)
    return model.eval(), batches


FOLDED = "fold_batch_norm(clone_shared=True)"
FAKE = "quantize(mode='qat')"
BEFORE = {"quantize": [FOLDED], "freeze_quantization": [FOLDED, FAKE]}
"""What some passes require in front of them."""


def optimized(subject: tuple[nn.Module, list[tuple[Tensor, Tensor]]], names: list[str]) -> Program:
    model, batches = subject
    with warnings.catch_warnings():
        warnings.simplefilter("error", RollbackWarning)
        return fxopt.optimize(
            model,
            batches[0][0],
            [spec for name in names for spec in [*BEFORE.get(name, ()), SETTINGS[name]]],
            calibration=batches,
            on_no_match="ignore",
            on_failure="raise",
        )


def test_every_pass_is_listed_and_finds_something_to_do(
    subject: tuple[nn.Module, list[tuple[Tensor, Tensor]]],
) -> None:
    own = {name for name, kind in passes().items() if kind.__module__.startswith("fxopt.")}
    assert set(SETTINGS) == own
    for name in SETTINGS:
        assert optimized(subject, [name]).report.passes[-1].rewrites, name


@pytest.mark.parametrize(("first", "second"), list(itertools.product(SETTINGS, SETTINGS)))
def test_two_passes(first: str, second: str, subject: tuple[nn.Module, list[tuple[Tensor, Tensor]]]) -> None:
    model, batches = subject
    state = model_state(model)
    if (first, second) in REFUSED:
        # the refusal is of what goes before freeze_quantization
        one, two = (name.replace("freeze_quantization", "quantize") for name in (first, second))
        with pytest.raises(PipelineError, match=f"{two} cannot run .* which {one} made it: put {two} before"):
            optimized(subject, [first, second])
        if (second, first) in REFUSED:
            return
        program = optimized(subject, [second, first])
    else:
        program = optimized(subject, [first, second])
    assert_untouched(model, state)
    reports = [report for report in program.report.passes if report.config not in (FOLDED, FAKE)]
    assert len(reports) == 2
    assert reports[0].rewrites
    # the second finds its work done, or says of each candidate why it is left alone
    idle = (
        "simplify",
        "fold_batch_norm",
        "merge_branches",
        *(["reestimate_batch_norm"] if first in BEFORE else []),
    )
    assert reports[1].rewrites or reports[1].skips or second == first or second in idle
    if "prune_weights" in (first, second):
        zeros = sum(int((parameter == 0).sum()) for parameter in weights(program))
        assert zeros > 0.4 * sum(parameter.numel() for parameter in weights(program))
    for size in (1, 5):
        (answer,) = program.run(torch.randn(size, 3, 8, 8))
        assert answer.shape == (size, 5)
        assert answer.isfinite().all()
    if first in BEFORE or second in BEFORE:
        return  # integers do not train
    module = program.module.train()
    module(batches[0][0]).square().sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def weights(program: Program) -> list[Tensor]:
    """Of all convolutions and linear layers, as they are computed with."""
    found: list[Tensor] = []
    for node in program.nodes:
        if program.op(node) in ("conv2d", "linear"):
            weight = program.call(node).arguments.get("weight")
            module = program.module_of(node)
            if module is not None:
                found.append(module.weight * getattr(module, "mask", 1))  # type: ignore[operator]
            else:
                held = program.module_of(weight)
                assert held is not None
                found.append(held())
    return found
