"""fxopt: a graph-rewriting compiler for PyTorch models.

`compile` captures a model, rewrites it with passes that are proven or measured, and lowers it to an engine; `optimize`
stops before lowering, and `lower` goes on from there; `capture` gives the program alone; `explain` tells what passes
would do; `load` reads a saved engine.
"""

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
