"""Channels are followed through the operator, by the rule that is registered for it."""

from __future__ import annotations

import torch
from fxopt_plugin_example.bent_identity import bent_identity
from torch import nn

import fxopt
from fxopt.analysis.channel_rules import builtin_rules
from fxopt.analysis.channels import find_channels
from fxopt.removal import remove_channels


class Bent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.last(bent_identity(self.first(x)))
        return y


IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def captured() -> fxopt.Program:
    torch.manual_seed(0)
    return fxopt.capture(Bent().eval(), IMAGE)


def test_its_channels_can_be_removed() -> None:
    program = captured()
    channels = find_channels(program)
    group = channels.groups[0]
    assert (group.name, len(group), group.locked) == ("first.weight", 8, None)
    remove_channels(program, channels, group.units[2:5])
    first, last = (program.module.get_submodule(name) for name in ("first", "last"))
    kept = [0, 1, 5, 6, 7]
    torch.manual_seed(0)
    whole = Bent()
    y = torch.nn.functional.conv2d(IMAGE, whole.first.weight[kept], whole.first.bias[kept])
    y = torch.nn.functional.conv2d(bent_identity(y), whole.last.weight[:, kept], whole.last.bias)
    assert (first.out_channels, last.in_channels) == (5, 5)
    torch.testing.assert_close(program.run(IMAGE)[0], y)


def test_without_the_rule_they_are_locked() -> None:
    channels = find_channels(captured(), rules=builtin_rules())
    why = "fxopt_plugin_example.bent_identity.default at bent_identity_default has no rule"
    assert channels.groups[0].locked == why
