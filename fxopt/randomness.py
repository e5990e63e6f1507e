"""One random state for all runs that are compared with each other, and the caller's own left as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["fixed_random_state"]


@contextmanager
def fixed_random_state() -> Iterator[None]:
    """Seeds torch's generators for the block, and puts them back afterwards."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        yield
