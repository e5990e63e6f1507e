"""The layers that mix channels: what has to do without the removed ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, fx

from fxopt.analysis.channels import Channels
from fxopt.analysis.destinations import destination
from fxopt.analysis.weight_uses import weight_uses

if TYPE_CHECKING:
    from fxopt.program import Program

__all__ = ["Reader", "readers"]


class Reader(NamedTuple):
    """A layer that mixes the channels of its input.

    Attributes:
        node: the call.
        axis: of its weight, along which the input channels lie.
        labels: one per input channel.
    """

    node: fx.Node
    axis: int
    labels: Tensor

    def columns(self, program: Program) -> Tensor:
        """Its weight in float64, [outputs times places of the kernel, input channels].

        Every output is scaled as by what is behind: by a BatchNorm, which may not be folded yet.
        """
        layer: Any = program.module_of(self.node)
        weight: Tensor = layer.weight.detach().double()
        scale = destination(program, self.node).scale.to(weight.device)
        axis = -1 if program.op(self.node) == "linear" else 1
        if scale.ndim > 1 and scale.shape[axis] == scale.numel():
            sizes = [1] * weight.ndim
            sizes[1 - self.axis] = -1
            weight = weight * scale.reshape(sizes)
        else:
            # what differs between positions counts by its mean square
            weight = weight * scale.square().mean().sqrt()
        weight = weight.movedim(self.axis, -1)
        return weight.reshape(-1, weight.shape[-1])


def readers(program: Program, channels: Channels) -> Iterator[Reader]:
    """The convolutions and linear layers that mix all their input channels, and whose weight nothing else uses."""
    uses = program.analysis(weight_uses)
    for item in channels.members:
        if item.name != "weight" or item.axis is None:
            continue
        node = program.node(item.node)
        call = program.call(node)
        layer: Any = call.module
        mixes = call.op == "linear" or (call.op.startswith("conv") and layer.groups == 1)
        if mixes and not channels.produces(program, item) and uses[id(layer.weight)] == 1:
            yield Reader(node, item.axis, item.labels)
