"""Removes what computes nothing: identities, needless reshapes, duplicates, and what never changes.

    x + 0 = x      view(view(x)) = view(x)      f(x), f(x) = y, y      f(weights) = one tensor      x.size(1) = 64

Conditions under which it refuses, with the reason:

- a copy (`contiguous`, `clone`) stays where a `view` behind it needs the memory layout, or an output would otherwise
  share memory with something else; `detach` stays, as it stops gradients;
- a dropout stays in training mode, and so does what is computed from parameters that train: folding would cut it off;
- a constant stays if it holds far more bytes than what it is computed from, or if its parameter has another use that it
  would be untied from.

Shapes and sizes count as fixed only if they are the same at another batch size; all axes other than the batch are those
of the example inputs. In evaluation mode a tensor computed from parameters becomes a parameter itself, and trains in
their place; a program whose dropouts were removed fine-tunes without dropout. What was a functional call because its
weight was computed (weight standardization) becomes a module when the weight is a parameter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
from torch import fx, nn

from fxopt import edit
from fxopt.analysis.batch_shapes import batch_shapes
from fxopt.analysis.constants import Sources, evaluate, held_tensors, needed_constants, sources
from fxopt.analysis.duplicates import values
from fxopt.analysis.redundancy import PERMUTES, permutation, view_behind
from fxopt.analysis.shapes import TensorSpec, shapes
from fxopt.errors import PassError
from fxopt.frontends.blueprints import blueprint
from fxopt.ops import DROPOUTS
from fxopt.passes_base import Pass, Rewrite, Skip
from fxopt.program import Program

_LARGEST_GROWTH = 2**20  # bytes
_RESHAPES = frozenset({"view", "reshape", "flatten"})


@dataclass(frozen=True, kw_only=True)
class Simplify(Pass):
    """Removes identities, needless layout operators, duplicate subexpressions and constant subgraphs."""

    name: ClassVar[str] = "simplify"
    exact: ClassVar[bool] = True

    def plan(self, program: Program) -> Iterator[Rewrite | Skip]:
        return _Planning(program).decisions()

    def apply(self, program: Program, rewrite: Rewrite) -> None:
        node, params = program.node(rewrite.node), rewrite.params
        kind = params["kind"]
        if kind == "use":
            edit.bypass(program, node, program.node(params["source"]))
        elif kind == "number":
            _write_number(program, node, params["value"])
        elif kind == "reshape":
            edit.replace(program, node, torch.reshape, (program.node(params["source"]), tuple(params["shape"])))
        elif kind == "permute":
            edit.replace(program, node, torch.permute, (program.node(params["source"]), tuple(params["dims"])))
        elif kind == "fold":
            _fold(program, node)
        elif kind == "raise":
            edit.raise_calls(program)
        else:
            raise PassError(f"unknown kind of rewrite {kind!r}", pass_name=self.name, node=rewrite.node)


class _Planning:
    """One walk over the program. A rewrite names nodes that are there; what needs a new one waits a round."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.known = program.analysis(batch_shapes)
        self.values = program.analysis(values)
        self.renamed: set[str] = set()  # replaced by a node of another name

    def decisions(self) -> Iterator[Rewrite | Skip]:
        constant = set(needed_constants(self.program))
        for node in self.program.nodes:
            if node.op in ("placeholder", "get_attr", "output") or not node.users:
                continue
            if node in constant:
                yield self._constant(node)
            elif self._number(node) is not None:
                if any(self._number(user) is None for user in node.users):
                    number = self._number(node)
                    yield Rewrite(node.name, f"is always {number}", {"kind": "number", "value": number})
            else:
                yield from self._repeated(node) or self._merged(node) or self._dropping(node)
        yield from self._raised()

    def _number(self, node: fx.Node) -> int | float | None:
        return None if self.known is None else self.known.number(node)

    def _repeated(self, node: fx.Node) -> list[Rewrite | Skip]:
        first = self.values.first[node.name]
        if first == node.name:
            return [Skip(node.name, self.values.kept[node.name])] if node.name in self.values.kept else []
        if first in self.renamed:
            return []
        why = self.values.redundant.get(node.name)
        what = f"same as {first}" if why is None else f"remove: {why}"
        return [Rewrite(node.name, what, {"kind": "use", "source": first})]

    def _merged(self, node: fx.Node) -> list[Rewrite]:
        """Several reshapes, or several permutations, in one."""
        ops = _RESHAPES if self.program.op(node) in _RESHAPES else PERMUTES
        chain = self._chain(node, ops)
        if len(chain) < 2 or self.known is None:
            return []
        source = self.values.first[self.program.call(chain[-1]).arguments["input"].name]
        if source in self.renamed or any(self.values.first[item.name] != item.name for item in chain):
            return []
        params: dict[str, Any]
        if ops is PERMUTES:
            spec = self.known.spec(node)
            dims = list(range(len(spec.shape))) if spec is not None else []
            for item in chain:
                step = permutation(self.program, item, len(dims))
                if step is None:
                    return []
                dims = [step[axis] for axis in dims]
            params = {"kind": "permute", "source": source, "dims": dims}
        else:
            shape = self.known.literal_shape(node)
            copies = any(self.program.op(item) != "view" for item in chain[1:])
            if shape is None or (copies and view_behind(self.program, node) is not None):
                return []
            params = {"kind": "reshape", "source": source, "shape": shape}
        self.renamed.add(node.name)
        return [Rewrite(node.name, f"merge with {', '.join(item.name for item in chain[1:])}", params)]

    def _chain(self, node: fx.Node, ops: frozenset[str]) -> list[fx.Node]:
        """`node` and those behind it, as long as their values are used for it alone."""
        chain: list[fx.Node] = []
        while self.program.op(node) in ops and (not chain or len(node.users) == 1):
            chain.append(node)
            source = self.program.call(node).arguments.get("input")
            if not isinstance(source, fx.Node):
                return []
            node = source
        return chain

    def _dropping(self, node: fx.Node) -> list[Skip]:
        return [Skip(node.name, "drops in training mode")] if self.program.op(node) in DROPOUTS else []

    def _constant(self, node: fx.Node) -> Rewrite | Skip:
        reason = self._keeps(node)
        if reason is not None:
            return Skip(node.name, reason)
        self.renamed.add(node.name)
        tensors = ", ".join(str(item.target) for item in sources(self.program, node).tensors)
        return Rewrite(node.name, f"fold into a tensor: computed from {tensors or 'literals'} alone", {"kind": "fold"})

    def _keeps(self, node: fx.Node) -> str | None:
        """Why a constant stays computed."""
        found = sources(self.program, node)
        if found.trained and self.program.training:
            return f"computed from {found.trained[0].target}, which trains: folding would cut it off"
        other = self._other_use(node, found)
        if other is not None:
            return f"computed from {found.trained[0].target}, which {other.name} reads too: folding would untie them"
        spec: TensorSpec = self.program.analysis(shapes)[node.name]
        size = prod(spec.shape) * spec.dtype.itemsize
        replaced = [item for item in found.tensors if item is node or found.inside.issuperset(item.users)]
        freed = sum(tensor.nbytes for item in replaced for tensor in held_tensors(self.program, item))
        if size > freed + _LARGEST_GROWTH and size > 2 * freed:
            return f"constant, but holds {size / 2**20:.1f} MiB, and folding would free {freed / 2**20:.1f} MiB only"
        return None

    def _other_use(self, node: fx.Node, found: Sources) -> fx.Node | None:
        """A node outside of what is folded that reads a trained parameter, or something computed from it."""
        trained = {id(tensor) for item in found.trained for tensor in held_tensors(self.program, item)}
        computed = set(found.trained)
        for other in self.program.nodes:
            if other is node or not other.users:
                continue
            if other not in found.inside:
                if any(id(tensor) in trained for tensor in held_tensors(self.program, other)):
                    return next(iter(other.users)) if other.op == "get_attr" else other
                continue
            computed |= {other} if computed.intersection(other.all_input_nodes) else set()
            # the parts of a split share no element: each may become a parameter of its own
            whole = isinstance(self.program.analysis(shapes)[other.name], TensorSpec)
            outside = [user for user in other.users if user not in found.inside]
            if other in computed and whole and outside:
                return outside[0]
        return None

    def _raised(self) -> Iterator[Rewrite]:
        """Functional calls whose weight is a parameter by now, raised together."""
        calls = [node for node in self.program.nodes if self._can_be_raised(node)]
        if calls:
            names = ", ".join(node.name for node in calls)
            yield Rewrite(calls[0].name, f"modules instead of functional calls: {names}", {"kind": "raise"})

    def _can_be_raised(self, node: fx.Node) -> bool:
        found = blueprint(node, lambda item: tuple(_tensor(self.program, item).shape), None)
        if found is None or found.training is not None or not found.tensors:
            return False
        held = {name: item for name, item in found.tensors.items() if item is not None}
        return all(isinstance(_tensor(self.program, item), nn.Parameter) for item in held.values()) and bool(held)


def _tensor(program: Program, node: fx.Node) -> torch.Tensor:
    tensor = program.tensor_of(node)
    assert tensor is not None, f"{node.name} reads no tensor"
    return tensor


def _write_number(program: Program, node: fx.Node, number: float) -> None:
    for user in list(node.users):
        args, kwargs = fx.node.map_arg((user.args, dict(user.kwargs)), lambda item: number if item is node else item)
        edit.set_arguments(program, user, args, kwargs)


def _fold(program: Program, node: fx.Node) -> None:
    found, value = sources(program, node), evaluate(program, node)
    stem = str(found.tensors[0].target) if found.tensors else node.name
    tensors = [tensor for item in found.tensors for tensor in held_tensors(program, item)]
    held = value.is_floating_point() and any(isinstance(tensor, nn.Parameter) for tensor in tensors)
    if held:
        value = nn.Parameter(value, requires_grad=bool(found.trained))  # frozen, if all that it was computed from is
    folded = edit.insert_tensor(program, node, value, name=f"{stem}_folded")
    edit.bypass(program, node, folded)
