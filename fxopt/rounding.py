"""Weights as integers: which scale, and which way each weight is rounded.

    W = s q + error,   one s for each output, or for each block of the places of an output

A scale is the one, of some that cut off its largest weights, whose rounding loses the least. With C the covariance of
the patches, what rounding loses of the outputs is the error's e' C e:

    nearest     looks at each weight by itself
    adaround    rounds each weight up or down (the problem of AdaRound, arXiv:2004.10568), solved by descent: one place
                after the other gets the integer that is best given all others
    gptq        rounds one place after the other, and lets those that are left make up for what was lost at the places
                before (GPTQ, arXiv:2210.17323; Optimal Brain Surgeon for rounding): with U the upper Cholesky factor
                of the inverse of C,  e = (w_i - s q_i) / U_ii,  w_j -= e U_ij  for j > i. Weights of few bits then
                descend, by more than a step if that is best

A weight that is zero stays so. What is lost on average is no business of the weights: the bias takes it up
(arXiv:1906.04721).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fxopt.analysis.layer_moments import Moments
from fxopt.analysis.removal_errors import ridge
from fxopt.integer_limits import IntegerLimits

__all__ = ["Rounded", "Rounding", "rounded"]

Rounding = Literal["nearest", "adaround", "gptq"]

_SHRINKS = [1 - step / 50 for step in range(0, 20, 3)]  # of the range of an output's weights: down to 0.64
_NEARBY = [step / 50 for step in (-2, -1, 1, 2)]  # that are tried around the best of these
_FEW = 64  # values of one sign: with more of them, GPTQ leaves nothing that a descent would be worth
_SWEEPS = 8  # of the descent
_STILL = 1e-3  # share of integers that move in a sweep, at which it ends
_AT_ONCE = 2**16  # weights whose scales are looked for together: they stay in the cache
_OF_ZEROS = 2.0**-20  # the scale of weights that are all zero
_BLOCK = 32  # places rounded before what they lost is passed on to those behind: they stay in the cache


class Rounded(NamedTuple):
    """A weight in integers.

    Attributes:
        codes: the integers, [groups, D, outputs / groups], as float64.
        scale: [groups, blocks, outputs / groups].
        offset: what the bias has to take up, [outputs].
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor


def rounded(
    weight: Tensor,
    limits: IntegerLimits,
    patches: Moments | None,
    *,
    how: Rounding = "nearest",
    per_channel: bool = True,
    block: int | None = None,
    absorbed: bool = True,
) -> Rounded:
    """The integers that stand for a weight.

    Args:
        weight: [groups, D, outputs / groups], float64, as `PatchLayer` gives it.
        limits: which integers it may hold.
        patches: moments of what it is multiplied by; None counts all places alike, and rounds to the nearest.
        how: "adaround" and "gptq" take the moments.
        per_channel: whether each output has a scale of its own.
        block: how many places share a scale; None: all. The last block may be shorter.
        absorbed: whether the bias takes up what is lost on average; else the weights answer for it.
    """
    if patches is not None and not absorbed:
        mean = patches.mean
        second = patches.covariance + mean.unsqueeze(2) * mean.unsqueeze(1)
        patches = Moments(torch.zeros_like(mean), second, patches.noise)
    counts = None if patches is None else patches.covariance.diagonal(dim1=1, dim2=2).unsqueeze(2)
    scale = _scales(weight, limits, counts, per_channel=per_channel, block=block)
    places = scale.repeat_interleave(block or weight.shape[1], 1)[:, : weight.shape[1]]
    nearest = limits.fitted((weight / places).round())
    codes = nearest
    if how != "nearest" and patches is not None:
        covariance = torch.stack([ridge(part, patches.noise) for part in patches.covariance])
        if how == "gptq":
            codes = _gptq(weight, places, limits, covariance)
        if how == "adaround" or limits.largest < _FEW:
            codes = _descended(weight, places, limits, covariance, codes, within_a_step=how == "adaround")
    offset = weight.new_zeros(weight.shape[0] * weight.shape[2])
    if patches is not None:
        offset = (patches.mean.unsqueeze(1) @ (weight - codes * places)).reshape(-1)
    return Rounded(codes, scale, offset)


def _scales(
    weight: Tensor, limits: IntegerLimits, counts: Tensor | None, *, per_channel: bool, block: int | None
) -> Tensor:
    """The scales, as float32 holds them, [groups, blocks, outputs / groups]."""
    size = _AT_ONCE // weight[:, :, 0].numel() if per_channel else weight.shape[2]
    found = torch.cat(
        [
            _scales_of(part, limits, counts, per_channel=per_channel, block=block or weight.shape[1])
            for part in torch.split(weight, max(1, size), 2)
        ],
        2,
    )
    # zeros fit any scale, but engines count the bias in steps of it
    usual = found.nanmean().float().double()
    return torch.where(found.isnan(), torch.where(usual.isnan(), _OF_ZEROS, usual), found)


def _scales_of(
    weight: Tensor, limits: IntegerLimits, counts: Tensor | None, *, per_channel: bool, block: int
) -> Tensor:
    """The same; NaN where there is nothing but zero."""
    length = weight.shape[1]
    single, importance = weight.float(), None if counts is None else counts.float()

    def in_blocks(values: Tensor) -> Tensor:
        """[groups, blocks, places, outputs / groups], zeros behind the last place."""
        padded: Tensor = torch.nn.functional.pad(values, (0, 0, 0, -length % block))
        return padded.reshape(len(values), -1, block, values.shape[2])

    def together(values: Tensor, join: Callable[..., Tensor]) -> Tensor:
        """The same number for all outputs, where these share a scale."""
        return values if per_channel else join(values, (0, 2), keepdim=True).expand_as(values)

    most = together(in_blocks(limits.reach(weight)).amax(2), torch.amax)

    def scale_of(share: Tensor) -> Tensor:
        return torch.where(most > 0, most * share / limits.largest, 1.0).float().clamp(min=1e-30)

    def lost(share: Tensor) -> Tensor:
        places = scale_of(share).repeat_interleave(block, 1)[:, :length]
        errors = limits.fitted((single / places).round_()).mul_(places).sub_(single).square_()
        if importance is not None:
            errors *= importance
        return together(in_blocks(errors).sum(2, dtype=torch.float64), torch.sum)

    best, least = torch.ones_like(most), torch.full_like(most, torch.inf)
    for steps in (_SHRINKS, _NEARBY):
        middle = torch.zeros_like(best) if steps is _SHRINKS else best
        for step in steps:
            share = (middle + step).clamp(max=1)
            error = lost(share)
            better = error < least
            least, best = torch.where(better, error, least), torch.where(better, share, best)
    return torch.where(most > 0, scale_of(best), torch.nan).double()


def _gptq(weight: Tensor, scale: Tensor, limits: IntegerLimits, covariance: Tensor) -> Tensor:
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(covariance))
    upper = torch.linalg.cholesky(inverse, upper=True)
    left = weight.clone()
    codes = torch.zeros_like(weight)
    length = weight.shape[1]
    for start in range(0, length, _BLOCK):
        end = min(start + _BLOCK, length)
        errors = []
        block = left[:, start:end].clone()
        for place in range(end - start):
            row, at = block[:, place], start + place
            code = (row / scale[:, at]).round().clamp(*limits.bounds(at, codes))
            code = code.masked_fill(weight[:, at] == 0, 0.0)  # pruned
            codes[:, at] = code
            error = (row - code * scale[:, at]) / upper[:, at, at].unsqueeze(1)
            errors.append(error)
            block[:, place + 1 :] -= upper[:, at, at + 1 : end].unsqueeze(2) * error.unsqueeze(1)
        left[:, end:] -= upper[:, start:end, end:].transpose(1, 2) @ torch.stack(errors, 1)
    return codes


def _descended(
    weight: Tensor, scale: Tensor, limits: IntegerLimits, covariance: Tensor, codes: Tensor, *, within_a_step: bool
) -> Tensor:
    """Integers from which no change of a single one makes the outputs better, or those after some sweeps.

    Args:
        weight: [groups, D, outputs / groups].
        scale: the same shape.
        limits: which integers it may hold.
        covariance: [groups, D, D].
        codes: to begin with.
        within_a_step: whether integers must be those next to the weight.
    """
    codes = codes.clone()
    slope = covariance @ (codes * scale - weight)
    lowest, highest = (weight / scale).floor(), (weight / scale).ceil()
    kept = weight == 0  # pruned
    length = weight.shape[1]
    steepness = covariance.diagonal(dim1=1, dim2=2).unsqueeze(2) * scale
    for _ in range(_SWEEPS):
        before = codes.clone()
        for start in range(0, length, _BLOCK):
            end = min(start + _BLOCK, length)
            steps = []
            inner, near = covariance[:, start:end, start:end], slope[:, start:end].clone()
            for place in range(end - start):
                at = start + place
                best = (codes[:, at] - near[:, place] / steepness[:, at]).round()
                if within_a_step:
                    best = best.clamp(lowest[:, at], highest[:, at])
                best = best.clamp(*limits.bounds_among(at, codes)).masked_fill(kept[:, at], 0.0)
                step = (best - codes[:, at]) * scale[:, at]
                codes[:, at] = best
                steps.append(step)
                near[:, place + 1 :] += inner[:, place + 1 :, place].unsqueeze(2) * step.unsqueeze(1)
            slope += covariance[:, :, start:end] @ torch.stack(steps, 1)
        if float((codes != before).double().mean()) <= _STILL:
            break
    return codes
