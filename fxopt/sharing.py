"""Copies of modules that share their tensors: passes never write into those, so a copied program costs no memory."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import fx, nn

__all__ = ["buffers_restored", "keep_persistence", "share_module", "without_graph"]


def share_module(module: nn.Module, memo: dict[int, nn.Module] | None = None) -> nn.Module:
    """A copy of a tree of modules: new module objects, the same parameter and buffer objects.

    Args:
        module: the root.
        memo: copies made so far by identity, so that a module used twice stays one module.
    """
    memo = {} if memo is None else memo
    if id(module) in memo:
        return memo[id(module)]
    clone: nn.Module = object.__new__(type(module))
    memo[id(module)] = clone
    for name, value in module.__dict__.items():
        # containers are copied, so that an assignment to the copy never shows in the original
        clone.__dict__[name] = copy.copy(value) if isinstance(value, dict | list | set) else value
    clone.__dict__["_modules"] = {
        name: None if child is None else share_module(child, memo) for name, child in module._modules.items()
    }
    return clone


def without_graph(module: fx.GraphModule) -> nn.Module:
    """What a graph is over: a plain module with copies of the graph module's children, sharing all tensors."""
    root = nn.Module()
    root.training = module.training
    for name in ("_parameters", "_buffers", "_non_persistent_buffers_set"):
        root.__dict__[name] = copy.copy(module.__dict__[name])
    memo: dict[int, nn.Module] = {}
    for name, child in module._modules.items():
        root.add_module(name, None if child is None else share_module(child, memo))
    return root


@contextmanager
def buffers_restored(module: nn.Module) -> Iterator[list[str]]:
    """Undoes what a block writes into the buffers of a module; names those written, once the block is left."""
    buffers = {name: item for name, item in module.named_buffers() if not item.is_inference()}
    before = {name: buffer.clone() for name, buffer in buffers.items()}
    written: list[str] = []
    try:
        yield written
    finally:
        with torch.no_grad():
            for name, value in before.items():
                # by value: BatchNorm's kernel writes its statistics without counting a version
                if not ((buffers[name] == value) | (value != value)).all():
                    buffers[name].copy_(value)
                    written.append(name)


def keep_persistence(copied: nn.Module, original: nn.Module) -> None:
    """Hides the buffers from the state dict of `copied` that the original's hides; `fx.GraphModule` forgets which."""
    modules = dict(original.named_modules(remove_duplicate=False))
    for path, module in copied.named_modules(remove_duplicate=False):
        hidden = modules[path]._non_persistent_buffers_set if path in modules else set()
        module._non_persistent_buffers_set |= {name for name in hidden if name in module._buffers}
