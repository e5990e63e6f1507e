"""A weight held as a codebook and packed codes: few bits a weight, and centroids that train.

    weight.flatten() = codebook[row, code],   code < 2^bits,   one row for all, or one for each index of axis 0

Where weights were pruned, code 0 stands for zero, which is no centroid, so that training leaves it; and code c for
centroid c - 1.

A code of 3 bits does not fill bytes. So codes are split into fields of 8, 4, 2 and 1 bits, as the binary digits of
`bits` say (3 = 2 + 1), and each field is packed without a gap: of a field of 4 bits, the first half of the codes lies
in the low bits of its bytes and the second half in the high ones, so that one division unpacks each part.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

__all__ = ["CodebookWeight", "packed_bytes"]


class CodebookWeight(nn.Module):
    """Gives a weight that it holds as codes. The gradient of a centroid is the sum over the weights that share it.

    Attributes:
        codes: packed, uint8.
        codebook: the centroids, [rows, centroids].
        shape: of the weight.
        bits: of a code.
        zero: whether code 0 stands for zero.
    """

    codes: Tensor

    def __init__(
        self, codes: Tensor, codebook: nn.Parameter, shape: tuple[int, ...], bits: int, *, zero: bool = False
    ) -> None:
        """Packs the codes.

        Args:
            codes: whole numbers, one for each element of the weight, in its order: places in the codebook; with `zero`
                0 for zero, and behind it these.
            codebook: [rows, centroids], one row, or as many as axis 0 of the weight has indices.
            shape: of the weight.
            bits: of a code, 1 to 8.
            zero: whether code 0 stands for zero.
        """
        super().__init__()
        self.shape, self.bits, self.zero = tuple(shape), bits, zero
        self.codebook = codebook
        self.register_buffer("codes", _packed(codes.reshape(-1), bits))

    def forward(self) -> Tensor:
        """The weight, in the codebook's data type."""
        codes = _unpacked(self.codes, math.prod(self.shape), self.bits)
        values = nn.functional.pad(self.codebook, (1, 0)) if self.zero else self.codebook
        return torch.gather(values, 1, codes.reshape(len(values), -1)).reshape(self.shape)

    def extra_repr(self) -> str:
        """What the text of a program shows."""
        rows, centroids = self.codebook.shape
        clusters = f"{centroids} and zero" if self.zero else str(centroids)
        return f"{list(self.shape)}, bits={self.bits}, clusters={clusters}" + (f" in {rows} rows" if rows > 1 else "")


def packed_bytes(count: int, bits: int) -> int:
    """How many bytes so many codes take."""
    return sum(size for _, size, _ in _fields(count, bits))


def _fields(count: int, bits: int) -> Iterator[tuple[int, int, int]]:
    """Width in bits, size in bytes and place in the code of each field."""
    place = 0
    for width in (8, 4, 2, 1):
        if bits & width:
            yield width, -(-count * width // 8), place
            place += width


def _packed(codes: Tensor, bits: int) -> Tensor:
    packed = []
    for width, size, place in _fields(len(codes), bits):
        field = (codes >> place) & (2**width - 1)
        parts = nn.functional.pad(field, (0, size * (8 // width) - len(codes))).reshape(8 // width, size)
        packed.append(sum(part << (width * index) for index, part in enumerate(parts)))
    return torch.cat(packed).to(torch.uint8)


def _unpacked(packed: Tensor, count: int, bits: int) -> Tensor:
    """The codes, int64."""
    codes, start = None, 0
    for width, size, place in _fields(count, bits):
        field = packed[start : start + size]
        if width < 8:
            # by division: the ONNX exporter takes bytes for signed when it shifts them; and without a remainder, as
            # OpenVINO rounds the quotients of bytes to the nearest
            divisors = (2 ** torch.arange(0, 8, width, device=packed.device)).to(torch.uint8)[:, None]
            field = ((field - field % divisors) // divisors % 2**width).reshape(-1)[:count]
        shifted = field.long() * 2**place if place else field.long()
        codes = shifted if codes is None else codes + shifted
        start += size
    assert codes is not None
    return codes
