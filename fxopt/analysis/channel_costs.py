"""What a program would cost with some of its channels removed, without removing them: for searching over budgets."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import fx, nn

from fxopt.analysis.channels import Channels, member_tensor
from fxopt.analysis.costs import macs_by_node
from fxopt.analysis.labels import FIXED, Labels

if TYPE_CHECKING:
    from fxopt.program import Program

__all__ = ["ChannelCosts", "Measure"]

Measure = Literal["ratio", "macs", "params"]
"""What a share is of: channels, multiply-accumulates or parameters."""


class _Term(NamedTuple):
    """A cost that is proportional to the share of channels that each of some axes keeps."""

    amount: int
    axes: tuple[np.ndarray, ...]


class ChannelCosts:
    """Cost as a function of the units that are kept.

    Args:
        program: whose cost.
        channels: its channels.
        gaining: names of calls of layers that will get a bias.

    Attributes:
        units: all units, in increasing order; masks are over these.
    """

    def __init__(self, program: Program, channels: Channels, gaining: Collection[str] = ()) -> None:
        free = {unit for group in channels.groups if group.locked is None for unit in group.units}
        self.units = np.array(sorted(free), dtype=np.int64)
        self._macs = list(_macs(program, channels))
        self._params = [*_params(program, channels), *_biases(program, channels, gaining)]
        self._whole = program.cost()

    def mask(self, removed: Iterable[int]) -> np.ndarray:
        """bool[units]: True for what is kept."""
        return ~np.isin(self.units, np.fromiter(removed, dtype=np.int64))

    def macs(self, kept: np.ndarray) -> float:
        """Multiply-accumulates at the example's sizes."""
        return self._total(self._macs, kept)

    def params(self, kept: np.ndarray) -> float:
        """Number of parameters."""
        return self._total(self._params, kept)

    def left(self, measure: Measure, kept: np.ndarray) -> float:
        """The share that is left of the whole program's MACs or parameters, or ("ratio") of the units."""
        if measure == "macs":
            return self.macs(kept) / max(self._whole.macs, 1)
        return self.params(kept) / max(self._whole.params, 1) if measure == "params" else float(kept.mean())

    def _total(self, terms: list[_Term], kept: np.ndarray) -> float:
        lookup = np.concatenate([[1.0], kept.astype(np.float64)])
        return sum(
            term.amount * float(np.prod([lookup[self._places(axis)].mean() for axis in term.axes])) for term in terms
        )

    def _places(self, axis: np.ndarray) -> np.ndarray:
        """Index of each label among the units, from 1; 0 for what is fixed."""
        found: np.ndarray = np.where(axis == FIXED, 0, np.searchsorted(self.units, axis) + 1)
        return found


def _macs(program: Program, channels: Channels) -> Iterable[_Term]:
    weights: dict[str, list[np.ndarray]] = {}
    for item in channels.members:
        if item.name == "weight" and item.axis is not None:
            weights.setdefault(item.node, []).append(item.labels.numpy())
    nodes = {node.name: node for node in program.graph.nodes}
    for name, macs in program.analysis(macs_by_node).items():
        node = nodes[name]
        if program.op(node) == "scaled_dot_product_attention":
            arguments = program.call(node).arguments
            for operand in ("query", "value"):
                yield _Term(macs // 2, tuple(_axes(channels, [arguments[operand]])))
        elif name in weights:
            yield _Term(macs, tuple(weights[name]))
        else:
            yield _Term(macs, tuple(_axes(channels, node.all_input_nodes)))


def _axes(channels: Channels, operands: Iterable[fx.Node]) -> list[np.ndarray]:
    """The different axes of channels among some values."""
    found: dict[bytes, np.ndarray] = {}
    for node in operands:
        value = channels.values[node.name]
        if isinstance(value, Labels) and value.axes:
            labels = np.unique(value.compact.numpy())
            found[labels.tobytes()] = value.compact.numpy().reshape(-1)
    return list(found.values())


def _params(program: Program, channels: Channels) -> Iterable[_Term]:
    axes: dict[int, dict[int, np.ndarray]] = {}
    tensors: dict[int, torch.Tensor] = {id(item): item for item in program.module.parameters()}
    for item in channels.members:
        tensor = member_tensor(program, item)
        if tensor is not None and item.axis is not None:
            axes.setdefault(id(tensor), {})[item.axis] = item.labels.numpy()
    for key, parameter in tensors.items():
        yield _Term(parameter.numel(), tuple(axes.get(key, {}).values()))


def _biases(program: Program, channels: Channels, layers: Collection[str]) -> Iterable[_Term]:
    """As many parameters as each of these layers has outputs."""
    outputs = {
        item.node: item.labels.numpy()
        for item in channels.members
        if item.name == "weight" and item.node in layers and channels.produces(program, item)
    }
    for name in layers:
        layer: Any = program.module_of(program.node(name))
        count = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        yield _Term(count, (outputs[name],) if name in outputs else ())
