"""The public names are pinned, and importing fxopt is cheap: it imports no library that only some uses need."""

from __future__ import annotations

import importlib

import pytest

import fxopt
from tests.conftest import NewProcess

PUBLIC = [
    "ArtifactError",
    "Backend",
    "BackendError",
    "BackendUnavailable",
    "CaptureError",
    "Compiled",
    "Cost",
    "Engine",
    "FixedBatchWarning",
    "FxoptError",
    "InputError",
    "NoMatchWarning",
    "Pass",
    "PassError",
    "PassManager",
    "PassReport",
    "PipelineError",
    "Plan",
    "Program",
    "RegistryError",
    "Report",
    "Rewrite",
    "RollbackWarning",
    "Skip",
    "StateWarning",
    "Target",
    "VerificationError",
    "capture",
    "compile",
    "explain",
    "load",
    "lower",
    "optimize",
]

TESTING = [
    "RandomProgram",
    "assert_equivalent",
    "assert_pass",
    "assert_skips",
    "assert_untouched",
    "model_state",
    "random_program",
]

HEAVY = (
    "hypothesis", "numba", "onnx", "onnxoptimizer", "onnxruntime", "onnxscript", "pytest", "rich", "safetensors",
    "scipy", "skimage", "sklearn", "timm", "torch.onnx._internal.exporter", "torchvision", "typer",
)  # fmt: skip


def test_public_names() -> None:
    assert sorted(fxopt.__all__) == PUBLIC
    assert all(hasattr(fxopt, name) for name in PUBLIC)
    assert sorted(importlib.import_module("fxopt.testing").__all__) == TESTING
    assert sorted(importlib.import_module("fxopt.passes").__all__) == [
        "CastPrecision",
        "ClusterWeights",
        "DEFAULT",
        "FactorizeLowRank",
        "FoldBatchNorm",
        "FreezeQuantization",
        "MergeBranches",
        "PruneChannels",
        "PruneWeights",
        "Quantize",
        "ReestimateBatchNorm",
        "Simplify",
        "SubstituteDepthwiseSeparable",
        "SubstituteInvertedResidual",
    ]
    # reachable, and not among the names of a star import, which would hide torch's nn
    assert sorted(fxopt.nn.__all__) == ["DepthwiseSeparableConv2d", "InvertedResidual"]
    assert sorted(importlib.import_module("fxopt.lowering").__all__) == [
        "AutoBackend",
        "EagerBackend",
        "InductorBackend",
        "OnnxBackend",
        "OpenVinoBackend",
        "TensorrtBackend",
        "TensorrtRtxBackend",
    ]


@pytest.mark.parametrize("module", ["fxopt", "fxopt.testing", "fxopt.passes", "fxopt.lowering", "fxopt.registry"])
def test_importing_is_cheap(new_process: NewProcess, module: str) -> None:
    loaded = new_process.code(
        f"import sys, torch; before = set(sys.modules); import {module}; print(*sorted(set(sys.modules) - before))"
    ).split()
    assert module in loaded
    found = [name for name in loaded if name in HEAVY or name.partition(".")[0] in HEAVY]
    assert found == []
    assert not any(name.startswith(("fxopt.passes.", "fxopt.lowering.")) for name in loaded)


def test_all_errors_are_fxopt_errors() -> None:
    errors = [getattr(fxopt, name) for name in PUBLIC if name.endswith("Error") or name == "BackendUnavailable"]
    assert len(errors) == 10
    assert all(issubclass(error, fxopt.FxoptError) for error in errors)
    assert issubclass(fxopt.BackendUnavailable, fxopt.BackendError)
    assert issubclass(fxopt.InputError, ValueError)
