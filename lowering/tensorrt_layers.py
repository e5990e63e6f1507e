"""The layers of a TensorRT engine: those that run, where a GPU lets it be loaded, else those of the parsed network."""

from __future__ import annotations

import json
import re
from typing import Any

__all__ = ["engine_layers", "layers_in", "network_layers", "type_name"]

_TYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "FP8": "float8_e4m3fn"}
_SPOKEN = {"fp32": "float32", "float": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16"}
_WORDS = re.compile(r"\b(fp32|float|fp16|half|bf16|fp8|int8|int4|int32|int64|bool|uint8)\b", re.IGNORECASE)


def type_name(dtype: Any) -> str:
    """The name that torch has for a TensorRT data type."""
    name = str(dtype.name)
    return _TYPES.get(name, name.lower())


def network_layers(network: Any) -> list[dict[str, str]]:
    """Name, type and precision of the layers of a network that was parsed, but for its constants.

    The precision is that of what a layer gives; of one that reads nothing but dequantized integers, be they laid out
    anew in between, it is theirs, as its kernel will read them.
    """
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    held: dict[str, str] = {}
    for layer in layers:
        source = layer.get_input(0) if layer.num_inputs else None
        if layer.type.name == "DEQUANTIZE":
            held[layer.get_output(0).name] = type_name(layer.get_input(0).dtype)
        elif layer.type.name == "SHUFFLE" and source is not None and source.name in held:
            held[layer.get_output(0).name] = held[source.name]
    return [
        {"name": layer.name, "type": layer.type.name.lower(), "precision": _precision(layer, held)}
        for layer in layers
        if layer.type.name != "CONSTANT"
    ]


def _precision(layer: Any, held: dict[str, str]) -> str:
    read = [item for item in map(layer.get_input, range(layer.num_inputs)) if item is not None]
    integers = {held.get(item.name, "") for item in read}
    if layer.type.name not in ("QUANTIZE", "DEQUANTIZE") and len(integers) == 1 and "" not in integers:
        return integers.pop()
    given = layer.get_output(0)
    return "" if given is None else type_name(given.dtype)  # what says when a loop ends gives nothing


def engine_layers(module: Any, engine: Any) -> list[dict[str, str]]:
    """Name, type and precision of the layers that an engine runs, as its inspector tells them."""
    inspector = engine.create_engine_inspector()
    return layers_in(inspector.get_engine_information(module.LayerInformationFormat.JSON))


def layers_in(text: str) -> list[dict[str, str]]:
    """Reads the inspector's JSON. The precision is that of the first tensor read; "" where it says nothing of it."""
    found = []
    for layer in json.loads(text).get("Layers", []):
        if isinstance(layer, str):  # the engine was built to tell names alone
            found.append({"name": layer, "type": "", "precision": ""})
            continue
        tensors = [*layer.get("Inputs", ()), *layer.get("Outputs", ())]
        words = _WORDS.findall(str(tensors[0].get("Format/Datatype", ""))) if tensors else []
        precision = words[-1].lower() if words else ""
        found.append(
            {
                "name": str(layer.get("Name", "")),
                "type": str(layer.get("LayerType", "")),
                "precision": _SPOKEN.get(precision, precision),
            }
        )
    return found
