"""Removes channels from a program: slices the tensors that hold them, and has the sizes that are written out follow.

`analysis/channels.py` says what belongs to a channel; this carries a removal out, through `fxopt.edit`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import nn

from fxopt import edit
from fxopt.analysis.channels import Channels, Member
from fxopt.program import Program
from fxopt.sharing import share_module
from fxopt.written_sizes import rewrite_sizes

__all__ = ["remove_channels"]


def remove_channels(program: Program, channels: Channels, units: Sequence[int]) -> Channels:
    """Removes units from a program.

    Args:
        program: is edited.
        channels: its channels.
        units: what to remove, none of it locked.

    Returns:
        The channels that the program has afterwards.
    """
    left = channels.without(units)
    gone = torch.tensor(sorted(units), dtype=torch.int64)
    nodes = {node.name: node for node in program.nodes}
    # before the tensors: what is written out is compared with the modules as they were
    rewrite_sizes(program, channels, left)
    slices = _Slices(gone)
    holders: dict[int, list[Member]] = {}
    for index in sorted(channels.holding(units)):
        item = channels.members[index]
        held = program.module_of(nodes[item.node]) or program.tensor_of(nodes[item.node])
        holders.setdefault(id(held), []).append(item)
    for members in holders.values():
        node = nodes[members[0].node]
        module, tensor = program.module_of(node), program.tensor_of(node)
        if module is not None:
            edit.set_module(program, node, _smaller(module, members, slices))
        if tensor is not None:
            smaller = slices.of(tensor, members[0])
            for reader in {str(nodes[item.node].target): nodes[item.node] for item in members}.values():
                edit.set_parameter(program, reader, smaller)
    return left


class _Slices:
    """Tensors without the channels that are gone: one for each, so that tied weights stay tied."""

    def __init__(self, gone: torch.Tensor) -> None:
        self._gone = gone
        # with what they are of: an identity counts as long as that lives
        self._found: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def kept(self, item: Member) -> torch.Tensor:
        """The places of what is left."""
        return torch.nonzero(~torch.isin(item.labels, self._gone)).reshape(-1)

    def of(self, tensor: torch.Tensor, item: Member) -> torch.Tensor:
        """What is left; a parameter of a parameter."""
        axis = cast("int", item.axis)
        key = id(tensor), axis
        if key not in self._found:
            left = tensor.detach().index_select(axis, self.kept(item).to(tensor.device))
            parameter = isinstance(tensor, nn.Parameter)
            self._found[key] = tensor, nn.Parameter(left, tensor.requires_grad) if parameter else left
        return self._found[key][1]


def _smaller(module: nn.Module, members: Sequence[Member], slices: _Slices) -> nn.Module:
    """A module without these channels: other tensors, other sizes."""
    smaller = share_module(module)
    # one that is called at several places has the same members at each
    for item in {(member.name, member.axis): member for member in members}.values():
        if item.axis is None:
            count = len(slices.kept(item))
            setattr(smaller, item.name, (count,) if item.name == "normalized_shape" else count)
            continue
        old = getattr(smaller, item.name)
        if old is not None:
            setattr(smaller, item.name, slices.of(old, item))
    return smaller
