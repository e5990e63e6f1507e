"""Runs a graph node by node, without generating code for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn

__all__ = ["Watch", "call_node", "run_graph"]

Watch = Callable[[fx.Node, Any], None]


def call_node(node: fx.Node, module: nn.Module | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a node's module, method or function gives for other arguments than the node's own."""
    target: Any = node.target
    if module is not None:
        return module(*args, **kwargs)
    return getattr(args[0], target)(*args[1:], **kwargs) if node.op == "call_method" else target(*args, **kwargs)


def run_graph(
    root: nn.Module,
    graph: fx.Graph,
    inputs: Sequence[torch.Tensor],
    watch: Watch | None = None,
    *,
    gradients: bool = False,
) -> tuple[torch.Tensor, ...]:
    """The flat outputs of a flat graph over the modules of `root`.

    Args:
        root: holds the modules and tensors that the nodes name.
        graph: the graph.
        inputs: one tensor per placeholder.
        watch: called with each node and its value.
        gradients: whether autograd follows the run.
    """
    with torch.set_grad_enabled(gradients):
        return tuple(_Runner(root, graph, watch).run(*inputs, enable_io_processing=False))


class _Runner(fx.Interpreter):
    def __init__(self, root: nn.Module, graph: fx.Graph, watch: Watch | None) -> None:
        super().__init__(root, graph=graph)
        self.extra_traceback = False
        self._watch = watch

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if self._watch is not None:
            self._watch(n, value)
        return value
