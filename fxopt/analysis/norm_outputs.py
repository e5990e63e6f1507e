"""What channels are on average, as far as the BatchNorm that they come out of tells: without data.

Over its training data, what a BatchNorm gives has in each channel the mean beta and the deviation |gamma|.
Taken as normally distributed, its mean and variance are followed through what comes next: operators on single elements
are applied to the quantiles of the distribution, sums add up the moments, averages over space keep the mean. The
variance after an average is that before it, an upper bound, and summands are taken as independent.

Reference: data-free bias correction, Nagel et al. (arXiv:1906.04721), appendix C.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, fx, nn

from fxopt.interpret import call_node
from fxopt.ops import operators

if TYPE_CHECKING:
    from fxopt.program import Program

__all__ = ["Expected", "expected"]

_QUANTILES = 255
_DEEPEST = 256  # operators between a layer and the BatchNorm
_SAME_MEAN = frozenset(
    "identity contiguous dropout dropout1d dropout2d dropout3d drop_path flatten avg_pool1d avg_pool2d avg_pool3d "
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d".split()
)


class Expected(NamedTuple):
    """Mean and variance of every channel, float64[C] each; the variance at most."""

    mean: Tensor
    variance: Tensor


def expected(program: Program, node: fx.Node, count: int) -> Expected | None:
    """What to expect of every channel that a layer reads; None where no BatchNorm tells.

    Args:
        program: in evaluation mode.
        node: the call of the layer.
        count: number of its input channels.
    """
    with torch.no_grad():
        found = _moments(program, cast("fx.Node", program.call(node).arguments["input"]), _DEEPEST)
    return found if found is not None and len(found.mean) == count else None


def _moments(program: Program, node: fx.Node, depth: int) -> Expected | None:
    call = program.call(node)
    sources = node.all_input_nodes
    if call.op == "batch_norm":
        norm: Any = call.module
        return _of_norm(norm) if isinstance(norm, nn.Module) and not norm.training else None
    known = operators().get(call.op)
    elementwise = known is not None and known.elementwise
    if depth == 0 or not sources or not (elementwise or call.op in _SAME_MEAN):
        return None
    before = [_moments(program, source, depth - 1) for source in sources]
    if any(item is None for item in before):
        return None
    moments = cast("list[Expected]", before)
    if call.op in _SAME_MEAN:
        return moments[0] if len(moments) == 1 else None
    if len(moments) == 1:
        return _through(program, node, moments[0])
    plain_sum = call.op == "add" and len(node.args) == 2 and not node.kwargs and len(moments) == 2
    if plain_sum and len(moments[0].mean) == len(moments[1].mean):
        one, other = moments
        return Expected(one.mean + other.mean, one.variance + other.variance)
    return None


def _of_norm(norm: Any) -> Expected | None:
    if norm.running_var is None:
        return None
    size = torch.zeros_like(norm.running_var, dtype=torch.float64)
    mean = size if norm.bias is None else norm.bias.detach().double()
    variance = size + 1 if norm.weight is None else norm.weight.detach().double().square()
    return Expected(mean, variance)


def _through(program: Program, node: fx.Node, before: Expected) -> Expected | None:
    """Through an operator on single elements, applied to samples [quantiles, C]."""
    places = (torch.arange(_QUANTILES, dtype=torch.float64, device=before.mean.device) + 0.5) / _QUANTILES
    samples = before.mean + before.variance.sqrt() * torch.special.ndtri(places)[:, None]
    module = program.module_of(node)
    if module is not None and any(True for _ in module.parameters()):
        return None
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda _: samples.clone())
    after = call_node(node, module, args, kwargs)
    if not isinstance(after, Tensor) or after.shape != samples.shape or not after.is_floating_point():
        return None
    return Expected(after.mean(0), after.var(0, unbiased=False))
