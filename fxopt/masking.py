"""Convolutions and linear layers whose weight has a mask: what is masked is zero, and stays zero in training.

    y = layer(x) with the weight W ⊙ M,      ∂L/∂W = M ⊙ ∂L/∂(W ⊙ M)

W holds zeros where M does, and its gradient is zero there. So is what momentum and weight decay add to it, and an
optimizer leaves W at zero. Whatever else is loaded into W, the layer computes with W ⊙ M.

To passes a masked layer is the layer that it was: it has the same canonical name and attributes, and its weight can be
scaled. One that cuts, adds or fits weights asks `mask_of` first, and refuses.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxopt.sharing import share_module

if TYPE_CHECKING:
    from fxopt.program import Program

__all__ = [
    "MaskedConv1d",
    "MaskedConv2d",
    "MaskedConv3d",
    "MaskedConvTranspose1d",
    "MaskedConvTranspose2d",
    "MaskedConvTranspose3d",
    "MaskedLinear",
    "mask_of",
    "with_mask",
    "without_mask",
    "without_masks",
]


class _Masked(nn.Module):
    """What masked layers have in common.

    Attributes:
        mask: bool, of the weight's shape: False where the weight is zero.
    """

    mask: Tensor

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, masked"


class MaskedLinear(_Masked, nn.Linear):
    """A linear layer with a mask."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the name that torch gives it)
        return F.linear(input, self.weight * self.mask, self.bias)


class MaskedConv1d(_Masked, nn.Conv1d):
    """A convolution with a mask."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        result: Tensor = self._conv_forward(input, self.weight * self.mask, self.bias)
        return result


class MaskedConv2d(_Masked, nn.Conv2d):
    """A convolution with a mask."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        result: Tensor = self._conv_forward(input, self.weight * self.mask, self.bias)
        return result


class MaskedConv3d(_Masked, nn.Conv3d):
    """A convolution with a mask."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        result: Tensor = self._conv_forward(input, self.weight * self.mask, self.bias)
        return result


class MaskedConvTranspose1d(_Masked, nn.ConvTranspose1d):
    """A transposed convolution with a mask."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:  # noqa: A002
        return _transposed(self, F.conv_transpose1d, input, output_size)


class MaskedConvTranspose2d(_Masked, nn.ConvTranspose2d):
    """A transposed convolution with a mask."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:  # noqa: A002
        return _transposed(self, F.conv_transpose2d, input, output_size)


class MaskedConvTranspose3d(_Masked, nn.ConvTranspose3d):
    """A transposed convolution with a mask."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:  # noqa: A002
        return _transposed(self, F.conv_transpose3d, input, output_size)


_MASKED: Mapping[type[nn.Module], type[_Masked]] = {
    nn.Linear: MaskedLinear,
    nn.Conv1d: MaskedConv1d,
    nn.Conv2d: MaskedConv2d,
    nn.Conv3d: MaskedConv3d,
    nn.ConvTranspose1d: MaskedConvTranspose1d,
    nn.ConvTranspose2d: MaskedConvTranspose2d,
    nn.ConvTranspose3d: MaskedConvTranspose3d,
}
_PLAIN = {masked: plain for plain, masked in _MASKED.items()}


def mask_of(module: nn.Module | None) -> Tensor | None:
    """The mask of a layer's weight, bool: False where the weight is zero. None for a module that has none."""
    return module.mask if isinstance(module, _Masked) else None


def with_mask(module: nn.Module, mask: Tensor) -> nn.Module:
    """A copy of a layer that has this mask, in place of one that it may have, and zeros where the mask is False.

    Args:
        module: a convolution, transposed convolution or linear layer of torch, masked or not.
        mask: bool, of the weight's shape.
    """
    private = share_module(module)
    # another class for the same attributes: a constructor would have to be told each of them, and draw weights
    private.__class__ = _MASKED.get(type(module), type(module))
    private.register_buffer("mask", mask)
    private.weight = _masked_weight(module, mask)
    return private


def without_mask(module: nn.Module, mask: Tensor | None = None) -> nn.Module:
    """A copy of a layer that has no mask, and zeros where `mask` is False; its own mask if none is given."""
    kept = mask_of(module) if mask is None else mask
    private = share_module(module)
    if isinstance(module, _Masked):
        private.__class__ = _PLAIN[type(module)]
        del private.mask
    if kept is not None:
        private.weight = _masked_weight(module, kept)
    return private


def without_masks(program: Program) -> Program:
    """The program itself if no layer has a mask, else a copy in which the zeros are in the weights alone.

    For engines, which do not train: the mask would cost them a product per call and space.
    """
    from fxopt import edit

    if not any(mask_of(program.module_of(node)) is not None for node in program.nodes):
        return program
    plain = program.copy()
    for node in plain.nodes:
        module = plain.module_of(node)
        if module is not None and mask_of(module) is not None:
            edit.set_module(plain, node, without_mask(module))
    return plain


def _masked_weight(module: nn.Module, mask: Tensor) -> nn.Parameter:
    """The weight itself where it is zero already: what shares it still does."""
    weight = cast("nn.Parameter", module.weight)
    if not weight.detach()[~mask].any():
        return weight
    # not a product, which would leave zeros with a sign
    zeroed = torch.where(mask, weight.detach(), torch.zeros_like(weight))
    return nn.Parameter(zeroed, requires_grad=weight.requires_grad)


def _transposed(module: Any, function: Any, given: Tensor, output_size: list[int] | None) -> Tensor:
    sizes = module.stride, module.padding, module.kernel_size
    added = module._output_padding(given, output_size, *sizes, len(module.kernel_size), module.dilation)
    weight = module.weight * module.mask
    result: Tensor = function(
        given, weight, module.bias, module.stride, module.padding, added, module.groups, module.dilation
    )
    return result
