"""Sums, and what is added up in them: layers, scaled and shifted by constants, each a function of one earlier value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

from torch import fx

from fxopt.analysis.affine import Affine, affine_of, formula_of
from fxopt.analysis.shapes import shapes
from fxopt.kernels import Convolution, Geometry, geometry_of
from fxopt.masking import mask_of

if TYPE_CHECKING:
    from fxopt.program import Program

__all__ = ["Branch", "BranchReader", "addends_of", "input_of", "layer_of", "sum_tree"]

_LAYERS = ("conv1d", "conv2d", "conv3d", "linear")
_TRANSPOSED = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")


class Branch(NamedTuple):
    """An addend, read as an affine function of `source`.

    Attributes:
        source: the node whose value it is a function of.
        leaves: the layers that it adds up, with their geometries; `source` itself, with none, is the identity.
        inner: the nodes that add and scale.
        axes: where the constants per channel have their channels.
        blocked: the source that it would have, and why it is not read as a function of that.
    """

    source: fx.Node
    leaves: dict[fx.Node, Geometry | None]
    inner: tuple[fx.Node, ...] = ()
    axes: frozenset[int] = frozenset()
    blocked: tuple[fx.Node, str] | None = None

    @classmethod
    def opaque(cls, node: fx.Node, blocked: tuple[fx.Node, str] | None = None) -> Branch:
        """`node` as a function of itself only."""
        return cls(node, {node: None}, blocked=blocked)

    @property
    def origin(self) -> fx.Node:
        """What it reads, for people."""
        return self.blocked[0] if self.blocked is not None and len(self.source.users) == 1 else self.source

    @property
    def has_layer(self) -> bool:
        """Whether a layer is added up in it, or would be if it were not blocked."""
        return any(geometry is not None for geometry in self.leaves.values()) or self.origin is not self.source


class BranchReader:
    """Reads nodes as branches; each once."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._known: dict[fx.Node, Branch] = {}

    def read(self, node: fx.Node, *, outermost: bool = False) -> Branch:
        """What `node` is a function of: of itself if of no earlier value, or if it has other users than the sum."""
        if outermost:
            return self._read(node)
        if node not in self._known:
            self._known[node] = self._read(node) if len(node.users) == 1 else self._shared(node)
        return self._known[node]

    def _shared(self, node: fx.Node) -> Branch:
        if self._program.op(node) not in (*_LAYERS, *_TRANSPOSED, "batch_norm"):
            return Branch.opaque(node)
        return Branch.opaque(node, (input_of(node), f"the output of {_title(node)} has {len(node.users)} users"))

    def _read(self, node: fx.Node) -> Branch:
        op = self._program.op(node)
        if op in _TRANSPOSED:
            return Branch.opaque(node, (input_of(node), f"{_title(node)} is a transposed convolution"))
        if op in _LAYERS:
            geometry = _layer_geometry(self._program, node)
            if isinstance(geometry, str):
                return Branch.opaque(node, (input_of(node), geometry))
            return Branch(input_of(node), {node: geometry})
        affine = affine_of(self._program, node)
        if affine is None:
            return Branch.opaque(node)
        if isinstance(affine, str):
            return Branch.opaque(node, (self.read(input_of(node)).origin, affine))
        parts = [self.read(operand) for operand, _ in affine.operands]
        if any(part.source is not parts[0].source for part in parts):
            return Branch.opaque(node)
        return Branch(
            parts[0].source,
            {leaf: geometry for part in parts for leaf, geometry in part.leaves.items()},
            (node, *(inner for part in parts for inner in part.inner)),
            frozenset().union(*(part.axes for part in parts), () if affine.axis is None else (affine.axis,)),
            next((part.blocked for part in parts if part.blocked is not None), None),
        )


def sum_tree(program: Program, node: fx.Node) -> list[fx.Node]:
    """The tree of sums with the root `node` whose intermediate results nobody else uses; empty if `node` is no sum."""
    affine = affine_of(program, node)
    if not isinstance(affine, Affine) or not affine.is_sum:
        return []
    below = [operand for operand, _ in affine.operands if len(operand.users) == 1]
    return [node, *(found for operand in dict.fromkeys(below) for found in sum_tree(program, operand))]


def addends_of(program: Program, node: fx.Node, sums: Sequence[fx.Node]) -> list[tuple[fx.Node, float]]:
    """What the tree of `sums` adds up, from the left, with factors; the first has 1. `node` alone if it is no sum."""
    formula = formula_of(program, node) if node in sums else None
    if not isinstance(formula, Affine):
        return [(node, 1.0)]
    return [
        (item, float(factor) * own)
        for operand, factor in formula.operands
        for item, own in addends_of(program, operand, sums)
    ]


def layer_of(program: Program, node: fx.Node) -> Convolution:
    """The convolution or linear layer that `node` calls, a leaf of a branch."""
    return cast(Convolution, program.module_of(node))


def input_of(node: fx.Node) -> fx.Node:
    """The value that a layer or norm works on."""
    return cast(fx.Node, node.args[0] if node.args else node.kwargs["input"])


def _layer_geometry(program: Program, node: fx.Node) -> Geometry | str:
    module = program.module_of(node)
    if module is None:
        return f"{node.name} is a function of a computed weight, not a module"
    if mask_of(module) is not None:
        return f"{node.target} has a mask, which a merged layer would lose: merge first, or make the mask permanent"
    geometry = geometry_of(cast(Convolution, module))
    if isinstance(geometry, str):
        return f"{node.target} {geometry}"
    spec = program.analysis(shapes)[node.name]
    if geometry.size and len(spec.shape) != len(geometry.size) + 2:
        return f"the input of {node.target} has no batch axis"
    return geometry if spec.dtype.is_floating_point else f"{node.target} works on {spec.dtype}"


def _title(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_module" else node.name
