"""The batch norms of a program, and which of them a convolution or linear beside them could take in.

Written against the graph alone and not with the pass's own matcher: this is what the pass is held against.
"""

from __future__ import annotations

from torch import fx, nn

from fxopt.program import Program

_PRODUCERS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_CONSUMERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPARENT = frozenset({"identity", "dropout", "dropout1d", "dropout2d", "dropout3d"})
_SHAPE_QUERIES = frozenset({"getattr", "size"})
_SHAPE_METHODS = frozenset({"dim", "ndimension"})


def batch_norms(program: Program) -> list[fx.Node]:
    """The nodes that normalise with batch statistics, in execution order."""
    return [node for node in program.nodes if program.op(node) == "batch_norm"]


def foldable(program: Program) -> list[str]:
    """Names of the batch norms that could be folded in evaluation mode and were not.

    Counted are those with running statistics, called once, that follow a (transposed) convolution called once which
    nothing else reads, or that only an unpadded convolution called once reads. Identities and dropout in between are
    looked through, and reading a shape is not reading. A batch norm beside anything else is not counted: whether it can
    go depends on more than these rules see.
    """
    return [node.name for node in batch_norms(program) if _is_foldable(program, node)]


def _is_foldable(program: Program, node: fx.Node) -> bool:
    norm = program.module_of(node)
    if not isinstance(norm, nn.modules.batchnorm._NormBase) or norm.running_mean is None:
        return False
    if norm.training or len(program.callers(node)) != 1:
        return False
    return _follows(program, node) or _precedes(program, node)


def _follows(program: Program, node: fx.Node) -> bool:
    source = node.args[0]
    while isinstance(source, fx.Node) and len(_readers(program, source)) == 1:
        if program.op(source) not in _TRANSPARENT:
            return isinstance(program.module_of(source), _PRODUCERS) and len(program.callers(source)) == 1
        source = source.args[0]
    return False


def _precedes(program: Program, node: fx.Node) -> bool:
    while len(readers := _readers(program, node)) == 1:
        (node,) = readers
        if program.op(node) not in _TRANSPARENT:
            module = program.module_of(node)
            if not isinstance(module, _CONSUMERS) or len(program.callers(node)) != 1:
                return False
            return module.padding == "valid" or all(amount == 0 for amount in module.padding)
    return False


def _readers(program: Program, node: fx.Node) -> list[fx.Node]:
    return [user for user in node.users if program.op(user) not in _SHAPE_QUERIES and user.target not in _SHAPE_METHODS]
