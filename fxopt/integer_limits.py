"""Which integers a weight may hold, so that no sum of products is larger than the kernel has room for.

Without VNNI an x86 processor multiplies bytes by `vpmaddubsw`: it adds two products in 16 bits and saturates silently.
An unsigned activation goes up to 255, so two neighbouring weights u and v fit whatever the activations are if

    max(u, 0) + max(v, 0) <= 128   and   max(-u, 0) + max(-v, 0) <= 128       (255 * 128 = 32640 < 2^15).

Weights of 7 bits always do. Most weights are small, though, and their scale has to be made larger only as far as the
largest *pair* of an output demands, which leaves 7.4 bits and more. Neighbours are those in the order of the kernel's
loop: places of the kernel, then input channels; a depthwise convolution has a kernel of its own that adds in 32 bits.
OpenVINO's kernels differ where a convolution that is not grouped reads an odd number of channels: they fill them up
with a zero at each place, so that the last channel has no neighbour. That this is how both compute was verified bit by
bit, over 1-D to 3-D, grouped and linear layers (`tests/test_integer_limits.py` repeats it where the processor has no
VNNI).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxopt.analysis.patches import PatchLayer
from fxopt.integer_scheme import Pairs

__all__ = ["IntegerLimits"]

_PAIR = 128  # largest sum of two weights of one sign


@dataclass(frozen=True, eq=False)
class IntegerLimits:
    """Which integers the weight of a layer may hold.

    Attributes:
        largest: of an integer, and minus the smallest.
        partners: int64[D], for each place of a patch the one whose product is added to its own in 16 bits, itself if
            there is none; None where sums are of 32 bits.
    """

    largest: int
    partners: Tensor | None = None

    @classmethod
    def of(cls, layer: PatchLayer, bits: int, *, pairs: Pairs | None) -> IntegerLimits:
        """The limits of a layer.

        Args:
            layer: the layer.
            bits: of an integer.
            pairs: which two products the processor adds up in 16 bits; None: it has room for their sum.
        """
        largest = 2 ** (bits - 1) - 1
        if pairs is None or 2 * largest <= _PAIR or layer.is_depthwise:
            return cls(largest)
        partners = _partners(layer, padded=pairs == "within_places")
        if pairs == "either" and not torch.equal(partners, _partners(layer, padded=True)):
            return cls(_PAIR // 2)  # whose pairs always fit
        return cls(largest, partners)

    def reach(self, weight: Tensor) -> Tensor:
        """What takes the largest integer where each weight has the smallest scale that it fits with; no negatives.

        Args:
            weight: [groups, D, outputs / groups].
        """
        if self.partners is None:
            return weight.abs()
        sums = torch.maximum(*(part + self._theirs(part) for part in (weight.clamp(min=0), (-weight).clamp(min=0))))
        return torch.maximum(weight.abs(), sums * (self.largest / _PAIR))

    def fitted(self, codes: Tensor) -> Tensor:
        """Integers with those that are too large made smaller; of a pair, both alike.

        Args:
            codes: [groups, D, outputs / groups], whole numbers.
        """
        codes = codes.clamp(-self.largest, self.largest)
        if self.partners is None:
            return codes
        # numbers of unlike signs never add up to so much
        sums = self._theirs(codes).add_(codes)
        excess = (sums.abs() - _PAIR).clamp_(min=0)
        # of an odd excess the first of the pair takes the larger half
        first = (torch.arange(len(self.partners)) < self.partners).reshape(1, -1, 1)
        return codes - excess.add_(first).mul_(0.5).floor_().copysign_(sums)

    def bounds_among(self, place: int, codes: Tensor) -> tuple[Tensor, Tensor]:
        """The smallest and the largest integer at a place, given all others."""
        partner = place if self.partners is None else int(self.partners[place])
        if partner == place:
            return codes.new_tensor(-self.largest), codes.new_tensor(self.largest)
        return self._beside(codes[:, partner])

    def bounds(self, place: int, codes: Tensor) -> tuple[Tensor, Tensor]:
        """The smallest and the largest integer at a place, given those of the places before.

        Args:
            place: index of the place.
            codes: [groups, D, outputs / groups], of which those of earlier places count.
        """
        partner = place if self.partners is None else int(self.partners[place])
        if partner >= place:
            return codes.new_tensor(-self.largest), codes.new_tensor(self.largest)
        return self._beside(codes[:, partner])

    def _beside(self, other: Tensor) -> tuple[Tensor, Tensor]:
        low = (-_PAIR - other.clamp(max=0)).clamp(min=-self.largest)
        return low, (_PAIR - other.clamp(min=0)).clamp(max=self.largest)

    def _theirs(self, values: Tensor) -> Tensor:
        """Of each place, the value at its partner; zero if it has none."""
        assert self.partners is not None
        theirs = values[:, self.partners]
        theirs[:, self.partners == torch.arange(len(self.partners))] = 0
        return theirs


def _partners(layer: PatchLayer, *, padded: bool) -> Tensor:
    """Of each place the one whose product is added to its own; `padded` if channels are evened out at each."""
    # places as the kernel takes them: those of the window, and in each the channels
    order = torch.arange(layer.length).reshape(-1, layer.window).T
    rows = order if padded and layer.groups == 1 else order.reshape(1, -1)
    partners = torch.arange(layer.length)
    even = rows[:, : rows.shape[1] // 2 * 2].reshape(-1)
    partners[even] = even.reshape(-1, 2).flip(1).reshape(-1)
    return partners
