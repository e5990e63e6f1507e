"""How a model is called: the parameters of its `forward`, and the structures of its inputs and outputs.

A `Signature` turns a call like the model's into the flat tensors that a graph takes, and flat results back into the
model's own output structure. It is plain JSON, so that an engine loaded in another process is called just like the
model.
"""

from __future__ import annotations

import inspect
import keyword
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy
import torch
from torch import nn

from fxopt.errors import InputError
from fxopt.structure import Structure, flatten

__all__ = ["CallArguments", "Signature"]

_ANY_CALL = inspect.Signature(
    [
        inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL),
        inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD),
    ]
)

_VARIADIC: Mapping[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "tuple", inspect.Parameter.VAR_KEYWORD: "dict"}


@dataclass(frozen=True)
class CallArguments:
    """Example inputs as a call has them, where positional and keyword arguments are mixed."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class _LostDefault:
    """The default of a parameter that held tensors, in a loaded signature: JSON holds no tensors."""

    structure: Structure

    def __repr__(self) -> str:
        return "<tensor>"


@dataclass(frozen=True)
class Signature:
    """How a model is called.

    Attributes:
        call: the parameters of the model's `forward`, without annotations.
        inputs: structure of the bound arguments, a dictionary by parameter name.
        names: one identifier per flat input tensor; the targets of the graph's placeholders.
        outputs: structure of what the model returns; None until the model was captured.
    """

    call: inspect.Signature
    inputs: Structure
    names: tuple[str, ...]
    outputs: Structure | None = None

    @classmethod
    def of(cls, model: nn.Module, example_inputs: Any) -> tuple[Signature, tuple[torch.Tensor, ...]]:
        """The signature of a call, and its flat input tensors.

        Args:
            model: the module whose `forward` is called.
            example_inputs: a tuple or list of positional arguments, a mapping of keyword arguments, one tensor, or
                `CallArguments`.

        Raises:
            InputError: if the inputs do not fit `forward`, or hold no tensor.
        """
        args, kwargs = _as_call(example_inputs)
        call = _call_signature(model)
        leaves, inputs = flatten(_bind(call, args, kwargs))
        _refuse_arrays(inputs, "")
        if not leaves:
            raise InputError("example_inputs hold no tensor: pass the tensors that the model is called with")
        return cls(call, inputs, _identifiers(inputs.paths())), tuple(leaves)

    def with_outputs(self, outputs: Structure) -> Signature:
        """The same signature, with the structure of the model's outputs."""
        return replace(self, outputs=outputs)

    def flatten_inputs(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
        """The flat input tensors of a call `model(*args, **kwargs)`.

        Raises:
            InputError: if the call does not have the structure that was captured.
        """
        if not kwargs and len(args) == self._plain_arity:
            tensors = [value for value in args if isinstance(value, torch.Tensor)]
            if len(tensors) == len(args):
                return tensors
        return self.inputs.flatten(_bind(self.call, args, kwargs))

    def flatten_batch(self, batch: Any) -> list[torch.Tensor]:
        """The flat inputs in one batch of a data loader: its first N entries, for a model of N flat inputs.

        A batch that nests its entries as the model's arguments do is bound like a call.

        Raises:
            InputError: if the batch holds too few entries, or others than the model takes.
        """
        if isinstance(batch, torch.Tensor):
            return self.flatten_inputs((batch,), {})
        if isinstance(batch, Mapping):
            wanted = {key: batch[key] for key in self.call.parameters if key in batch}
            return self.flatten_inputs((), wanted or batch)
        if not isinstance(batch, tuple | list):
            raise InputError(
                f"a calibration batch must be a tensor, tuple, list or mapping, not {type(batch).__name__}"
            )
        if self._is_flat(batch):
            return list(batch[: len(self.names)])
        return self.flatten_inputs(tuple(batch[: self._arity]), {})

    def targets_of(self, batch: Any) -> Any:
        """What a batch of a data loader holds besides the inputs: one value, a tuple or mapping of several, or None."""
        if isinstance(batch, Mapping):
            left = {key: value for key, value in batch.items() if key not in self.call.parameters}
            return left if len(left) > 1 else next(iter(left.values()), None)
        if not isinstance(batch, tuple | list):
            return None
        rest = tuple(batch[len(self.names) if self._is_flat(batch) else self._arity :])
        return rest if len(rest) > 1 else next(iter(rest), None)

    def _is_flat(self, batch: Sequence[Any]) -> bool:
        """Whether a batch begins with one tensor per flat input."""
        first = [entry for entry in batch[: len(self.names)] if isinstance(entry, torch.Tensor)]
        return len(first) == len(self.names)

    @property
    def _arity(self) -> int:
        """How many parameters of `forward` take tensors."""
        return sum(1 for child in self.inputs.children if child.leaf_count())

    def call_arguments(self, leaves: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments for the model, from flat tensors."""
        bound = inspect.BoundArguments(self.call, self.inputs.unflatten(leaves))
        return bound.args, dict(bound.kwargs)

    def unflatten_outputs(self, leaves: Sequence[Any]) -> Any:
        """The model's own output structure, from flat tensors."""
        if self.outputs is None:
            raise InputError("the outputs of this signature are not known: the model was not captured yet")
        if self.outputs.kind == "tensor":
            return leaves[0]
        return self.outputs.unflatten(leaves)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, read by `from_json`."""
        parameters = []
        for parameter in self.call.parameters.values():
            entry: dict[str, Any] = {"name": parameter.name, "kind": parameter.kind.name}
            if parameter.default is not inspect.Parameter.empty:
                entry["default"] = _default_structure(parameter.default).to_json()
            parameters.append(entry)
        outputs = None if self.outputs is None else self.outputs.to_json()
        return {"call": parameters, "inputs": self.inputs.to_json(), "names": list(self.names), "outputs": outputs}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Signature:
        """Reads what `to_json` wrote. Imports nothing.

        Raises:
            ValueError: if its parts do not fit together. Wrong types raise TypeError, KeyError or AttributeError.
        """
        parameters = []
        for entry in data["call"]:
            default: Any = inspect.Parameter.empty
            if "default" in entry:
                structure = Structure.from_json(entry["default"])
                default = _LostDefault(structure) if structure.leaf_count() else structure.unflatten(())
            kind = getattr(inspect.Parameter, entry["kind"])
            parameters.append(inspect.Parameter(entry["name"], kind, default=default))
        outputs = None if data["outputs"] is None else Structure.from_json(data["outputs"])
        inputs = Structure.from_json(data["inputs"])
        call, names = inspect.Signature(parameters), data["names"]
        if inputs.kind != "dict" or inputs.keys != tuple(call.parameters):
            raise ValueError(f"the inputs {list(inputs.keys)} are not the parameters of forward{call}")
        for parameter, child in zip(parameters, inputs.children, strict=True):
            container = _VARIADIC.get(parameter.kind)
            if container not in (None, child.kind):
                raise ValueError(f"the parameter {parameter} takes a {container}, not a {child.kind}")
        if not isinstance(names, list) or any(not isinstance(name, str) for name in names):
            raise TypeError(f"the names of the inputs are {names!r}")
        if len(names) != inputs.leaf_count():
            raise ValueError(f"{len(names)} names for {inputs.leaf_count()} input tensors")
        return cls(call, inputs, tuple(names), outputs)

    @cached_property
    def _plain_arity(self) -> int:
        """How many positional tensors make up the whole call; -1 where the arguments must be bound properly."""
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        tensors = 0
        for parameter, child in zip(self.call.parameters.values(), self.inputs.children, strict=True):
            if child.kind == "tensor" and parameter.kind in positional:
                tensors += 1
            elif child.leaf_count() or not _is_default(child, parameter):
                return -1
        leading = [child.kind == "tensor" for child in self.inputs.children[:tensors]]
        return tensors if all(leading) else -1


def _is_default(child: Structure, parameter: inspect.Parameter) -> bool:
    if parameter.kind in _VARIADIC:
        return not child.children
    return parameter.default is not inspect.Parameter.empty and _default_structure(parameter.default) == child


def _default_structure(default: Any) -> Structure:
    if isinstance(default, _LostDefault):
        return default.structure
    try:
        return flatten(default)[1]
    except InputError:  # a default that the captured call did not use need not be one that can be captured
        return Structure("constant", constant=default)


def _as_call(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example_inputs, CallArguments):
        return example_inputs.args, dict(example_inputs.kwargs)
    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        return (), {str(key): value for key, value in example_inputs.items()}
    if isinstance(example_inputs, tuple | list):
        return tuple(example_inputs), {}
    raise InputError(
        "example_inputs must be a tuple of positional arguments, a mapping of keyword arguments or one tensor, "
        f"not {type(example_inputs).__name__}"
    )


def _call_signature(model: nn.Module) -> inspect.Signature:
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):
        return _ANY_CALL
    plain = [item.replace(annotation=inspect.Parameter.empty) for item in signature.parameters.values()]
    return inspect.Signature(plain)


def _bind(call: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    try:
        bound = call.bind(*args, **kwargs)
    except TypeError as error:
        raise InputError(f"the inputs do not fit forward{call}: {error}") from error
    bound.apply_defaults()
    for name, value in bound.arguments.items():
        if isinstance(value, _LostDefault):
            raise InputError(f"{name} was left out: its default holds tensors, which are not saved; pass it")
    return dict(bound.arguments)


def _refuse_arrays(structure: Structure, path: str) -> None:
    if isinstance(structure.constant, numpy.ndarray):
        raise InputError(f"{path or 'input'} is a numpy array: pass torch.from_numpy(...) of it")
    keys = structure.keys or tuple(range(len(structure.children)))
    for key, child in zip(keys, structure.children, strict=True):
        _refuse_arrays(child, f"{path}.{key}" if path else str(key))


def _identifiers(paths: Sequence[str]) -> tuple[str, ...]:
    names: list[str] = []
    for path in paths:
        base = re.sub(r"\W+", "_", path).strip("_") or "input"
        if base[0].isdigit() or keyword.iskeyword(base) or base == "self":
            base = f"input_{base}"
        name, number = base, 1
        while name in names:
            name, number = f"{base}_{number}", number + 1
        names.append(name)
    return tuple(names)
