"""Identities of channels: which elements of which tensors can only be removed together.

Every element of a value carries the label of the channel that it belongs to. `Labels` is a tensor of such labels, held
at size 1 along all axes on which they do not depend. `LabelSpace` hands labels out, and keeps which of them have become
one (a union-find) and which may not be removed, with the reason. Label 0 is what is never removed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

__all__ = ["FIXED", "LabelSpace", "Labels", "labels_in"]

FIXED = 0
"""The label of what is never removed."""


@dataclass(frozen=True, eq=False)
class Labels:
    """The labels of a value.

    Attributes:
        compact: int64, of the value's rank; of size 1 along each axis on which the labels do not depend.
        shape: of the value.
    """

    compact: torch.Tensor
    shape: tuple[int, ...]

    @classmethod
    def of(cls, full: torch.Tensor) -> Labels:
        """From a label per element; finds the axes on which they depend."""
        compact = full
        for axis, size in enumerate(full.shape):
            if size > 1:
                first = compact.narrow(axis, 0, 1)
                if full.stride(axis) == 0 or bool((compact == first).all()):
                    compact = first
        return cls(compact, tuple(full.shape))

    @classmethod
    def fixed(cls, shape: Sequence[int]) -> Labels:
        """Of a value of which nothing can be removed."""
        return cls(torch.full((1,) * len(shape), FIXED, dtype=torch.int64), tuple(shape))

    @classmethod
    def along(cls, vector: torch.Tensor, axis: int, shape: Sequence[int]) -> Labels:
        """Of a value whose labels depend on one axis only; `vector` holds one label per index of it."""
        sizes = [1] * len(shape)
        sizes[axis] = -1
        return cls(vector.reshape(sizes), tuple(shape))

    def full(self) -> torch.Tensor:
        """A label per element, expanded without copying."""
        return self.compact.expand(self.shape)

    def with_rank(self, rank: int) -> Labels:
        """The same with axes of size 1 in front, as broadcasting puts them."""
        more = (1,) * (rank - len(self.shape))
        return Labels(self.compact.reshape(*more, *self.compact.shape), (*more, *self.shape))

    @property
    def axes(self) -> list[int]:
        """The axes on which the labels depend."""
        return [axis for axis, size in enumerate(self.compact.shape) if size > 1]

    @property
    def is_fixed(self) -> bool:
        """Whether nothing of the value can be removed."""
        return self.compact.numel() == 1 and int(self.compact) == FIXED

    def index(self, axis: int) -> int:
        """The axis as a number from 0."""
        return axis % len(self.shape)


def labels_in(value: Any) -> list[Labels]:
    """The labels of all tensors in a value: one, a nested sequence of some, or none."""
    if isinstance(value, Labels):
        return [value]
    return [item for part in value for item in labels_in(part)] if isinstance(value, tuple | list) else []


class LabelSpace:
    """Hands out labels, joins them, and locks them."""

    def __init__(self) -> None:
        self._root = np.zeros(1, dtype=np.int64)
        self._pending: list[tuple[np.ndarray, np.ndarray]] = []
        self._reasons: dict[int, str] = {}
        self._unlocked: np.ndarray | None = None  # the roots, FIXED where locked; None when anything changed

    def fresh(self, count: int) -> torch.Tensor:
        """That many labels that nothing else has."""
        start, self._unlocked = len(self._root), None
        self._root = np.concatenate([self._root, np.arange(start, start + count)])
        return torch.arange(start, start + count)

    def join(self, left: torch.Tensor, right: torch.Tensor, why: str) -> None:
        """Makes labels one, element by element (broadcast); what is joined to FIXED is locked for the reason `why`."""
        a, b = (item.reshape(-1) for item in np.broadcast_arrays(left.numpy(), right.numpy()))
        different = a != b
        a, b = a[different], b[different]
        for label in np.unique(np.concatenate([b[a == FIXED], a[b == FIXED]])):
            self._reasons.setdefault(int(label), why)
        self._unlocked = None if different.any() else self._unlocked
        free = (a != FIXED) & (b != FIXED)
        if free.any():
            self._pending.append((a[free], b[free]))

    def lock(self, labels: torch.Tensor, why: str) -> None:
        """Keeps these from being removed."""
        self.join(torch.from_numpy(np.unique(labels.numpy())), torch.tensor(FIXED), why)

    def roots(self, labels: torch.Tensor) -> torch.Tensor:
        """The representative of each label: the same for labels that became one, FIXED for what is locked."""
        root = self._settled()
        if self._unlocked is None:
            self._unlocked = root.copy()
            locked = np.zeros(len(root), dtype=bool)
            locked[root[list(self._reasons)]] = True
            self._unlocked[locked[root]] = FIXED
        return torch.from_numpy(self._unlocked[labels.numpy().reshape(-1)]).reshape(labels.shape)

    def reduced(self, value: Labels) -> Labels:
        """The same labels by their representatives."""
        if not value.axes:
            return value
        return Labels(Labels.of(self.roots(value.compact)).compact, value.shape)

    def reasons(self, labels: torch.Tensor) -> list[str]:
        """Why labels may not be removed: for what those that they were joined with were locked, in order."""
        root = self._settled()
        wanted = set(root[labels.numpy().reshape(-1)].tolist())
        return list(dict.fromkeys(why for label, why in self._reasons.items() if root[label] in wanted))

    def _settled(self) -> np.ndarray:
        """The root of every label, once what was joined is carried out: the smallest label of its component."""
        left = np.concatenate([pair[0] for pair in self._pending] or [np.zeros(0, dtype=np.int64)])
        right = np.concatenate([pair[1] for pair in self._pending] or [np.zeros(0, dtype=np.int64)])
        self._pending = []
        root = self._root
        while True:
            a, b = root[left], root[right]
            unequal = a != b
            if not unequal.any():
                break
            left, right, a, b = left[unequal], right[unequal], a[unequal], b[unequal]
            np.minimum.at(root, np.maximum(a, b), np.minimum(a, b))
            while not (root[root] == root).all():
                root = root[root]
        self._root = root
        return root
