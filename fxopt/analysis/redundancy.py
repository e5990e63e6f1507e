"""Nodes whose value another node has already, for a reason that lies in the operator: identities, no-op layout, x + 0.

Two things besides the value may matter to what follows, and are asked about before a copy is taken away. `view` needs
memory of a certain layout, which a copy may have made. And a program must not hand out its own tensors, or an input, as
an output where the model returned a copy.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import fx

from fxopt.analysis.batch_shapes import BatchShapes, batch_shapes
from fxopt.analysis.identities import is_identity

if TYPE_CHECKING:
    from fxopt.ops import Call
    from fxopt.program import Program

__all__ = ["KEEPS_ORDER", "PERMUTES", "Redundant", "permutation", "redundant", "view_behind"]

KEEPS_ORDER = frozenset({"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"})
"""Operators that give another shape to the same elements in the same order."""
PERMUTES = frozenset({"permute", "transpose", "t"})

_ALIASES = (
    KEEPS_ORDER
    | PERMUTES
    | frozenset("expand split chunk unbind select slice narrow getitem detach identity to float contiguous".split())
)
_MAY_COPY = frozenset({"reshape", "flatten"})
_NEEDS_LAYOUT = frozenset({"view", "unflatten"})
# What comes out of these is laid out in the same way, whatever goes in.
_OWN_LAYOUT = frozenset({"linear", "matmul", "mm", "bmm", "addmm", "layer_norm", "embedding"})
_ONCE_IS_ENOUGH = {"relu": {"relu", "relu6", "sigmoid", "softmax"}, "relu6": {"relu6", "sigmoid", "softmax"}}
_NEUTRAL = {"add": 0, "sub": 0, "mul": 1, "div": 1}


class Redundant(NamedTuple):
    """The value of a node is there already.

    Attributes:
        source: the node that has it.
        why: what the node does, for people.
    """

    source: fx.Node
    why: str


def redundant(program: Program, node: fx.Node) -> Redundant | str | None:
    """Whose value `node` repeats; a reason why it must stay although it does; None if it is no candidate."""
    call = program.call(node)
    source = call.arguments.get("input", call.arguments.get("arg0"))
    if is_identity(program, node) and isinstance(source, fx.Node):
        return Redundant(source, f"{call.op} that does nothing")
    if call.op in _ONCE_IS_ENOUGH and isinstance(source, fx.Node) and program.op(source) in _ONCE_IS_ENOUGH[call.op]:
        return Redundant(source, f"{call.op} of what {program.op(source)} gives")
    if call.op == "cat":
        return _cat(program, node, call)
    if call.op in ("contiguous", "clone"):
        return _copy(program, node, call)
    known = program.analysis(batch_shapes)
    if known is None or known.spec(node) is None:
        return None
    if call.op in _NEUTRAL:
        return _arithmetic(program, node, call, known)
    if not isinstance(source, fx.Node):
        return None
    if call.op in KEEPS_ORDER:
        return _reshaped_back(program, node, known)
    if call.op in PERMUTES:
        return _permuted_back(program, node, known)
    if not known.same(node, source):
        return None
    if call.op in ("to", "float"):
        return _cast(program, node, call, source)
    if call.op in ("expand", "slice", "narrow") or (call.op == "getitem" and _only_slices(call.arguments["index"])):
        return Redundant(source, f"{call.op} that takes everything")
    if call.op in ("pad", "constant_pad") and call.module is None and not any(_flat(call.arguments["pad"])):
        return _unless_needed(program, node, Redundant(source, "pad by nothing"))
    return None


def view_behind(program: Program, node: fx.Node) -> fx.Node | None:
    """A node that needs the memory layout of `node`, directly or through what keeps it."""
    seen, waiting = {node}, [node]
    while waiting:
        for user in waiting.pop().users:
            op = program.op(user)
            if op in _NEEDS_LAYOUT or "as_strided" in op or "view_as" in op:
                return user
            if user not in seen and op not in _OWN_LAYOUT and op != "output":
                seen.add(user)
                waiting.append(user)
    return None


def permutation(program: Program, node: fx.Node, rank: int) -> tuple[int, ...] | None:
    """Output axis -> input axis of a permute, transpose or t; None if it is not literal."""
    arguments = program.call(node).arguments
    if program.op(node) == "permute":
        dims = arguments.get("dims")
        if not isinstance(dims, tuple | list) or not rank or not all(isinstance(axis, int) for axis in dims):
            return None
        return tuple(axis % rank for axis in dims)
    first, second = (0, 1) if program.op(node) == "t" else (arguments.get("dim0"), arguments.get("dim1"))
    if not isinstance(first, int) or not isinstance(second, int) or rank < 2:
        return None
    axes = list(range(rank))
    axes[first], axes[second] = axes[second], axes[first]
    return tuple(axes)


def _cat(program: Program, node: fx.Node, call: Call) -> Redundant | str | None:
    tensors = call.arguments.get("tensors")
    if not isinstance(tensors, tuple | list) or len(tensors) != 1 or not isinstance(tensors[0], fx.Node):
        return None
    return _unless_needed(program, node, Redundant(tensors[0], "cat of one tensor"))


def _copy(program: Program, node: fx.Node, call: Call) -> Redundant | str | None:
    plain = (torch.contiguous_format, torch.preserve_format)
    if call.arguments.get("memory_format", torch.contiguous_format) not in plain:
        return None
    return _unless_needed(program, node, Redundant(call.arguments["input"], f"{call.op} that no one needs"))


def _arithmetic(program: Program, node: fx.Node, call: Call, known: BatchShapes) -> Redundant | str | None:
    left, right = call.arguments.get("input"), call.arguments.get("other")
    if call.op in ("add", "mul") and not isinstance(left, fx.Node):
        left, right = right, left
    neutral = _NEUTRAL[call.op]
    if not isinstance(left, fx.Node) or type(right) not in (int, float) or right != neutral:
        return None
    if call.arguments.get("rounding_mode") is not None or not known.same(node, left):
        return None
    found = Redundant(left, f"{call.op} of {right}")
    dense = program.op(left) not in _ALIASES
    return found if dense and not _is_handed_out(program, node, left) else _unless_needed(program, node, found)


def _cast(program: Program, node: fx.Node, call: Call, source: fx.Node) -> Redundant | str | None:
    arguments = [value for name, value in call.arguments.items() if name != "copy"]
    known = (fx.Node, torch.dtype, torch.device, str, bool, type(None))
    if not all(isinstance(item, known) for item in arguments):
        return None
    asked = {torch.device(item).type for item in arguments if isinstance(item, str | torch.device)}
    present = {tensor.device.type for tensor in (*program.example_inputs, *_tensors(program))}
    if len(present) != 1 or not asked <= present:
        return None
    found = Redundant(source, f"{call.op} of the type it has")
    copies = call.arguments.get("copy", False) is not False or "_to_copy" in str(node.target)
    return _unless_needed(program, node, found) if copies else found


def _reshaped_back(program: Program, node: fx.Node, known: BatchShapes) -> Redundant | str | None:
    """The furthest node behind a chain of reshapes that has the shape at its end."""
    found, may_copy = None, False
    copies = program.op(node) in _MAY_COPY
    for index, source in enumerate(_chain(program, node, KEEPS_ORDER)):
        if known.same(source, node):
            what = program.op(node) if index == 0 else f"reshapes from {source.name}"
            # to the shape that it has already, nothing is copied
            found, may_copy = Redundant(source, f"{what} to the same shape"), copies and index > 0
        copies = copies or program.op(source) in _MAY_COPY
    if found is None:
        return None
    return _unless_needed(program, node, found) if may_copy else found


def _permuted_back(program: Program, node: fx.Node, known: BatchShapes) -> Redundant | None:
    """The furthest node behind a chain of permutations that together move nothing."""
    spec = known.spec(node)
    if spec is None:
        return None
    found, item = None, node
    total = tuple(range(len(spec.shape)))
    for source in _chain(program, node, PERMUTES):
        step = permutation(program, item, len(spec.shape))
        if step is None:
            break
        total = tuple(step[axis] for axis in total)
        if total == tuple(range(len(total))):
            alone = f"{program.op(node)} to the same order"
            found = Redundant(source, alone if item is node else f"permutations from {source.name} cancel")
        item = source
    return found


def _chain(program: Program, node: fx.Node, ops: frozenset[str]) -> Iterator[fx.Node]:
    """The nodes behind `node`, as long as `ops` lead to them."""
    while program.op(node) in ops:
        source = program.call(node).arguments.get("input")
        if not isinstance(source, fx.Node):
            return
        yield source
        node = source


def _unless_needed(program: Program, node: fx.Node, found: Redundant) -> Redundant | str:
    view = view_behind(program, node)
    if view is not None:
        return f"{view.name} needs the memory layout that {program.op(node)} makes"
    if _is_handed_out(program, node, None):
        return f"an output hands out the copy that {program.op(node)} makes"
    return found


def _is_handed_out(program: Program, node: fx.Node, source: fx.Node | None) -> bool:
    """Whether the memory of `node` is that of an output.

    Given a source, only where the memory of that is the program's or the caller's.
    """
    while source is not None and program.op(source) in _ALIASES:
        source = source.all_input_nodes[0]
    if source is not None and source.op not in ("placeholder", "get_attr"):
        return False
    waiting = [node]
    while waiting:
        for user in waiting.pop().users:
            if user.op == "output":
                return True
            if program.op(user) in _ALIASES or is_identity(program, user):
                waiting.append(user)
    return False


def _only_slices(index: Any) -> bool:
    return all(isinstance(item, slice) or item is Ellipsis for item in _flat(index))


def _flat(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def _tensors(program: Program) -> Iterator[torch.Tensor]:
    yield from program.module.parameters()
    yield from program.module.buffers()
