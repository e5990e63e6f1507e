"""What a channel rule works with: the labels of values so far, and the ways to tie, lock and record them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import fx

from fxopt.analysis.constants import constants, evaluate
from fxopt.analysis.labels import FIXED, Labels, LabelSpace, labels_in
from fxopt.analysis.shapes import TensorSpec, shapes
from fxopt.ops import Call

if TYPE_CHECKING:
    from fxopt.program import Program

__all__ = ["Attention", "Member", "Scope"]

Attention = Literal["heads", "head_dim", "none"]


class Member(NamedTuple):
    """What must shrink with the channels: an axis of a tensor, or a number that counts them.

    Attributes:
        node: the call that uses it.
        name: of the tensor or attribute within the called module; "" for the tensor that a `get_attr` node reads.
        axis: of the tensor; None for an attribute.
        labels: one per index of the axis, int64[size].
    """

    node: str
    name: str
    axis: int | None
    labels: torch.Tensor


@dataclass
class Scope:
    """The state of a propagation.

    Attributes:
        program: what is analysed.
        attention: what of attention may be removed: whole heads, channels within every head alike, or nothing.
        space: the labels.
        values: by node name, the labels of its value (a tuple for several), or the plain value.
        members: recorded so far.
    """

    program: Program
    attention: Attention
    space: LabelSpace
    values: dict[str, Any]
    members: list[Member]

    def value(self, argument: Any) -> Any:
        """The labels of a node's value, the number or tuple that a node gives, or the constant itself."""
        return self.values[argument.name] if isinstance(argument, fx.Node) else argument

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """Of the tensor that a node gives, at the sizes of the example."""
        spec = self.program.analysis(shapes)[node.name]
        assert isinstance(spec, TensorSpec), f"{node.name} gives no single tensor"
        return spec.shape

    def call(self, node: fx.Node) -> Call:
        """What a node calls."""
        return self.program.call(node)

    def tensor(self, argument: Any) -> Labels:
        """The labels of an argument that is one tensor."""
        value = self.value(argument)
        assert isinstance(value, Labels), f"{argument} is no tensor"
        return value

    def input(self, node: fx.Node) -> Labels:
        """The labels of a node's first argument."""
        return self.tensor(self.call(node).arguments.get("input", node.args[0] if node.args else None))

    def operands(self, node: fx.Node) -> list[Labels]:
        """The labels of all tensors among a node's arguments."""
        return [item for source in node.all_input_nodes for item in labels_in(self.values[source.name])]

    def labelled(self, node: fx.Node, first: Labels | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The node's arguments, with labels (of full shape) for tensors that carry some and values for constants.

        Args:
            node: a call.
            first: instead of the labels of the first argument.
        """
        plain = self.program.analysis(constants)

        def substitute(item: fx.Node) -> Any:
            value = self.values[item.name]
            if isinstance(value, Labels) and not self._is_floating(item) and item.name in plain:
                return evaluate(self.program, item)
            return self._full(value)

        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), substitute)
        if first is not None:
            args = (first.full(), *args[1:])
        return args, kwargs

    def vector(self, value: Labels, axis: int, why: str) -> torch.Tensor:
        """One label per index of an axis: what is at the other places of that index goes along.

        Args:
            value: labels.
            axis: along which they are wanted.
            why: what happens there; part of the reason if some are fixed.
        """
        axis = value.index(axis)
        compact = self.space.reduced(value).compact
        for other in range(compact.ndim):
            if other != axis and compact.shape[other] > 1:
                self.space.join(compact.narrow(other, 0, 1), compact, f"{why} with fixed channels")
                compact = compact.narrow(other, 0, 1)
        return compact.reshape(-1).expand(value.shape[axis])

    def lies_across(self, value: Labels, axis: int) -> bool:
        """Whether the labels depend on other axes than this one, and not on it."""
        axes = self.space.reduced(value).axes
        return bool(axes) and value.index(axis) not in axes

    def mixed(self, value: Labels, axes: Iterable[int], why: str) -> Labels:
        """The labels after an operator that mixes, or counts, along some axes.

        Where the labels depend on another axis too, the same are removed at every place of these; else they are locked.
        """
        reduced = self.space.reduced(value)
        crossed = sorted({value.index(axis) for axis in axes} & set(reduced.axes))
        if not crossed:
            return value
        if set(crossed) == set(reduced.axes):
            self.space.lock(reduced.compact, why)
            return value
        compact = reduced.compact
        for axis in crossed:
            self.space.join(compact.narrow(axis, 0, 1), compact, why)
            compact = compact.narrow(axis, 0, 1)
        return Labels(compact, value.shape)

    def resized(self, value: Labels, axes: Iterable[int], shape: tuple[int, ...], why: str) -> Labels:
        """The labels after some axes got another size."""
        compact = self.mixed(value, axes, why).compact
        for axis in axes:
            compact = compact.narrow(axis, 0, 1)
        return Labels(compact, shape)

    def contracted(self, node: fx.Node, terms: Sequence[tuple[Labels, list[str]]], output: list[str]) -> Labels:
        """The labels of a product that is summed over the letters which the output does not have, as in einsum.

        Args:
            node: the product.
            terms: each operand with one letter per axis.
            output: the letters of the result.
        """
        batch = set(output).intersection(*(letters for _, letters in terms))
        size: dict[str, int] = {}
        for value, letters in terms:
            for letter, count in zip(letters, value.shape, strict=True):
                size[letter] = max(size.get(letter, 1), count)
        vectors: dict[str, list[torch.Tensor]] = {letter: [] for letter in size}
        for value, letters in terms:
            kept = self._kept_letter(value, letters, batch, f"multiplied at {node.name}")
            for axis, letter in enumerate(letters):
                if value.shape[axis] == size[letter] > 1 or letter == kept:
                    same = kept == letter
                    fixed = torch.full((value.shape[axis],), FIXED)
                    vectors[letter].append(self.vector(value, axis, f"multiplied at {node.name}") if same else fixed)
        result = []
        for letter, found in vectors.items():
            for other in found[1:]:
                self.space.join(found[0], other, f"multiplied by a value of fixed size at {node.name}")
            if letter in output and any(bool((self.space.roots(item) != FIXED).any()) for item in found):
                result.append((letter, torch.stack(found).amax(0)))
        shape = self.shape(node)
        for _, labels in result[1:]:
            self.space.lock(labels, f"every channel meets every other at {node.name}")
        return Labels.along(result[0][1], output.index(result[0][0]), shape) if result else Labels.fixed(shape)

    def _kept_letter(self, value: Labels, letters: list[str], batch: set[str], why: str) -> str | None:
        """The letter along which an operand's channels may be removed; along the others they are tied."""
        reduced = self.space.reduced(value)
        varying = [letters[axis] for axis in reduced.axes]
        if not varying:
            return None
        if len(varying) > 1 and self.attention == "none":
            self.space.lock(reduced.compact, f"{why}, as attention heads")
            return None
        heads = [letter for letter in varying if letter in batch]
        channels = [letter for letter in varying if letter not in batch]
        preferred = heads + channels if self.attention == "heads" else channels + heads
        return preferred[0]

    def barrier(self, node: fx.Node, why: str) -> Any:
        """Locks all that reaches a node, and gives labels of fixed values for what it gives."""
        for item in self.operands(node):
            self.space.lock(item.compact, why)
        return self.fixed(node)

    def fixed(self, node: fx.Node) -> Any:
        """Labels of fixed values, for what a node gives."""
        return _fixed(self.program.analysis(shapes)[node.name])

    def member(self, node: fx.Node, name: str, axis: int | None, labels: torch.Tensor) -> None:
        """Records what must shrink with these channels, also where it is None: a bias may be added later."""
        if not hasattr(self.program.module_of(node), name):
            return  # RMSNorm has no bias
        self.members.append(Member(node.name, name, axis, labels))

    def lock_numbers(self, node: fx.Node) -> None:
        """Locks channels whose number is an operand of arithmetic on tensors at a node."""
        waiting = [item for item in node.all_input_nodes if not self._is_tensor(item)]
        seen = set(waiting)
        while waiting:
            item = waiting.pop()
            for source in item.all_input_nodes:
                value = self.values[source.name]
                if isinstance(value, Labels):
                    for axis in self._asked(item, value):
                        crossed = self.space.reduced(value)
                        if axis in crossed.axes:
                            self.space.lock(crossed.compact, f"their number is used in arithmetic at {node.name}")
                elif source not in seen:
                    seen.add(source)
                    waiting.append(source)

    def _asked(self, node: fx.Node, value: Labels) -> list[int]:
        """The axes whose size a node asks for."""
        call = self.program.call(node)
        dim = call.arguments.get("dim")
        if call.op == "size" and dim is not None:
            return [value.index(dim)]
        axes = []
        for user in node.users:
            index = self.program.call(user).arguments.get("index")
            axes += [value.index(index)] if isinstance(index, int) else list(range(len(value.shape)))
        return axes

    def _is_tensor(self, node: fx.Node) -> bool:
        return isinstance(self.values[node.name], Labels)

    def _is_floating(self, node: fx.Node) -> bool:
        spec = self.program.analysis(shapes)[node.name]
        return isinstance(spec, TensorSpec) and (spec.dtype.is_floating_point or spec.dtype.is_complex)

    def _full(self, value: Any) -> Any:
        if isinstance(value, Labels):
            return value.full()
        return type(value)(map(self._full, value)) if isinstance(value, tuple | list) else value


def _fixed(spec: Any) -> Any:
    if isinstance(spec, TensorSpec):
        return Labels.fixed(spec.shape)
    return tuple(map(_fixed, spec)) if isinstance(spec, tuple | list) else spec
