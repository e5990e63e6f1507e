"""Runs a plan of TensorRT on torch's CUDA tensors, by pointer and on torch's current stream.

A plan needs a GPU to become an engine: without one it can be made, saved and loaded, and `cannot_run` says what is
missing. On CUDA's default stream TensorRT synchronizes more than it must: `torch.cuda.stream` gives it another.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fxopt.backend import Engine, TensorSpec, check_inputs
from fxopt.errors import ArtifactError, BackendError, BackendUnavailable
from fxopt.lowering.tensorrt_contexts import Contexts
from fxopt.lowering.tensorrt_device import no_gpu
from fxopt.lowering.tensorrt_layers import engine_layers
from fxopt.runtime.tensorrt_plan import PLAN_FILE, context_for, deserialize, errors_of, load_module, why_invalid

__all__ = ["TensorrtEngine", "checked_info"]

_PARSED = "layers are those of the network that was parsed: which are fused is known where a GPU loads the engine"
_ALIGNMENT = 256  # bytes, of the address of a tensor that is bound


class TensorrtEngine(Engine):
    """An engine of TensorRT, or of TensorRT-RTX.

    Args:
        plan: the engine as bytes.
        inputs: what it expects.
        device: the CUDA device.
        info: what `info()` says, with "outputs", and "ranges" of the free axes.
        cuda_graph: whether calls are captured as CUDA graphs and replayed.
    """

    def __init__(
        self,
        plan: bytes,
        *,
        inputs: tuple[TensorSpec, ...],
        device: torch.device,
        info: Mapping[str, Any],
        cuda_graph: bool,
    ) -> None:
        self.inputs = inputs
        self.limits = {name: (sizes[0], sizes[-1]) for name, sizes in info["ranges"].items()}
        self._module = load_module(str(info["backend"]))
        self._plan = plan
        self._device = device
        self._info = dict(info)
        self._outputs = [(str(item["name"]), getattr(torch, item["dtype"])) for item in info["outputs"]]
        self._own_graphs = cuda_graph and not hasattr(self._module, "CudaGraphStrategy")
        self._rtx_graphs = cuda_graph and not self._own_graphs
        self._loading = threading.Lock()
        self._engine: Any = None
        self._feeds: list[str | None] = []
        self._contexts = Contexts(lambda: context_for(self._module, self._engine, cuda_graph=self._rtx_graphs))
        self._missing = no_gpu(device) or self._why_invalid()

    @property
    def device(self) -> torch.device:
        return self._device

    def cannot_run(self) -> str | None:
        return self._missing

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if self._missing is not None:
            raise BackendUnavailable(f"{self._info['backend']}: the engine cannot run here: {self._missing}")
        check_inputs(self.inputs, self._device, inputs, limits=self.limits)
        with torch.no_grad(), torch.cuda.device(self._device):
            self._load()
            given = [_bindable(tensor) for tensor in inputs]
            shapes = tuple(tuple(tensor.shape) for tensor in given) if self._own_graphs else ()
            with self._contexts.borrowed(shapes) as slot:
                if self._own_graphs:
                    return tuple(slot.replayed(given, self._queue))
                return tuple(self._queue(slot.context, given))

    def inspect(self) -> None:
        """Has `info()` tell the layers that really run, where the engine can; else say that these were parsed.

        Raises:
            BackendError: if the engine cannot be loaded though it should.
        """
        if self._missing is not None:
            self._info["notes"] = [*self._info["notes"], _PARSED]
            return
        with torch.cuda.device(self._device):
            self._load()
            self._info["layers"] = engine_layers(self._module, self._engine)

    def save(self, directory: Path) -> None:
        (directory / PLAN_FILE).write_bytes(self._plan)

    def info(self) -> Mapping[str, Any]:
        return {**self._info, "dynamic_batch": self.dynamic_batch, "notes": list(self._info["notes"])}

    def _why_invalid(self) -> str | None:
        with torch.cuda.device(self._device):
            return why_invalid(self._module, self._plan)

    def _load(self) -> None:
        with self._loading:
            if self._engine is None:
                engine = deserialize(self._module, self._plan, host_code=self._info["host_code"])
                names = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
                # what nothing reads may be missing
                self._feeds = [spec.name if spec.name in names else None for spec in self.inputs]
                self._engine = engine

    def _queue(self, context: Any, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Queues a call on the current stream, behind which memory that is freed is used again."""
        with errors_of(self._module) as errors:
            fed = [(name, tensor) for name, tensor in zip(self._feeds, inputs, strict=True) if name is not None]
            bound = all(
                context.set_input_shape(name, tuple(tensor.shape))
                and context.set_tensor_address(name, tensor.data_ptr())
                for name, tensor in fed
            )
            outputs = [self._output_of(context, name, dtype) for name, dtype in self._outputs] if bound else []
            if not bound or not context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
                raise BackendError(f"{self._info['backend']} failed: {'; '.join(errors) or 'no reason given'}")
        return outputs

    def _output_of(self, context: Any, name: str, dtype: torch.dtype) -> torch.Tensor:
        """New memory for an output, bound to a context that knows the shapes of the inputs."""
        sizes = tuple(context.get_tensor_shape(name))
        if any(size < 0 for size in sizes):
            raise BackendError(f"the size of the output {name} depends on values, which this backend does not support")
        output = torch.empty(sizes, dtype=dtype, device=self._device)
        context.set_tensor_address(name, output.data_ptr())
        return output


def _bindable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy whose memory TensorRT takes."""
    whole = tensor.detach().contiguous()
    return whole.clone() if whole.data_ptr() % _ALIGNMENT else whole


def checked_info(info: Mapping[str, Any], name: str, path: Path) -> Mapping[str, Any]:
    """What a manifest says of an engine, with all that is needed to run it.

    Raises:
        ArtifactError: if something is missing.
    """
    outputs, ranges = info.get("outputs"), info.get("ranges")
    named = isinstance(outputs, list) and all(
        isinstance(item, dict)
        and isinstance(item.get("name"), str)
        and isinstance(getattr(torch, str(item.get("dtype")), None), torch.dtype)
        for item in outputs
    )
    limited = isinstance(ranges, dict) and all(
        isinstance(sizes, list) and len(sizes) == 3 and all(type(size) is int for size in sizes)
        for sizes in ranges.values()
    )
    if info.get("backend") != name or not named or not limited:
        raise ArtifactError(f"the manifest beside {path} does not describe an engine of {name}: save the engine again")
    return {"notes": [], **info, "host_code": info.get("host_code") is True}
