"""The one error that the benchmarks raise on purpose."""

from __future__ import annotations


class BenchmarkError(Exception):
    """What the user asked for does not exist or does not fit; the message says what does."""
