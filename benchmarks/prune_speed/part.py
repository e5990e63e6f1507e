"""What the parts of the benchmark have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from benchmarks.networks import Network
from benchmarks.numerics import count_macs
from benchmarks.results import Table


class Found(NamedTuple):
    """What a part found.

    Attributes:
        table: for people.
        data: for programs; JSON.
        missed: a line for each bar that was missed.
    """

    table: Table
    data: Mapping[str, Any]
    missed: Sequence[str]


def found(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    notes: Sequence[str],
    networks: Sequence[Mapping[str, Any]],
    missed: Sequence[str],
) -> Found:
    """The table says what was missed under its notes."""
    table = Table(title, columns, rows, [*notes, *(f"missed: {line}" for line in missed)])
    return Found(table, {"networks": list(networks), "missed": list(missed)}, missed)


class Size(NamedTuple):
    """What a model costs, counted by torch.

    Attributes:
        macs: multiply-accumulates of one forward.
        params: number of parameters.
    """

    macs: int
    params: int

    @classmethod
    def of(cls, model: nn.Module, network: Network) -> Size:
        """Counts a model that takes the network's inputs."""
        return cls(count_macs(model, network.inputs), sum(each.numel() for each in model.parameters()))

    def over(self, whole: Size) -> tuple[float, float]:
        """Shares of the MACs and of the parameters."""
        return self.macs / max(whole.macs, 1), self.params / max(whole.params, 1)


def met(value: bool) -> str:
    """A table cell."""
    return "yes" if value else "no"
