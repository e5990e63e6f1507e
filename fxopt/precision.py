"""Lower precision in parts of a program: casts, and the normal form that they are kept in.

`Lowering.lower` makes one layer compute in a low data type by itself: what it reads is cast down, what it gives is cast
up again, so that all other nodes see what they saw, and a program is whole after every layer. Then casts up are pushed
on, as far as that changes nothing but the precision:

    f(up(a), up(b)) -> up(f(a, b))        f follows its operands: the pass says which operators do
    down(up(a))     -> a

The result depends on which layers run low and not on the order in which they became so. A value is cast once to each
data type. Tensors of the program that meet low values are cast ahead of time, unless something else reads them too or
training must reach the original.

Casts of the model itself are never taken for these: ours call `cast`, a spelling of the operator "to" of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from fxopt import edit
from fxopt.analysis.constants import held_tensors
from fxopt.analysis.measurements import measured
from fxopt.analysis.shapes import TensorSpec, shapes, specs_in
from fxopt.analysis.value_ranges import value_ranges
from fxopt.ops import cast
from fxopt.sharing import share_module

if TYPE_CHECKING:
    from fxopt.program import Program

__all__ = ["Lowering", "survives"]

_SEVERAL = frozenset({"split", "chunk", "unbind"})  # operators of one operand that give several values


def _is_cast(value: object, dtype: torch.dtype) -> bool:
    """Whether a node casts to this data type on behalf of a pass, not of the model."""
    return isinstance(value, fx.Node) and value.target is cast and value.args[1] is dtype


class Lowering:
    """Moves layers of a program, one after the other, to a low data type."""

    def __init__(self, program: Program, dtype: torch.dtype, follows: Callable[[fx.Node], bool]) -> None:
        """Begins.

        Args:
            program: the program to edit.
            dtype: the low data type.
            follows: whether a node may compute in the low data type once its operands are low.
        """
        self._program = program
        self._dtype = dtype
        self._follows = follows
        # edits drop analyses, and what they change here is known: to infer it again would cost a run per edit
        self._known: dict[str, Any] = dict(program.analysis(shapes))
        self._ranges = measured(program, value_ranges)

    def lower(self, layers: Iterable[fx.Node], *, masks: Mapping[fx.Node, fx.Node]) -> None:
        """Makes layers compute low that share tensors, so that these stay shared.

        Args:
            layers: calls, all that there are of a module.
            masks: by attention, an additive mask that may hold larger numbers than the low data type.
        """
        ties: dict[int, nn.Parameter] = {}
        modules: set[nn.Module] = set()
        layers = list(layers)
        for node in layers:
            module = self._program.module_of(node)
            if module is not None and module not in modules:
                low = _low_module(module, self._dtype, ties)
                edit.set_module(self._program, node, low)
                modules.add(low)
        ups: list[fx.Node] = []
        for node in layers:
            if node in masks:
                self._clamp(node, masks[node])
            self._set_operands(node)
            ups += self._raise(node)
        self._push(ups)
        self._program.remember(shapes, self._known)

    def lower_outputs(self) -> None:
        """Makes the program give low outputs."""
        output = self._program.nodes[-1]
        self._set_operands(output)
        self._known[output.name] = self._lowered(self._known[output.name])
        self._program.remember(shapes, self._known)

    def lower_inputs(self) -> None:
        """Makes the program take low inputs, behind which casts up are pushed on."""
        ups: list[fx.Node] = []
        for node in self._program.graph.find_nodes(op="placeholder"):
            if self._is(node, torch.float32):
                ups += self._raise(node)
        self._push(ups)
        self._program.remember(shapes, self._known)

    def _set_operands(self, node: fx.Node) -> None:
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), self._low)
        edit.set_arguments(self._program, node, args, kwargs)

    def _low(self, value: fx.Node) -> fx.Node:
        """The value in the low data type; itself if it is no number of the wide one."""
        if not self._is(value, torch.float32):
            return value
        if _is_cast(value, torch.float32):
            source = value.args[0]
            if isinstance(source, fx.Node) and self._is(source, self._dtype):
                return source
        tensor = self._program.tensor_of(value)
        if tensor is not None and tensor.dtype is self._dtype:
            # it is read out of a layer that was made low
            self._known[value.name] = self._lowered(self._known[value.name])
            return value
        if tensor is not None and bool(tensor.to(self._dtype).isfinite().all()):
            if self._has_one_reader(value, tensor):
                edit.set_parameter(self._program, value, tensor.detach().to(self._dtype))
                self._known[value.name] = self._lowered(self._known[value.name])
                return value
            if not isinstance(tensor, nn.Parameter):
                return self._ahead(value, tensor)
        if self._program.op(value) == "codebook_weight" and len(value.users) == len(self._program.callers(value)) == 1:
            codebook = self._program.module_of(value)
            assert codebook is not None
            edit.set_module(self._program, value, _low_module(codebook, self._dtype, {}))
            self._known[value.name] = self._lowered(self._known[value.name])
            return value
        for user in value.users:
            if _is_cast(user, self._dtype):
                return user
        return self._insert_behind(value, self._dtype)

    def _has_one_reader(self, node: fx.Node, tensor: Tensor) -> bool:
        """Whether one node alone computes with a tensor. Codebooks hold what is read beside them."""
        others = (item for item in self._program.graph.nodes if item is not node)
        readers = (item for item in others if self._program.op(item) != "codebook_weight")
        held = (each for item in readers for each in held_tensors(self._program, item))
        return len(node.users) == 1 and all(each is not tensor for each in held)

    def _ahead(self, node: fx.Node, tensor: Tensor) -> fx.Node:
        path = f"{node.target}_{str(self._dtype).removeprefix('torch.')}"
        made = next((item for item in self._program.nodes if item.op == "get_attr" and item.target == path), None)
        if made is not None:
            return made
        # in front of all that compute, so that every reader finds it
        first = next(item for item in self._program.graph.nodes if item.op not in ("placeholder", "get_attr"))
        made = edit.insert_tensor(self._program, first, tensor.detach().to(self._dtype), name=path)
        self._known[made.name] = self._lowered(self._known[node.name])
        return made

    def _insert_behind(self, value: fx.Node, dtype: torch.dtype) -> fx.Node:
        anchor = value.next
        while anchor.op == "placeholder":
            anchor = anchor.next
        made = edit.insert_before(self._program, anchor, cast, (value, dtype), name=f"{value.name}_cast")
        self._known[made.name] = self._known[value.name]._replace(dtype=dtype)
        return made

    def _clamp(self, node: fx.Node, mask: fx.Node) -> None:
        """Numbers that stand for minus infinity become the smallest there is: rows of nothing else stay finite."""
        least = torch.finfo(self._dtype).min
        made = edit.insert_before(self._program, node, torch.clamp, (mask, least), name=f"{mask.name}_clamp")
        self._known[made.name] = self._known[mask.name]
        node.replace_input_with(mask, made)

    def _raise(self, node: fx.Node) -> list[fx.Node]:
        """Casts what a node gives up again, which is low from now on: each value of several where it is taken out."""
        if not isinstance(self._known[node.name], TensorSpec):
            self._known[node.name] = self._lowered(self._known[node.name])
            return [up for user in list(node.users) for up in self._raise(user)]
        if not self._is(node, torch.float32):
            return []
        readers = list(node.users)
        self._known[node.name] = self._lowered(self._known[node.name])
        up = self._insert_behind(node, torch.float32)
        for reader in readers:
            reader.replace_input_with(node, up)
        return [up]

    def _push(self, ups: list[fx.Node]) -> None:
        """Pushes casts up on, as far as operators follow."""
        waiting = list(ups)
        while waiting:
            up = waiting.pop(0)
            for user in list(up.users):
                source = up.args[0]
                assert isinstance(source, fx.Node)
                if _is_cast(user, self._dtype):
                    edit.bypass(self._program, user, source)
                elif self._reads_no_number(user):
                    edit.set_arguments(self._program, user, *_replaced(user, up, source))
                elif self._may_follow(user):
                    self._set_operands(user)
                    waiting += self._raise(user)

    def _reads_no_number(self, node: fx.Node) -> bool:
        """Whether a node looks at a size only, or casts by itself to what it names."""
        call = self._program.call(node)
        if call.op == "getattr":
            return call.arguments.get("name") in ("shape", "ndim", "device")
        named = call.op in ("float", "double") or isinstance(call.arguments.get("dtype"), torch.dtype)
        return call.op == "size" or (call.op in ("to", "float", "double") and node.target is not cast and named)

    def _may_follow(self, node: fx.Node) -> bool:
        several = self._program.op(node) in _SEVERAL
        gives = list(specs_in(self._known[node.name]))
        if not self._follows(node) or any(spec.dtype is not torch.float32 for spec in gives):
            return False
        if several and any(self._program.op(user) != "getitem" for user in node.users):
            return False
        if not several and not isinstance(self._known[node.name], TensorSpec):
            return False
        limit = torch.finfo(self._dtype).max
        if self._ranges.get(node.name, 0.0) > limit:
            return False
        numbers = [item for item in node.all_input_nodes if self._counts(item)]
        return all(self._is_low(item) or self._fits(item) for item in numbers)

    def _counts(self, value: fx.Node) -> bool:
        """Whether an operand is a tensor of numbers; flags and sizes are none."""
        return any(spec.dtype is not torch.bool for spec in specs_in(self._known[value.name]))

    def _is_low(self, value: fx.Node) -> bool:
        return _is_cast(value, torch.float32) and self._is(value.args[0], self._dtype)

    def _fits(self, value: fx.Node) -> bool:
        """Whether an operand is a tensor of the program's own that keeps its values, but for rounding."""
        tensor = self._program.tensor_of(value)
        if tensor is None or tensor.dtype not in (torch.float32, self._dtype):
            return False
        return not tensor.is_floating_point() or _survives(tensor.detach(), self._dtype)

    def _is(self, value: object, dtype: torch.dtype) -> bool:
        spec = self._known.get(value.name) if isinstance(value, fx.Node) else None
        return isinstance(spec, TensorSpec) and spec.dtype is dtype

    def _lowered(self, spec: Any) -> Any:
        if isinstance(spec, TensorSpec):
            return spec._replace(dtype=self._dtype) if spec.dtype is torch.float32 else spec
        return tuple(map(self._lowered, spec)) if isinstance(spec, tuple | list) else spec


def survives(number: float, dtype: torch.dtype) -> bool:
    """Whether a number neither overflows nor vanishes in a data type; infinity is held as it is."""
    limits = torch.finfo(dtype)
    return number == 0 or not math.isfinite(number) or limits.tiny <= abs(number) <= limits.max


def _survives(tensor: Tensor, dtype: torch.dtype) -> bool:
    limits = torch.finfo(dtype)
    size = tensor[tensor.isfinite() & (tensor != 0)].abs()
    return not size.numel() or bool(size.max() <= limits.max and (size >= limits.tiny).all())


def _replaced(node: fx.Node, old: fx.Node, new: fx.Node) -> Any:
    return fx.node.map_arg((node.args, dict(node.kwargs)), lambda item: new if item is old else item)


def _low_module(module: nn.Module, dtype: torch.dtype, ties: dict[int, nn.Parameter]) -> nn.Module:
    """A copy of a layer with its numbers in another data type; `ties` holds what became of each parameter."""
    low = share_module(module)
    for name, parameter in module._parameters.items():
        if parameter is not None and parameter.is_floating_point():
            if id(parameter) not in ties:
                ties[id(parameter)] = nn.Parameter(parameter.detach().to(dtype), requires_grad=parameter.requires_grad)
            # by name, as recurrent layers keep a list of their weights besides
            setattr(low, name, ties[id(parameter)])
    for name, buffer in module._buffers.items():
        if buffer is not None and buffer.is_floating_point():
            low._buffers[name] = buffer.to(dtype)
    return low
