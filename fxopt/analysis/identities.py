"""Which nodes hand their input on unchanged in the mode that the program is in."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import fx

from fxopt.ops import DROPOUTS

if TYPE_CHECKING:
    from fxopt.program import Program

__all__ = ["is_identity", "source_behind_identities"]


def is_identity(program: Program, node: fx.Node) -> bool:
    """Whether `node` is `nn.Identity`, or a dropout of any kind that drops nothing (evaluation mode, or p = 0)."""
    call = program.call(node)
    if call.op == "identity":
        return True
    if call.op not in DROPOUTS:
        return False
    if call.module is not None:
        return not call.module.training or _probability(call.module) == 0
    # F.dropout trains unless told otherwise
    return call.arguments.get("training", True) is False or call.arguments.get("p", 0.5) == 0


def source_behind_identities(program: Program, node: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """The node behind a chain of identities that starts at `node`, and the chain; `node` itself if it is none."""
    chain: list[fx.Node] = []
    while is_identity(program, node) and isinstance(node.args[0], fx.Node):
        chain.append(node)
        node = node.args[0]
    return node, chain


def _probability(module: object) -> float | None:
    for name in ("p", "drop_prob"):
        value = getattr(module, name, None)
        if value is not None:
            return float(value)
    return None
