"""How far outputs are apart, and how a model is made a real test: seeded, with statistics and scales that matter."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode


class OutputMismatchError(Exception):
    """Two outputs are not of one structure, shape or type; the message says where."""


def seed(name: str) -> int:
    """A number that depends on the name alone (unlike `hash`)."""
    return sum((index + 1) * byte for index, byte in enumerate(name.encode()))


def randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Makes parameters that are initialised to a constant matter, in place.

    Fresh batch norms are the identity, layer scales are 1e-6 and some heads are zero: a wrong graph would pass unseen.
    Batch norms get mean and bias from N(0, 0.1), variance and weight from U(0.5, 1.5); any other parameter whose
    elements are all alike is varied around its value.
    """
    norms = [module for module in model.modules() if isinstance(module, _NormBase)]
    touched: set[int] = set()
    with torch.no_grad():
        for norm in norms:
            for tensor in (norm.running_mean, norm.bias):
                if tensor is not None:
                    tensor.normal_(0.0, 0.1, generator=generator)
            for tensor in (norm.running_var, norm.weight):
                if tensor is not None:
                    tensor.uniform_(0.5, 1.5, generator=generator)
            touched.update(id(parameter) for parameter in norm.parameters(recurse=False))
        for parameter in model.parameters():
            if id(parameter) in touched or parameter.numel() < 2 or not parameter.is_floating_point():
                continue
            value = parameter.flatten()[0].item()
            if bool((parameter != value).any()):
                continue
            if abs(value) < 0.5:
                parameter.normal_(value, 0.05, generator=generator)
            else:
                parameter.uniform_(0.75, 1.25, generator=generator).mul_(value)


def random_inputs(shapes: Sequence[tuple[int, ...]], batch: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """One standard normal tensor of shape `(batch, *shape)` per shape."""
    return tuple(torch.randn(batch, *shape, generator=generator) for shape in shapes)


def leaves(value: Any, path: str = "output") -> dict[str, Tensor]:
    """The tensors of a nested output, by path; containers of any class are named by their entries only."""
    if isinstance(value, Tensor):
        return {path: value}
    entries: Iterable[tuple[Any, Any]]
    if isinstance(value, Mapping):
        entries = value.items()
    elif isinstance(value, list | tuple):
        entries = enumerate(value)
    else:
        return {}
    return {name: leaf for key, child in entries for name, leaf in leaves(child, f"{path}[{key!r}]").items()}


def relative_error(actual: Any, expected: Any) -> float:
    """The worst `max|a - b| / max|b|` over the tensors of two nested outputs; `b` is expected. Infinite if not finite.

    Raises:
        OutputMismatchError: the outputs are not of one class, or their tensors differ in place, shape or type.
    """
    if type(actual) is not type(expected):
        raise OutputMismatchError(f"a {type(actual).__name__} instead of a {type(expected).__name__}")
    ours, theirs = leaves(actual), leaves(expected)
    if ours.keys() != theirs.keys():
        raise OutputMismatchError(f"tensors at {sorted(ours)} instead of {sorted(theirs)}")
    worst = 0.0
    for path, b in theirs.items():
        a = ours[path]
        if a.shape != b.shape:
            raise OutputMismatchError(f"{path} has shape {tuple(a.shape)} instead of {tuple(b.shape)}")
        if not bool(torch.isfinite(a).all()):
            return float("inf")
        if b.numel():
            scale = b.detach().double().abs().max().item()
            difference = (a.detach().double() - b.detach().double()).abs().max().item()
            worst = max(worst, difference / scale if scale else float("inf") if difference else 0.0)
    return worst


def count_macs(model: nn.Module, inputs: Sequence[Tensor]) -> int:
    """Multiply-accumulates of one forward, by torch's flop counter."""
    # with gradients: the counter hooks on to them, and fails where a layer reads a parameter and there are none
    with FlopCounterMode(display=False) as counter:
        model(*inputs)
    return int(counter.get_total_flops()) // 2


def double(module: nn.Module) -> nn.Module:
    """A copy in float64."""
    return copy.deepcopy(module).double()


class Float64(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A context in which what asks for float32 gets float64, so that a model that casts can run in float64."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if given.get("dtype") is torch.float32:
            given["dtype"] = torch.float64
        return func(*args, **given)
