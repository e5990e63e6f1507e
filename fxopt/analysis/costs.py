"""What a program costs: parameters, multiply-accumulates (MACs) and bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from fxopt.report import Cost

if TYPE_CHECKING:
    from fxopt.program import Program

__all__ = ["macs_by_node", "total_cost"]


def total_cost(program: Program) -> Cost:
    """Parameters (shared ones once), MACs at the example's sizes, and bytes of parameters and buffers."""
    module = program.module
    tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return Cost(
        params=sum(parameter.numel() for parameter in module.parameters()),
        macs=sum(program.analysis(macs_by_node).values()),
        bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()),
    )


def macs_by_node(program: Program) -> Mapping[str, int]:
    """MACs of each node that multiplies and accumulates (convolution, linear, matmul, attention), by node name.

    Counted by torch's own flop counter, two flops a MAC, at the sizes of the example inputs.
    """
    counter = _Counter(program.flat_module())
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            counter.run(*(mode.from_tensor(tensor.detach()) for tensor in program.example_inputs))
    except (DataDependentOutputException, DynamicOutputShapeException):
        counter.found.clear()
        counter.run(*(tensor.detach().clone() for tensor in program.example_inputs))
    return counter.found


class _Counter(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        from torch.utils.flop_counter import FlopCounterMode

        super().__init__(module)
        self.found: dict[str, int] = {}
        self._mode = FlopCounterMode(display=False)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad(), self._mode:
            return super().run(*args, **kwargs)

    def run_node(self, n: fx.Node) -> Any:
        before = self._mode.get_total_flops()
        value = super().run_node(n)
        flops = self._mode.get_total_flops() - before
        if flops:
            self.found[n.name] = flops // 2
        return value
