"""The `export` frontend: `torch.export`, flattened, under the model's own names, raised back to modules.

It takes models whose `forward` branches on shapes, which `torch.fx` cannot trace. What export adds is undone here: the
wrapper's prefix, lifted constants, assertions, the subgraphs of `no_grad` and of disabled `autocast`.
"""

from __future__ import annotations

import contextlib
import operator
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn

from fxopt.errors import CaptureError
from fxopt.free_axes import FreeAxis, resized
from fxopt.frontends.attention import plain_attention
from fxopt.frontends.captured import Captured
from fxopt.frontends.exported_sizes import LARGEST, free_limits, input_values
from fxopt.frontends.functionalize import functionalize
from fxopt.frontends.hierarchy import find, install, is_persistent
from fxopt.frontends.raising import raise_to_modules
from fxopt.program import BatchAxis
from fxopt.recurrent_shapes import whole_recurrences
from fxopt.signature import Signature
from fxopt.structure import Structure, flatten

__all__ = ["trace_export"]

_PREFIX = "model."
_TO_THE_END = 2**63 - 1  # how ATen spells the open end of a slice
_CHECKS = {
    "_assert_async",
    "_assert_scalar",
    "_assert_tensor_metadata",
    "sym_constrain_range",
    "sym_constrain_range_for_size",
}
# Batch sizes that no other axis is likely to have, so that nothing seems to depend on the batch by coincidence.
_FACTORS = (5, 7, 11, 13, 17, 19, 23)


def trace_export(
    model: nn.Module,
    signature: Signature,
    example_inputs: Sequence[torch.Tensor],
    *,
    batch: BatchAxis | None,
    free_axes: tuple[FreeAxis, ...] = (),
) -> Captured:
    """Captures a model with `torch.export`, in the mode (training or evaluation) it is in.

    Args:
        model: a private copy of the caller's model; its parameters become those of the result.
        signature: how the model is called.
        example_inputs: flat tensors.
        batch: the flat inputs whose axis 0 is the batch, or None to keep its size fixed.
        free_axes: the axes that may have any size besides.

    Raises:
        CaptureError: if export refuses the model, with export's reason, or does not keep an axis free.
    """
    outputs: list[Structure] = []
    wrapper = _Flat(model, signature, outputs.append)
    with _tracing():
        program, dynamic, note = _export(wrapper, tuple(example_inputs), batch, free_axes)
        limits = free_limits(program, free_axes)
        try:
            module = _flat_module(program, signature, model)
        except CaptureError as error:
            if model.training:
                raise
            # Even an empty decomposition rids a program of writes through views and of contexts. It is no first choice:
            # dropouts disappear, too.
            note = "; ".join([*([note] if note else []), f"captured without its dropouts, because {error}"])
            module = _flat_module(program.run_decompositions({}), signature, model)
    raise_to_modules(module, training=model.training, original=model)
    for node in module.graph.nodes:
        # Fake tensors keep export's whole shape environment alive.
        node.meta = {key: value for key, value in node.meta.items() if key == "stack_trace"}
    _late_attributes(module.graph)
    module.recompile()
    return Captured(module, outputs[-1], dynamic, note, limits.note, limits.edges)


def _flat_module(program: torch.export.ExportedProgram, signature: Signature, model: nn.Module) -> fx.GraphModule:
    """A plain graph without in-place operations, over the model's tensors."""
    graph = fx.Graph()
    transcription = _Transcription(graph, program.module(check_guards=False), signature.names, model)
    transcription.run()
    # Given a root, GraphModule would copy its tensors, and make every buffer a persistent one.
    module = fx.GraphModule(nn.Module(), fx.Graph(), class_name=type(model).__name__)
    for path, tensor in transcription.tensors.items():
        # What is no state of the model is a constant, and not in its state dict.
        install(module, path, tensor, persistent=is_persistent(model, path))
    module.graph = graph
    _drop_identities(module)
    functionalize(module)
    return module


class _Flat(nn.Module):
    """The model as a function of flat tensors that returns flat tensors."""

    def __init__(self, model: nn.Module, signature: Signature, record: Callable[[Structure], object]) -> None:
        super().__init__()
        self.model = model
        self.training = model.training
        self.signature = signature
        self.record = record  # export undoes what forward assigns to self

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        args, kwargs = self.signature.call_arguments(tensors)
        leaves, outputs = flatten(self.model(*args, **kwargs))
        self.record(outputs)
        return tuple(leaves)


@contextlib.contextmanager
def _tracing() -> Iterator[None]:
    """Makes what is traced independent of where capture is called."""
    with torch.enable_grad(), plain_attention(), whole_recurrences(), warnings.catch_warnings():
        # nn.LSTM and nn.GRU assign their flattened weights anew at each call.
        warnings.filterwarnings("ignore", message=r"The tensor attributes? .*_flat_weights")
        yield


def _export(
    wrapper: _Flat, inputs: tuple[torch.Tensor, ...], batch: BatchAxis | None, axes: tuple[FreeAxis, ...]
) -> tuple[torch.export.ExportedProgram, bool, str | None]:
    note = None
    # export takes sizes of 0 and 1 for constants
    inputs = resized(inputs, {axis.places: axis.other for axis in axes})
    if batch is not None:
        try:
            program = _export_free(wrapper, _tiled(inputs, batch), batch, axes)
        except Exception as error:  # noqa: BLE001 (export raises whatever the model raises; the reason is reported)
            note = _reason(error)
        else:
            note = _fixed_batch(program, batch)
            if note is None:
                return program, True, None
    try:
        return _export_free(wrapper, inputs, None, axes), False, note
    except Exception as error:
        raise CaptureError(f"torch.export cannot capture {type(wrapper.model).__name__}: {_reason(error)}") from error


def _export_free(
    wrapper: _Flat, inputs: tuple[torch.Tensor, ...], batch: BatchAxis | None, axes: tuple[FreeAxis, ...]
) -> torch.export.ExportedProgram:
    """Exports with these sizes free, as far as export can keep them so."""
    places = [(index, 0) for index in (batch.inputs if batch is not None else ())]
    places += [place for axis in axes for place in axis.places]
    dims: list[dict[int, Any]] = [{} for _ in inputs]
    for index, axis in places:
        dims[index][axis] = torch.export.Dim.AUTO
    dynamic = (tuple(item or None for item in dims),) if places else None
    return torch.export.export(wrapper, inputs, dynamic_shapes=dynamic, strict=False)


def _tiled(inputs: tuple[torch.Tensor, ...], batch: BatchAxis) -> tuple[torch.Tensor, ...]:
    """The inputs, their batch repeated until no other axis has its size: export takes 0 and 1 for constants."""
    others = {size for index, tensor in enumerate(inputs) for size in tensor.shape[index in batch.inputs :]}
    if batch.size == 0:
        return inputs
    factors = [1, *_FACTORS] if batch.size > 1 else list(_FACTORS)
    factor = next((item for item in factors if item * batch.size not in others), _FACTORS[-1])
    if factor == 1:
        return inputs
    return tuple(
        tensor.repeat(factor, *[1] * (tensor.ndim - 1)) if index in batch.inputs else tensor
        for index, tensor in enumerate(inputs)
    )


def _fixed_batch(program: torch.export.ExportedProgram, batch: BatchAxis) -> str | None:
    """Why the exported batch axis is not free, or None if it is."""
    values = input_values(program)
    for index in batch.inputs:
        size: Any = values[index].shape[0]
        if not isinstance(size, torch.SymInt):
            return f"the model was traced for a batch of {size} only: a value in it depends on the batch size"
        if not size.node.expr.is_Symbol:
            return f"the batch size must be of the form {size.node.expr}"
        bounds = program.range_constraints.get(size.node.expr)
        if bounds is not None and (bounds.lower > 2 or bounds.upper < LARGEST):
            span = f"{bounds.lower} to {bounds.upper}"
            return f"the code of the model branches on the batch size: what was traced holds for {span}"
    return None


def _reason(error: BaseException) -> str:
    """The first informative line of export's error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else 'no message'}"


class _Transcription:
    """Copies an exported graph into a plain one: named placeholders, no checks, subgraphs inlined, original paths."""

    def __init__(self, graph: fx.Graph, exported: fx.GraphModule, names: Sequence[str], model: nn.Module) -> None:
        self.graph = graph
        self.exported = exported
        self.names = names
        self.model = model
        self.tensors: dict[str, torch.Tensor] = {}  # by path: what the graph reads
        # A tensor that the model holds under several names is known by the first, as in named_parameters().
        self.paths = {id(tensor): path for path, tensor in (*model.named_buffers(), *model.named_parameters())}

    def run(self) -> None:
        placeholders = [node for node in self.exported.graph.nodes if node.op == "placeholder"]
        inputs: dict[fx.Node, Any] = {}
        for source, name in zip(placeholders, self.names, strict=True):
            inputs[source] = self.graph.placeholder(name)
            inputs[source].meta = dict(source.meta)
        outputs = self._copy(self.exported, inputs)
        self.graph.output(tuple(outputs))

    def _copy(self, module: fx.GraphModule, values: dict[fx.Node, Any]) -> Any:
        """Copies a graph, given the values of its placeholders; returns the value of its output."""

        def value_of(argument: Any) -> Any:
            return fx.node.map_arg(argument, lambda node: values[node])

        for node in module.graph.nodes:
            if node.op == "placeholder":
                continue
            if node.op == "output":
                return value_of(node.args[0])
            if node.op == "call_module" or getattr(node.target, "_opname", None) in _CHECKS:
                continue  # the only module export calls is its guard function
            if node.op == "get_attr":
                values[node] = self._attribute(node, find(module, str(node.target)))
            elif isinstance(node.target, torch._ops.HigherOrderOperator):
                values[node] = self._inline(node, value_of(node.args))
            elif node.target is operator.getitem and isinstance(values[node.args[0]], tuple | list):
                values[node] = values[node.args[0]][node.args[1]]
            elif node.target is torch.ops.aten._native_batch_norm_legit_no_training.default:
                *operands, momentum, eps = value_of(node.args)
                norm = self.graph.call_function(
                    torch.ops.aten.batch_norm.default, (*operands, False, momentum, eps, False)
                )
                norm.meta = _meta(node) | {"val": node.meta["val"][0]}
                values[node] = (norm, None, None)  # the saved statistics are empty in evaluation
            else:
                values[node] = self.graph.create_node(
                    node.op, node.target, value_of(node.args), value_of(node.kwargs), name=_plain_name(node)
                )
                values[node].meta = _meta(node)
        raise CaptureError("torch.export gave a graph without an output")

    def _attribute(self, node: fx.Node, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value  # a subgraph, to be inlined where it is called
        path = self.paths.setdefault(id(value), self._constant_path(str(node.target).removeprefix(_PREFIX)))
        self.tensors[path] = value
        attribute = self.graph.get_attr(path)
        attribute.meta = _meta(node)
        return attribute

    def _constant_path(self, path: str) -> str:
        """Where a tensor goes that is neither parameter nor buffer: its attribute's path if it has one."""
        if find(self.model, path) is not None:
            return path
        number = 0
        while f"constant_{number}" in self.tensors or find(self.model, f"constant_{number}") is not None:
            number += 1
        return f"constant_{number}"

    def _inline(self, node: fx.Node, args: Sequence[Any]) -> Any:
        """The values of a subgraph that was set apart for a context."""
        name = str(getattr(node.target, "_name", node.target))
        if name == "wrap_with_set_grad_enabled":
            enabled, body, *operands = args
            results = self._call(body, operands)
            return results if enabled else tuple(self._detached(result) for result in results)
        if name == "wrap_with_autocast":
            *_, enabled, _, body = args[:5]
            if not enabled:
                return self._call(body, args[5:])
            raise CaptureError("the model turns on autocast in its forward: cast the model itself, and capture that")
        raise CaptureError(f"torch.export left a {name} in the graph, which fxopt does not take")

    def _call(self, body: fx.GraphModule, operands: Sequence[Any]) -> tuple[Any, ...]:
        placeholders = [node for node in body.graph.nodes if node.op == "placeholder"]
        results = self._copy(body, dict(zip(placeholders, operands, strict=True)))
        return tuple(results) if isinstance(results, tuple | list) else (results,)

    def _detached(self, value: Any) -> Any:
        """The value without gradient, as `no_grad` gives it; nothing to do for integers and numbers."""
        known = value.meta.get("val") if isinstance(value, fx.Node) else None
        if not isinstance(known, torch.Tensor) or not known.is_floating_point():
            return value
        detached = self.graph.call_function(torch.ops.aten.detach.default, (value,))
        detached.meta = dict(value.meta)
        return detached


def _meta(node: fx.Node) -> dict[str, Any]:
    meta = {key: node.meta[key] for key in ("val", "stack_trace") if key in node.meta}
    stack = node.meta.get("nn_module_stack") or {}
    below = {key: entry for key, entry in stack.items() if entry[0].startswith(_PREFIX)}
    scopes = {key: (path.removeprefix(_PREFIX), kind) for key, (path, kind) in below.items()}
    return meta | {"nn_module_stack": scopes}


def _plain_name(node: fx.Node) -> str:
    return node.name.removesuffix("_default")


def _drop_identities(module: fx.GraphModule) -> None:
    """Removes the copies that export makes of constants, detaching what has no gradient, and slices of everything.

    Random fillings of new tensors, which have pure forms of other names, are spelled by those.
    """
    graph = module.graph
    aten = torch.ops.aten
    filling = {aten.bernoulli_.float: aten.bernoulli.p, aten.normal_.default: aten.normal_functional.default}
    for node in list(graph.nodes):
        if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
            continue
        source = node.args[0]
        if node.target in filling and source.op == "call_function" and len(source.users) == 1:
            if node.target is aten.bernoulli_.float and len(node.args) == 1:
                node.args = (source, 0.5)  # the default, which the pure form has none of
            node.target = filling[node.target]
            continue
        if node.target in (aten.lift_fresh_copy.default, aten.lift_fresh.default):
            if _is_written(node):
                node.target = aten.clone.default  # each call needs its own
                continue
        elif node.target in (aten.detach_.default, aten.detach.default, aten.alias.default):
            plain = source.op == "get_attr" and not isinstance(find(module, str(source.target)), nn.Parameter)
            if node.target is not aten.alias.default and not plain:
                continue
        elif node.target is not aten.slice.Tensor or node.args[2:] != (0, _TO_THE_END):
            continue
        node.replace_all_uses_with(source)
        graph.erase_node(node)


def _is_written(node: fx.Node) -> bool:
    """Whether an operator writes into the node's memory, directly or through a view of it."""
    waiting = [node]
    while waiting:
        for user in waiting.pop().users:
            schema = getattr(user.target, "_schema", None)
            if schema is None or user.target is torch.ops.aten.detach_.default:
                waiting.extend([user] if user.op == "call_function" else [])
            elif schema.is_mutable:
                return True
            elif any(item.alias_info is not None for item in schema.returns):
                waiting.append(user)
    return False


def _late_attributes(graph: fx.Graph) -> None:
    """Moves each get_attr node to where it is first used, which is where a reader looks for it."""
    position = {node: index for index, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if node.op == "get_attr" and node.users:
            min(node.users, key=position.__getitem__).prepend(node)
