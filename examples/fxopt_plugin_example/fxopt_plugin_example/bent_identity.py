"""An operator of one's own, and the rule by which channels can be followed through it.

    bent_identity(x) = (sqrt(x^2 + 1) - 1) / 2 + x

Without the rule, whatever reaches the operator would be locked: "fxopt_plugin_example.bent_identity.default has no
rule".
"""

from __future__ import annotations

import torch
from torch import fx

from fxopt.analysis.channel_scope import Scope
from fxopt.analysis.labels import Labels


@torch.library.custom_op("fxopt_plugin_example::bent_identity", mutates_args=())
def bent_identity(x: torch.Tensor) -> torch.Tensor:
    """Elementwise, of any shape."""
    return ((x * x + 1).sqrt() - 1) / 2 + x


@bent_identity.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def bent_identity_channels(scope: Scope, node: fx.Node) -> Labels:
    """Every element comes from the one at its place, so that it belongs to the same channel.

    An operator that mixes along an axis would hand back `scope.mixed(scope.input(node), [axis], "why")`, which locks
    the channels of that axis; one that is not understood calls `scope.barrier(node, "why")`.
    """
    return scope.input(node)
