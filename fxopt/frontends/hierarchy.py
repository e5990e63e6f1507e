"""Finding and placing modules and tensors by dotted path."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["find", "install", "is_persistent"]


def find(root: nn.Module, path: str) -> Any:
    """What is at a dotted path; None if there is nothing."""
    found: Any = root
    for name in path.split(".") if path else ():
        found = getattr(found, name, None)
    return found


def install(root: nn.Module, path: str, value: nn.Module | torch.Tensor, *, persistent: bool = True) -> None:
    """Puts a module, parameter or buffer at a dotted path, making plain containers on the way."""
    *parents, name = path.split(".")
    for parent in parents:
        if root._modules.get(parent) is None:
            root.add_module(parent, nn.Module())
        root = root.get_submodule(parent)
    if isinstance(value, nn.Module):
        root.add_module(name, value)
    elif isinstance(value, nn.Parameter):
        root.register_parameter(name, value)
    else:
        root.register_buffer(name, value, persistent=persistent)


def is_persistent(root: nn.Module, path: str) -> bool:
    """Whether there is a buffer at a dotted path that belongs to the state dict."""
    owner, _, name = path.rpartition(".")
    holder = find(root, owner)
    return isinstance(holder, nn.Module) and name in holder._buffers and name not in holder._non_persistent_buffers_set
