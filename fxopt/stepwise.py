"""Runs a program on one batch, operator by operator, with a stop wherever the caller has something to look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, fx

from fxopt.interpret import call_node

if TYPE_CHECKING:
    from fxopt.program import Program

__all__ = ["StepwiseRun"]


class StepwiseRun:
    """A run as far as it has come: values are dropped once nothing needs them.

    Args:
        program: what runs.
        unused: by node, whose values nothing needs once it has run (`fxopt/analysis/liveness.py`).
        inputs: one batch; copied.

    Attributes:
        values: by node name.
    """

    def __init__(self, program: Program, unused: Mapping[fx.Node, Sequence[fx.Node]], inputs: Sequence[Tensor]) -> None:
        self._program = program
        self._unused = unused
        self._nodes = iter(program.nodes)
        self._reached: fx.Node | None = None
        self.values: dict[str, Any] = {}
        for tensor in inputs:
            self.values[next(self._nodes).name] = tensor.detach().clone()

    def before(self, name: str) -> None:
        """Runs all that comes in front of a node which has not run yet."""
        while self._next().name != name:
            self._run()

    def through(self, name: str) -> None:
        """Runs up to a node, itself included; its value stays, whoever needs it."""
        self.before(name)
        self._run(keep=name)

    def give(self, value: Any) -> None:
        """Takes this for the value of the node in front of which the run stands."""
        self._ran(self._next(), value)

    def argument(self, name: str) -> Tensor:
        """What the layer called at a node reads."""
        source = cast("fx.Node", self._program.call(self._program.node(name)).arguments["input"])
        return cast("Tensor", self.values[source.name])

    def _next(self) -> fx.Node:
        if self._reached is None:
            self._reached = next(self._nodes)
        return self._reached

    def _run(self, keep: str | None = None) -> None:
        node = self._next()
        if node.op == "get_attr":
            self._ran(node, self._program.tensor_of(node), keep)
            return
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda item: self.values[item.name])
        self._ran(node, call_node(node, self._program.module_of(node), args, kwargs), keep)

    def _ran(self, node: fx.Node, value: Any, keep: str | None = None) -> None:
        self._reached = None
        self.values[node.name] = value
        for over in self._unused[node]:
            if over.name != keep:
                self.values.pop(over.name, None)
