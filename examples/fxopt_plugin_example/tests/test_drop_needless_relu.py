"""What the pass removes, what it leaves alone and why."""

from __future__ import annotations

import pytest
import torch
from fxopt_plugin_example.drop_needless_relu import DropNeedlessRelu
from torch import nn

import fxopt

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def relus(program: fxopt.Program) -> list[str]:
    return [node.name for node in program.nodes if program.op(node) == "relu"]


def test_placeholder() -> None: ...
