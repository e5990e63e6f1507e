"""The `symbolic` frontend: `torch.fx` tracing of the model's Python code with proxies for the flat input tensors.

Fast, and it keeps the model's own modules. It fails on control flow over values or shapes, and leaves functions that
libraries wrap for it opaque; `auto` then prefers `export`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils import parametrize

from fxopt.errors import CaptureError, first_line
from fxopt.frontends.captured import Captured
from fxopt.ops import is_known_module, resolve
from fxopt.sharing import buffers_restored, keep_persistence
from fxopt.signature import Signature
from fxopt.structure import Structure, flatten

__all__ = ["opaque_calls", "trace_symbolic"]

_TRANSPARENT = ("torch", "_operator", "operator", "math", "builtins")


def trace_symbolic(model: nn.Module, signature: Signature) -> Captured:
    """Traces `model`, a private copy.

    Raises:
        CaptureError: if the code cannot be traced, with the reason.
    """
    tracer = _FlatTracer(signature)
    with buffers_restored(model) as written:
        try:
            graph = tracer.trace(model)
        except Exception as error:
            # tracing runs the model's own code: whatever that raises under proxies is the reason
            raise CaptureError(f"{type(error).__name__}: {first_line(error)}") from error
    # buffers are real tensors while the code is traced: a write into one happens, and leaves no trace in the graph; the
    # counters of BatchNorm are kept by the modules that calls are raised to
    unseen = [name for name in written if not name.endswith("num_batches_tracked")]
    if unseen:
        raise CaptureError(f"the model writes into its buffer {unseen[0]}, which tracing cannot see")
    if tracer.outputs is None:
        raise CaptureError("the model returned nothing")
    module = fx.GraphModule(tracer.root, graph, class_name="Program")
    keep_persistence(module, model)
    _drop_assertions(module)
    return Captured(module, tracer.outputs)


def opaque_calls(module: fx.GraphModule) -> list[str]:
    """Functions in the graph that are neither torch's nor Python's: nothing is known about what they do."""
    found = []
    for node in module.graph.nodes:
        target = node.target
        if node.op != "call_function" or isinstance(target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
            continue
        origin = (getattr(target, "__module__", None) or "builtins").partition(".")[0]
        if origin not in _TRANSPARENT and resolve(node, None).op.startswith("unknown:"):
            found.append(f"{target.__module__}.{target.__name__}")
    return sorted(set(found))


class _FlatTracer(fx.Tracer):
    """Traces a model called by its signature: one placeholder per flat tensor, outputs flattened to a tuple."""

    def __init__(self, signature: Signature) -> None:
        super().__init__(param_shapes_constant=True)
        self.signature = signature
        self.outputs: Structure | None = None

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Placeholders by the signature's names, and a function that calls the model on them."""
        proxies = [self.create_proxy("placeholder", name, (), {}) for name in self.signature.names]

        def call(root: nn.Module, *leaves: Any) -> tuple[Any, ...]:
            args, kwargs = self.signature.call_arguments(leaves)
            results, self.outputs = flatten(root_fn(root, *args, **kwargs))
            return tuple(results)

        return call, [self.root, *proxies]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Modules of torch, and others that the operator table knows; unless hooks change what they do."""
        if m._forward_hooks or m._forward_pre_hooks or parametrize.is_parametrized(m):
            return False
        return is_known_module(m) or super().is_leaf_module(m, module_qualified_name)


def _drop_assertions(module: fx.GraphModule) -> None:
    """Removes `torch._assert` and what only it reads: a program checks its inputs against those of its capture."""
    pending = [node for node in module.graph.nodes if node.target in (torch._assert, torch._assert_async)]
    while pending:
        node = pending.pop()
        # not all that nobody reads is dead: graphs still write in place here
        if node.users or node.op in ("placeholder", "call_module") or resolve(node, None).inplace:
            continue
        pending += node.all_input_nodes
        module.graph.erase_node(node)
    module.recompile()
