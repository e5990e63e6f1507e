"""fxopt: a graph-rewriting compiler for PyTorch models.

`compile` captures a model, rewrites it with passes that are proven or measured, and lowers it to an engine; `optimize`
stops before lowering, and `lower` goes on from there; `capture` gives the program alone; `explain` tells what passes
would do; `load` reads a saved engine.

Names resolve when they are first used, so that `fxopt.runtime` runs saved engines where there is no torch.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fxopt import nn as nn  # as fxopt.nn; not in __all__, as a star import would hide torch's nn
    from fxopt.api import Compiled, capture, compile, explain, load, lower, optimize
    from fxopt.backend import Backend, Engine, FixedBatchWarning
    from fxopt.errors import (
        ArtifactError,
        BackendError,
        BackendUnavailable,
        CaptureError,
        FxoptError,
        InputError,
        PassError,
        PipelineError,
        RegistryError,
        VerificationError,
    )
    from fxopt.frontends.capture import StateWarning
    from fxopt.manager import NoMatchWarning, PassManager, RollbackWarning
    from fxopt.passes_base import Pass, Plan, Rewrite, Skip
    from fxopt.program import Program
    from fxopt.report import Cost, PassReport, Report
    from fxopt.target import Target

__all__ = [
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

_HOMES = {
    name: home
    for home, names in {
        "fxopt.api": "Compiled capture compile explain load lower optimize",
        "fxopt.backend": "Backend Engine FixedBatchWarning",
        "fxopt.errors": "ArtifactError BackendError BackendUnavailable CaptureError FxoptError InputError "
        "PassError PipelineError RegistryError VerificationError",
        "fxopt.frontends.capture": "StateWarning",
        "fxopt.manager": "NoMatchWarning PassManager RollbackWarning",
        "fxopt.passes_base": "Pass Plan Rewrite Skip",
        "fxopt.program": "Program",
        "fxopt.report": "Cost PassReport Report",
        "fxopt.target": "Target",
    }.items()
    for name in names.split()
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if find_spec(f"{__name__}.{name}") is not None:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
