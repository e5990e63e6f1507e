"""How much the loss minds a change of each weight: the diagonal of the empirical Fisher information.

    F_i = mean over samples of (dL / dw_i)²

Near a minimum, changing the weights by d raises the loss by about 1/2 sum F_i d_i². References: Theis et al.
(arXiv:1801.05787); for clustering, Choi et al. (arXiv:1612.01543) and SqueezeLLM (arXiv:2306.07629).
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.func import functional_call

from fxopt.errors import InputError
from fxopt.progress import progress
from fxopt.randomness import fixed_random_state
from fxopt.sharing import buffers_restored

if TYPE_CHECKING:
    from fxopt.program import Program

__all__ = ["squared_gradients"]


def squared_gradients(program: Program) -> Mapping[str, Tensor]:
    """The mean squared gradient of the loss by each element of each parameter of two or more axes, by its path.

    Each sample has a gradient of its own where the program takes any batch size, is in evaluation mode, and the targets
    are a tensor with the batch on axis 0; elsewhere each batch has one, so give small batches there.

    Args:
        program: with calibration data whose batches hold targets behind the inputs; see `Program.loss_of`.

    Returns:
        Tensors of the parameters' shapes, at least in float32. Parameters that the loss does not depend on have zeros.

    Raises:
        InputError: if there are no calibration data or no targets, they do not fit, or the loss is not finite.
    """
    module = program.flat_module()
    names = [name for name, item in module.named_parameters() if item.ndim > 1 and item.is_floating_point()]
    leaves = {name: module.get_parameter(name).detach().requires_grad_() for name in names}
    totals = {name: torch.zeros_like(leaf, dtype=_wide(leaf.dtype)) for name, leaf in leaves.items()}
    count = 0
    steps = operator.length_hint(program.calibration, 0)
    with progress("gradients of the loss", steps) as advance, fixed_random_state(), buffers_restored(module):
        for batch, targets in program.calibration_pairs():
            for inputs, wanted in _samples(program, batch, targets):
                loss = program.loss_of(functional_call(module, leaves, inputs), wanted)
                if not bool(loss.isfinite()):
                    raise InputError("the loss is not finite on the calibration data")
                gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
                for name, gradient in zip(names, gradients, strict=True):
                    if gradient is not None:
                        totals[name] += gradient.to(totals[name].dtype).square()
                count += 1
            advance(1)
    first = {id(module.get_parameter(name)): name for name in names}
    every = module.named_parameters(remove_duplicate=False)
    return {name: totals[first[id(item)]] / count for name, item in every if id(item) in first}


def _samples(program: Program, inputs: tuple[Tensor, ...], targets: Any) -> Iterator[tuple[tuple[Tensor, ...], Any]]:
    """A batch one sample at a time, or as it is where it cannot be divided."""
    batched = () if program.batch is None or program.training else program.batch.inputs
    size = len(inputs[batched[0]]) if batched else 0
    if not size or not isinstance(targets, Tensor) or not targets.ndim or len(targets) != size:
        yield inputs, targets
        return
    for index in range(size):
        one = slice(index, index + 1)
        yield tuple(item[one] if place in batched else item for place, item in enumerate(inputs)), targets[one]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
