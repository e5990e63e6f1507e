"""OpenVINO's compiled model as an engine: torch tensors in by pointer, outputs copied out of the request that ran.

A request holds the buffers of one run. Each call takes one that is free, or makes one, so that threads share an engine.

What OpenVINO would get wrong without a word is refused: it computes int64 in 32 bits, and leaves outputs of an empty
batch as the last run left them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fxopt.backend import Engine, TensorSpec, check_inputs
from fxopt.errors import BackendError, InputError
from fxopt.free_axes import BATCH

if TYPE_CHECKING:
    import openvino

__all__ = ["MODEL_FILE", "OpenVinoEngine", "capabilities", "compile_model", "read_model"]

MODEL_FILE = "model.xml"

_DEVICE = "CPU"
_INT32 = torch.iinfo(torch.int32)
_NO_LAYERS = ("Const", "Input", "Output")
_REASON_LENGTH = 400


class OpenVinoEngine(Engine):
    """Runs a model in OpenVINO."""

    def __init__(
        self,
        model: openvino.Model,
        compiled: openvino.CompiledModel,
        *,
        inputs: tuple[TensorSpec, ...],
        notes: Sequence[str] = (),
        seconds: Mapping[str, float] | None = None,
    ) -> None:
        import openvino

        self.limits = {BATCH: (1, _INT32.max)}
        self.inputs = inputs
        self._model = model
        self._compiled = compiled
        self._notes = list(notes)
        self._seconds = dict(seconds or {})
        self._tensor = openvino.Tensor
        self._bfloat16 = openvino.Type.bf16
        # an input that the model does not use may be missing
        places = {name: index for index, port in enumerate(compiled.inputs) for name in port.get_names()}
        types = [port.get_element_type() for port in compiled.inputs]
        self._feeds = [
            (place, types[place]) if (place := places.get(spec.name)) is not None else None for spec in inputs
        ]
        self._outputs = range(len(compiled.outputs))
        self._free: deque[openvino.InferRequest] = deque()

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        check_inputs(self.inputs, self.device, inputs, limits=self.limits)
        for spec, tensor in zip(self.inputs, inputs, strict=True):
            _refuse_large_integers(spec, tensor)
        # what OpenVINO reads by pointer must live until it has
        held = [tensor.detach().contiguous() for tensor in inputs]
        try:
            try:
                request = self._free.pop()
            except IndexError:
                request = self._compiled.create_infer_request()
            for feed, tensor in zip(self._feeds, held, strict=True):
                if feed is not None:
                    request.set_input_tensor(feed[0], self._shared(tensor, feed[1]))
            request.infer()
            outputs = tuple(self._copied(request.get_output_tensor(index)) for index in self._outputs)
        except Exception as error:  # OpenVINO raises RuntimeError for everything
            raise BackendError(f"OpenVINO failed: {_reason(error)}") from error
        self._free.append(request)
        return outputs

    def _shared(self, tensor: torch.Tensor, kind: openvino.Type) -> openvino.Tensor:
        numbers = tensor.view(torch.int16) if kind == self._bfloat16 else tensor  # numpy has no bfloat16
        return self._tensor(numbers.numpy(), list(tensor.shape), kind)

    def _copied(self, output: openvino.Tensor) -> torch.Tensor:
        tensor = torch.from_numpy(output.data.copy())
        return tensor.view(torch.bfloat16) if output.get_element_type() == self._bfloat16 else tensor

    def save(self, directory: Path) -> None:
        import openvino

        openvino.save_model(self._model, directory / MODEL_FILE, compress_to_fp16=False)

    def info(self) -> Mapping[str, Any]:
        import openvino

        return {
            "backend": "openvino",
            "version": openvino.get_version(),
            "device": str(self.device),
            "dynamic_batch": self.dynamic_batch,
            "threads": int(self._compiled.get_property("INFERENCE_NUM_THREADS")),
            "streams": int(self._compiled.get_property("NUM_STREAMS")),
            "bytes": sum(
                int(node.get_byte_size()) for node in self._model.get_ops() if node.get_type_name() == "Constant"
            ),
            "seconds": dict(self._seconds),
            "layers": _layers(self._compiled),
            "notes": list(self._notes),
        }


def capabilities() -> list[str]:
    """What the processor computes in, by OpenVINO's names: "FP32", "BF16", "FP16", "INT8"."""
    import openvino

    return list(openvino.Core().get_property(_DEVICE, "OPTIMIZATION_CAPABILITIES"))


def read_model(path: Path) -> openvino.Model:
    """Reads an ONNX model, or one that OpenVINO saved, whole: what becomes of the files later does not matter.

    Raises:
        BackendError: if OpenVINO cannot read it, or does not know an operator.
    """
    import openvino

    core = openvino.Core()
    core.set_property({"ENABLE_MMAP": False})
    try:
        model = core.read_model(path)
    except Exception as error:
        raise BackendError(f"OpenVINO cannot read the model: {_reason(error)}") from error
    _name_known_shapes(model)
    return model


def compile_model(model: openvino.Model, config: Mapping[str, Any]) -> openvino.CompiledModel:
    """Compiles a model for the CPU; the model stays as it is.

    Raises:
        BackendError: if OpenVINO cannot compile it.
    """
    import openvino

    try:
        return openvino.Core().compile_model(model, _DEVICE, dict(config))
    except Exception as error:
        raise BackendError(f"OpenVINO cannot compile the model: {_reason(error)}") from error


def _name_known_shapes(model: openvino.Model) -> None:
    """States as constants what shapes tensors are reshaped to, where these are known.

    OpenVINO finds the shape of a bias from the shape of what its convolution gives. Where the batch is free it then
    takes the batch's size from there for other uses too, and a convolution with two readers loses its bias when its
    integers are fused (seen in 2026.4: class tokens of vision transformers, off by the whole bias).
    """
    from openvino import opset13

    for node in model.get_ops():
        if node.get_type_name() == "Reshape" and node.get_output_partial_shape(0).is_static:
            shape = list(node.get_output_shape(0))
            if 0 not in shape:  # where it may stand for "as before"
                node.input(1).replace_source_output(opset13.constant(shape, dtype="int64").output(0))


def _refuse_large_integers(spec: TensorSpec, tensor: torch.Tensor) -> None:
    if spec.dtype is not torch.int64 or not tensor.numel():
        return
    low, high = (int(value) for value in tensor.aminmax())
    if low < _INT32.min or high > _INT32.max:
        wrong = low if low < _INT32.min else high
        raise InputError(f"input {spec.name}: OpenVINO computes int64 in 32 bits, which {wrong} does not fit")


def _layers(compiled: openvino.CompiledModel) -> list[dict[str, str]]:
    """The layers that run, in order."""
    layers = []
    for node in compiled.get_runtime_model().get_ordered_ops():
        known = {name: str(getattr(value, "value", value)) for name, value in node.get_rt_info().items()}
        if known["layerType"] not in _NO_LAYERS:
            layers.append(
                {"name": node.get_friendly_name(), "type": known["layerType"], "precision": known["runtimePrecision"]}
            )
    return layers


def _reason(error: BaseException) -> str:
    """What went wrong on one line, without the places in OpenVINO's source."""
    lines = [line.strip() for line in str(error).splitlines()]
    text = " ".join(line for line in lines if line and not line.startswith("Exception from"))
    return text if len(text) <= _REASON_LENGTH else text[: _REASON_LENGTH - 3] + "..."
