"""An ONNX model whose weights stay outside the protobuf message.

A protobuf message holds at most 2 GiB, and every tool that takes one copies it. So the graph is kept as a small
message, and the large initializers beside it as torch tensors; each reader gets the form that it needs:

- `as_inputs`: weights are graph inputs. For tools that look at the graph alone (optimizer, checker).
- `as_external`: weights are external data. For ONNX Runtime, which is handed the tensors, and for large files.
- `as_one`: weights inside. For `model.onnx`, as long as it is below 2 GiB.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fxopt.errors import ArtifactError, BackendError

if TYPE_CHECKING:
    import onnx
    import onnx_ir

__all__ = ["DATA_FILE", "MODEL_FILE", "OnnxModel"]

MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"

_DETACH_ABOVE = 4096  # bytes; small constants stay in the graph, where the optimizer can see them
_ONE_FILE_BELOW = 2**31 - 2**26  # bytes of weights; what is left is for the graph

_LARGEST_MESSAGE = 2**31 - 1  # bytes, protobuf's own limit

_INT4 = 22

# The numbers are onnx.TensorProto.DataType; of types that torch packs differently, 8-bit floats stay inside, and 4 bits
# are kept as messages.
_TORCH_TYPES: Mapping[int, torch.dtype] = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
    16: torch.bfloat16,
}
_ONNX_TYPES = {dtype: number for number, dtype in _TORCH_TYPES.items()}


@dataclass(frozen=True)
class OnnxModel:
    """A graph and its weights.

    Attributes:
        graph: the model without the initializers in `weights`. Not to be changed in place.
        weights: contiguous CPU tensors by initializer name; private, so that training the program cannot reach them.
        packed: initializers of 4 bits, which torch cannot hold and onnxoptimizer cannot read.
    """

    graph: onnx.ModelProto
    weights: Mapping[str, torch.Tensor]
    packed: Sequence[onnx.TensorProto] = ()

    @classmethod
    def of(
        cls, graph: onnx.ModelProto, weights: Mapping[str, torch.Tensor], packed: Sequence[onnx.TensorProto] = ()
    ) -> OnnxModel:
        """The model of a graph and its weights, without those that it does not use: ONNX Runtime refuses them."""
        used = _used_names(graph.graph)
        kept = {name: tensor for name, tensor in weights.items() if name in used}
        return cls(graph, kept, [item for item in packed if item.name in used])

    @classmethod
    def from_ir(cls, model: onnx_ir.Model) -> OnnxModel:
        """Takes over what `torch.onnx.export` made; `model` loses its large initializers."""
        import onnx_ir

        outputs = set(model.graph.outputs)
        weights: dict[str, torch.Tensor] = {}
        for name, value in list(model.graph.initializers.items()):
            constant = value.const_value
            if constant is None or value in outputs or constant.nbytes <= _DETACH_ABOVE:
                continue
            dtype = _TORCH_TYPES.get(int(constant.dtype))
            if dtype is not None:
                weights[name] = _private_copy(constant, dtype)
                del model.graph.initializers[name]
        graph = onnx_ir.to_proto(model)
        return cls.of(graph, weights, _take_packed(graph))

    @property
    def nbytes(self) -> int:
        """Size of the model in bytes."""
        packed = sum(int(item.ByteSize()) for item in self.packed)
        return int(self.graph.ByteSize()) + packed + sum(tensor.nbytes for tensor in self.weights.values())

    def as_inputs(self) -> onnx.ModelProto:
        """A new message whose graph has the weights as inputs."""
        from onnx import helper

        model = _copy(self.graph)
        model.graph.input.extend(
            helper.make_tensor_value_info(name, _ONNX_TYPES[tensor.dtype], list(tensor.shape))
            for name, tensor in self.weights.items()
        )
        model.graph.input.extend(
            helper.make_tensor_value_info(item.name, item.data_type, list(item.dims)) for item in self.packed
        )
        return model

    def with_graph(self, as_inputs: onnx.ModelProto) -> OnnxModel:
        """The model with another graph, given with the weights as inputs."""
        graph = _copy(as_inputs)
        outside = {*self.weights, *(item.name for item in self.packed)}
        inputs = [item for item in graph.graph.input if item.name not in outside]
        del graph.graph.input[:]
        graph.graph.input.extend(inputs)
        return self.of(graph, self.weights, self.packed)

    def with_metadata(self, key: str, value: str) -> OnnxModel:
        """The model with one more entry in its metadata."""
        graph = _copy(self.graph)
        graph.metadata_props.add(key=key, value=value)
        return OnnxModel(graph, self.weights, self.packed)

    def as_external(self, *, largest_message: int = _LARGEST_MESSAGE) -> onnx.ModelProto:
        """A new message that says at which offset of `DATA_FILE` each weight is; those of 4 bits are inside.

        Raises:
            BackendError: if these do not fit into a message.
        """
        inside = self.nbytes - sum(tensor.nbytes for tensor in self.weights.values())
        if inside >= largest_message:
            raise BackendError(
                f"graph and weights of 4 bits have {inside:,} bytes, and an ONNX file takes {largest_message:,} of "
                "these: hold more of the weights in 8 bits, which are kept beside it"
            )
        model, offset = _copy(self.graph), 0
        model.graph.initializer.extend(self.packed)
        for name, tensor in self.weights.items():
            item = model.graph.initializer.add(name=name, data_type=_ONNX_TYPES[tensor.dtype], dims=list(tensor.shape))
            item.data_location = item.EXTERNAL
            for key, value in (("location", DATA_FILE), ("offset", str(offset)), ("length", str(tensor.nbytes))):
                item.external_data.add(key=key, value=value)
            offset += tensor.nbytes
        return model

    def as_one(self) -> onnx.ModelProto:
        """A new message with the weights inside."""
        model = _copy(self.graph)
        model.graph.initializer.extend(self.packed)
        for name, tensor in self.weights.items():
            item = model.graph.initializer.add(name=name, data_type=_ONNX_TYPES[tensor.dtype], dims=list(tensor.shape))
            item.raw_data = _as_bytes(tensor)
        return model

    def save(self, directory: Path, *, one_file_below: int = _ONE_FILE_BELOW) -> None:
        """Writes `MODEL_FILE`, and `DATA_FILE` where the model has `one_file_below` bytes or more."""
        if self.nbytes < one_file_below:
            (directory / MODEL_FILE).write_bytes(self.as_one().SerializeToString())
            return
        with (directory / DATA_FILE).open("wb") as file:
            for tensor in self.weights.values():
                file.write(_as_bytes(tensor))
        (directory / MODEL_FILE).write_bytes(self.as_external().SerializeToString())

    @classmethod
    def load(cls, directory: Path) -> OnnxModel:
        """Reads what `save` wrote.

        Raises:
            ArtifactError: if the files are no ONNX model, or the data does not fit the graph.
        """
        import onnx

        path = directory / MODEL_FILE
        try:
            graph = onnx.load_model(path, load_external_data=False)
        except Exception as error:  # protobuf's errors are not OSErrors, and need an import that has no types
            raise ArtifactError(f"{path} is not a readable ONNX model: {error}. Compile and save again.") from error
        weights: dict[str, torch.Tensor] = {}
        kept: list[onnx.TensorProto] = []
        packed = _take_packed(graph)
        for item in graph.graph.initializer:
            if item.data_location == item.EXTERNAL:
                weights[item.name] = _read_external(item, directory)
            elif len(item.raw_data) > _DETACH_ABOVE and item.data_type in _TORCH_TYPES:
                weights[item.name] = _reinterpret(bytearray(item.raw_data), item, path)
            else:
                kept.append(item)
        del graph.graph.initializer[:]
        graph.graph.initializer.extend(kept)
        return cls.of(graph, weights, packed)


def _private_copy(constant: Any, dtype: torch.dtype) -> torch.Tensor:
    raw = getattr(constant, "raw", None)
    if isinstance(raw, torch.Tensor) and raw.dtype is dtype:
        return torch.empty(raw.shape, dtype=dtype).copy_(raw.detach())
    tensor = torch.frombuffer(bytearray(constant.tobytes()), dtype=dtype)
    return tensor.reshape(tuple(constant.shape.numpy()))


def _take_packed(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    """Takes the initializers of 4 bits out of a model."""
    packed = [item for item in model.graph.initializer if item.data_type == _INT4]
    kept = [item for item in model.graph.initializer if item.data_type != _INT4]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    return packed


def _copy(model: onnx.ModelProto) -> onnx.ModelProto:
    copied = type(model)()
    copied.CopyFrom(model)
    return copied


def _used_names(graph: onnx.GraphProto) -> set[str]:
    names = {item.name for item in graph.output}
    for node in graph.node:
        names.update(node.input)
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                names |= _used_names(body)
    return names


def _as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def _read_external(item: onnx.TensorProto, directory: Path) -> torch.Tensor:
    place = {entry.key: entry.value for entry in item.external_data}
    path = directory / DATA_FILE
    try:
        offset, length = int(place["offset"]), int(place["length"])
    except (KeyError, ValueError) as error:
        raise ArtifactError(f"{directory / MODEL_FILE}: weight {item.name} has no offset and length") from error
    if place.get("location") != DATA_FILE or item.data_type not in _TORCH_TYPES:
        raise ArtifactError(f"{directory / MODEL_FILE}: weight {item.name} was not written by fxopt")
    buffer = bytearray(length)
    try:
        with path.open("rb") as file:
            file.seek(offset)
            read = file.readinto(buffer)
    except OSError as error:
        raise ArtifactError(f"{path} holds the weights and cannot be read: {error}") from error
    if read != length:
        raise ArtifactError(f"{path} is too short for the weight {item.name}. Compile and save again.")
    return _reinterpret(buffer, item, path)


def _reinterpret(buffer: bytearray, item: onnx.TensorProto, path: Path) -> torch.Tensor:
    dtype, shape = _TORCH_TYPES[item.data_type], tuple(item.dims)
    if len(buffer) != dtype.itemsize * torch.Size(shape).numel():
        raise ArtifactError(f"{path}: the weight {item.name} has {len(buffer)} bytes, which not those of shape {shape}")
    return torch.frombuffer(buffer, dtype=dtype).reshape(shape)
