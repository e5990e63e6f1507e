"""The passes that come with fxopt; each lives in the file that has its registry name.

A name is imported when it is first asked for, so that using one pass does not import what another needs.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if __name__ != "fxopt.passes":
    raise ImportError(
        f"this folder is the package fxopt.passes, not {__name__}: imported under two names, each pass would be two "
        "different classes. Install fxopt (pip install -e .) and import from fxopt.passes."
    )

if TYPE_CHECKING:
    from fxopt.passes.cast_precision import CastPrecision
    from fxopt.passes.cluster_weights import ClusterWeights
    from fxopt.passes.factorize_low_rank import FactorizeLowRank
    from fxopt.passes.fold_batch_norm import FoldBatchNorm
    from fxopt.passes.freeze_quantization import FreezeQuantization
    from fxopt.passes.merge_branches import MergeBranches
    from fxopt.passes.prune_channels import PruneChannels
    from fxopt.passes.prune_weights import PruneWeights
    from fxopt.passes.quantize import Quantize
    from fxopt.passes.reestimate_batch_norm import ReestimateBatchNorm
    from fxopt.passes.simplify import Simplify
    from fxopt.passes.substitute_depthwise_separable import SubstituteDepthwiseSeparable
    from fxopt.passes.substitute_inverted_residual import SubstituteInvertedResidual

__all__ = [
    "DEFAULT",
    "CastPrecision",
    "ClusterWeights",
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

DEFAULT = ("simplify", "fold_batch_norm", "merge_branches")
"""The pipeline "default": the exact passes. Identities go first, as they hide patterns from the other two."""

_MODULES = {
    "CastPrecision": "cast_precision",
    "ClusterWeights": "cluster_weights",
    "FactorizeLowRank": "factorize_low_rank",
    "FoldBatchNorm": "fold_batch_norm",
    "FreezeQuantization": "freeze_quantization",
    "MergeBranches": "merge_branches",
    "PruneChannels": "prune_channels",
    "PruneWeights": "prune_weights",
    "Quantize": "quantize",
    "ReestimateBatchNorm": "reestimate_batch_norm",
    "Simplify": "simplify",
    "SubstituteDepthwiseSeparable": "substitute_depthwise_separable",
    "SubstituteInvertedResidual": "substitute_inverted_residual",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
