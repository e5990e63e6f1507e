"""The execution contexts of a TensorRT engine: one for each call that is under way, and CUDA graphs.

A context has memory for one call. It is handed back as soon as its work is queued, so whoever takes it next has the
GPU wait for that: an event says when.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["Contexts", "Slot"]

_capturing = threading.Lock()  # torch captures on a stream that all threads share


class Slot:
    """An execution context, with the graph that was captured in it.

    Attributes:
        context: TensorRT's.
        done: reached when what was queued last has run.
    """

    def __init__(self, context: Any) -> None:
        self.context = context
        self.done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[torch.Tensor] = []
        self._outputs: list[torch.Tensor] = []

    def replayed(
        self, inputs: Sequence[torch.Tensor], queue: Callable[[Any, Sequence[torch.Tensor]], list[torch.Tensor]]
    ) -> list[torch.Tensor]:
        """Runs the graph of `queue`, captured at the first call, on other inputs of the same shapes.

        Args:
            inputs: are copied into the graph's own.
            queue: queues the engine in a context on the current stream, and returns what it will give.
        """
        if self._graph is None:
            self._capture(inputs, queue)
        assert self._graph is not None
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given)
        self._graph.replay()
        return [output.clone() for output in self._outputs]

    def _capture(
        self, inputs: Sequence[torch.Tensor], queue: Callable[[Any, Sequence[torch.Tensor]], list[torch.Tensor]]
    ) -> None:
        self._inputs = [tensor.clone() for tensor in inputs]
        current = torch.cuda.current_stream()
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(current)
        with torch.cuda.stream(side):
            queue(self.context, self._inputs)  # the first call for a shape prepares what must not be captured
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with _capturing, torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._outputs = queue(self.context, self._inputs)
        self._graph = graph


class Contexts:
    """Execution contexts that are made as they are needed and used again.

    Args:
        make: a new one.
    """

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._idle: dict[tuple[tuple[int, ...], ...], list[Slot]] = {}

    @contextmanager
    def borrowed(self, shapes: tuple[tuple[int, ...], ...] = ()) -> Iterator[Slot]:
        """A context that no other thread has, for work on the current stream.

        Args:
            shapes: that a graph is captured for; a context with a graph serves no other shapes.
        """
        with self._lock:
            idle = self._idle.get(shapes)
            slot = idle.pop() if idle else None
        slot = slot or Slot(self._make())
        stream = torch.cuda.current_stream()
        stream.wait_event(slot.done)
        try:
            yield slot
        finally:
            slot.done.record(stream)
            with self._lock:
                self._idle.setdefault(shapes, []).append(slot)
