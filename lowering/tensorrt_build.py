"""From an ONNX model to a plan of TensorRT: parsed, checked, with ranges of sizes, built.

Networks are strongly typed: a layer computes in the types that the graph says, and the builder chooses none. The model
is handed over as files: in a message it would have to stay below 2 GiB.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fxopt.errors import BackendError
from fxopt.free_axes import BATCH
from fxopt.lowering.onnx_model import MODEL_FILE
from fxopt.lowering.tensorrt_layers import network_layers, type_name
from fxopt.runtime.tensorrt_plan import errors_of, logger

if TYPE_CHECKING:
    from fxopt.backend import TensorSpec
    from fxopt.lowering.onnx_model import OnnxModel

__all__ = ["Built", "Sizes", "build"]


_LONGEST = 500  # characters of a reason


class Sizes(NamedTuple):
    """Of a free axis: the smallest, the one that kernels are chosen for, and the largest."""

    least: int
    best: int
    most: int


class Built(NamedTuple):
    """A plan, and what is known of it without a GPU.

    Attributes:
        plan: the engine as bytes.
        outputs: name and torch's name of the data type of each output.
        layers: name, type and precision of the layers that were parsed.
    """

    plan: bytes
    outputs: list[dict[str, str]]
    layers: list[dict[str, str]]


def build(
    module: Any,
    model: OnnxModel,
    *,
    inputs: Sequence[TensorSpec],
    output_types: Sequence[str],
    ranges: Mapping[str, Sizes],
    configured: Callable[[Any], AbstractContextManager[None]],
) -> Built:
    """Builds an engine.

    Args:
        module: `tensorrt` or `tensorrt_rtx`.
        model: what it computes.
        inputs: of the program.
        output_types: torch's names of the data types that the program gives.
        ranges: of the free axes, by name.
        configured: sets the options of a builder's configuration, for as long as it builds.

    Raises:
        BackendError: if TensorRT does not take the model, naming what it refuses, or cannot build it.
    """
    with tempfile.TemporaryDirectory(prefix="fxopt-") as folder, errors_of(module) as errors:
        builder = module.Builder(logger(module))
        network = builder.create_network(1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        _parse(module, network, model, Path(folder))
        outputs = _checked(module, network, inputs, output_types)
        config = builder.create_builder_config()
        config.profiling_verbosity = module.ProfilingVerbosity.DETAILED
        if ranges:
            config.add_optimization_profile(_profile(builder, network, inputs, ranges))
        with configured(config):
            plan = builder.build_serialized_network(network, config)
        if plan is None:
            advice = "" if BATCH not in ranges else ". With dynamic_batch=False it may: the batch is then the example's"
            raise BackendError(f"{module.__name__} cannot build the engine: {_told(errors)}{advice}")
        return Built(bytes(plan), outputs, network_layers(network))


def _parse(module: Any, network: Any, model: OnnxModel, folder: Path) -> None:
    model.save(folder)
    parser = module.OnnxParser(network, logger(module))
    if parser.parse_from_file(str(folder / MODEL_FILE)):
        return
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    refused = dict.fromkeys(
        f"{item.node_name() or 'the model'} ({item.node_operator()}): {_said(item)}" for item in errors
    )
    raise BackendError(f"{module.__name__} does not take this program: {'; '.join(refused)}")


def _told(errors: Sequence[str]) -> str:
    """What TensorRT told its log, on one line; it may be pages."""
    text = "; ".join(dict.fromkeys(" ".join(message.split()) for message in errors)) or "no reason given"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _said(error: Any) -> str:
    """What the parser says of a node, without where in the parser it says it."""
    lines = [line.strip() for line in str(error.desc()).splitlines() if line.strip()]
    return " ".join(lines).replace(f"Invalid Node - {error.node_name()} ", "") or "refused"


def _checked(
    module: Any, network: Any, inputs: Sequence[TensorSpec], output_types: Sequence[str]
) -> list[dict[str, str]]:
    """Name and type of the outputs. What the parser converts by itself would be bound with the wrong type."""
    given = {item.name: item for item in map(network.get_input, range(network.num_inputs))}
    for spec in inputs:
        tensor, wanted = given.get(spec.name), str(spec.dtype).removeprefix("torch.")
        if tensor is None:
            continue  # nothing reads it
        if type_name(tensor.dtype) != wanted:
            raise BackendError(f"input {spec.name} is {wanted}, which {module.__name__} does not take")
        if tensor.is_shape_tensor:
            raise BackendError(
                f"input {spec.name} decides on shapes, which no engine of {module.__name__} supports here"
            )
    found = [network.get_output(index) for index in range(network.num_outputs)]
    for tensor, wanted in zip(found, output_types, strict=True):
        if type_name(tensor.dtype) != wanted:
            raise BackendError(
                f"output {tensor.name} is {wanted}, and {module.__name__} gives {type_name(tensor.dtype)}: "
                "have the model convert it"
            )
    return [{"name": tensor.name, "dtype": type_name(tensor.dtype)} for tensor in found]


def _profile(builder: Any, network: Any, inputs: Sequence[TensorSpec], ranges: Mapping[str, Sizes]) -> Any:
    profile = builder.create_optimization_profile()
    read = {network.get_input(index).name for index in range(network.num_inputs)}
    for spec in inputs:
        if spec.name in read and None in spec.shape:
            sizes = [
                ranges[spec.axis_name(axis)] if size is None else Sizes(size, size, size)
                for axis, size in enumerate(spec.shape)
            ]
            profile.set_shape(spec.name, *map(list, zip(*sizes, strict=True)))
    return profile
