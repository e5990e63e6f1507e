"""What a pruned program must answer: the unpruned one, with what reads the removed channels not hearing them.

    pruned(x) = silenced(x),   silenced: every weight for a removed channel is zero

That is computed by running the unpruned program with zeros wherever a convolution, a linear layer or a product reads a
removed channel (for a product of two values, as of queries and keys, in both). A norm over channels is taken over those
that are kept, as the pruned program can take no other. All else runs as it is, so that an operator which mixes channels
unnoticed gives another answer than the pruned program.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx

if TYPE_CHECKING:
    from fxopt.analysis.channels import Channels
    from fxopt.ops import Call
    from fxopt.program import Program

__all__ = ["run_silenced"]

_READERS = frozenset(
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d linear matmul mm bmm einsum "
    "scaled_dot_product_attention".split()
)
_NORMS = {"layer_norm": -1, "rms_norm": -1, "group_norm": 1}


def run_silenced(
    program: Program, channels: Channels, units: Collection[int], inputs: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The flat outputs that the program must have after these units were removed. In float64 they agree to rounding.

    Args:
        program: the unpruned one.
        channels: its channels.
        units: what is removed.
        inputs: flat, at any batch size.
    """
    with torch.no_grad():
        runner = _Silenced(program, channels, units)
        return tuple(runner.run(*(tensor.clone() for tensor in inputs), enable_io_processing=False))


class _Silenced(fx.Interpreter):
    def __init__(self, program: Program, channels: Channels, units: Collection[int]) -> None:
        super().__init__(program.flat_module())
        self.extra_traceback = False
        self._program = program
        self._originals = {node.name: node for node in program.graph.nodes}
        self._channels = channels
        self._gone = torch.tensor(sorted(units), dtype=torch.int64)

    def run_node(self, n: fx.Node) -> Any:
        call = self._program.call(self._originals[n.name])
        if call.op in _NORMS:
            source = n.all_input_nodes[0]
            value = self.env[source]
            gone = self._mask(source, value)
            # along other axes the norm takes each channel by itself
            if gone is not None and gone.shape[_NORMS[call.op] % gone.ndim] > 1:
                given = {item.name: self.env[item] for item in n.all_input_nodes}
                return _norm_of_kept(call.op, _settings(call, given), value, gone)
        return super().run_node(n)

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self._op(n) not in _READERS:
            return super().fetch_args_kwargs_from_env(n)
        args, kwargs = fx.node.map_arg((n.args, dict(n.kwargs)), self._heard)
        return args, kwargs

    def _op(self, node: fx.Node) -> str:
        return self._program.op(self._originals[node.name])

    def _heard(self, node: fx.Node) -> Any:
        value = self.env[node]
        gone = self._mask(node, value) if isinstance(value, Tensor) else None
        return value if gone is None else value.masked_fill(gone, 0.0)

    def _mask(self, node: fx.Node, value: Tensor) -> Tensor | None:
        """bool, broadcast to the value: True for what is removed. None if nothing is."""
        labels = self._channels.values[node.name].compact
        gone = torch.isin(labels, self._gone)
        if not bool(gone.any()):
            return None
        # along an axis that holds the batch too, the labels of the example's batch repeat
        copies = [1 if size == 1 else actual // size for size, actual in zip(labels.shape, value.shape, strict=True)]
        return gone.repeat(copies)


class _Settings(NamedTuple):
    """Of a norm; `groups` is None where it is over the last axis."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float | None
    groups: int | None


def _settings(call: Call, given: Mapping[str, Any]) -> _Settings:
    """Of a module, or of a function whose operands have these values."""
    if call.module is not None:
        norm = cast("Any", call.module)
        return _Settings(norm.weight, getattr(norm, "bias", None), norm.eps, getattr(norm, "num_groups", None))
    values = {
        name: given[item.name] if isinstance(item, fx.Node) else item
        for name, item in call.arguments.items()
        if name != "normalized_shape"
    }
    eps = values.get("eps", None if call.op == "rms_norm" else 1e-5)
    return _Settings(values.get("weight"), values.get("bias"), eps, values.get("num_groups"))


def _norm_of_kept(op: str, norm: _Settings, value: Tensor, gone: Tensor) -> Tensor:
    """A norm over the channels that are kept; zero for the others."""
    axis = _NORMS[op] % value.ndim
    if gone.numel() != gone.shape[axis]:
        raise ValueError(f"{op}: removed are not whole channels")
    kept = torch.nonzero(~gone.reshape(-1).expand(value.shape[axis])).reshape(-1)
    weight, bias = (None if tensor is None else tensor[kept] for tensor in (norm.weight, norm.bias))
    heard = value.index_select(axis, kept)
    if norm.groups is not None:
        alone = norm.groups == value.shape[axis]
        found = F.group_norm(heard, len(kept) if alone else norm.groups, weight, bias, cast("float", norm.eps))
    elif op == "rms_norm":
        found = F.rms_norm(heard, (len(kept),), weight, norm.eps)
    else:
        found = F.layer_norm(heard, (len(kept),), weight, bias, cast("float", norm.eps))
    return torch.zeros_like(value).index_copy(axis, kept, found)
