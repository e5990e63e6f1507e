"""Puts inverted residuals of MobileNetV2 in the place of residual blocks, fitted to what the blocks give.

    relu(branch(x) + shortcut(x))  ->  relu(project(relu6(depthwise(relu6(expand x)))) + x)

each convolution with its BatchNorm; see `fxopt.nn.InvertedResidual`. x is added where the block keeps its shape, else
the new layers make the whole sum. What is behind the sum stays. The depthwise convolution has the stride of the block,
and the kernel and dilation of its receptive field, up to 5 x 5.

The new layers are a regression on calibration data (`fxopt/inverted_residual.py`), block after block from the front:
from what a block reads now to what the original gave there. The error is the share of the variance of the block's
outputs that is lost on samples that were not fitted to. It is a start and not the end: fine-tune the network, or
distil it from the original. `reestimate_batch_norm` has nothing to do right behind, `fold_batch_norm` has.

Refused, with the reason: sums that end no residual block of dense two-dimensional convolutions, blocks of which a part
is read or called elsewhere, tied or masked, in training mode, without data, that save no MACs, or lose too much.

References: arXiv:1801.04381 for the block; regression of features as in FitNets (arXiv:1412.6550).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import takewhile
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor, fx, nn

from fxopt import edit
from fxopt.analysis.affine import Affine, formula_of
from fxopt.analysis.liveness import unused_after, windows
from fxopt.analysis.measurements import keep, measured
from fxopt.analysis.residual_blocks import Field, ResidualBlock, block_module, residual_block
from fxopt.analysis.samples import Seen
from fxopt.analysis.shapes import shapes
from fxopt.errors import PassError
from fxopt.inverted_residual import FirstLayer, Fit, Sizes, Untrained, fit
from fxopt.layer_times import WORTH, Gate, time_ratio
from fxopt.options import check_choice, check_count, check_patterns
from fxopt.passes_base import Pass, Rewrite, Skip, listed
from fxopt.progress import progress
from fxopt.randomness import fixed_random_state
from fxopt.sharing import buffers_restored
from fxopt.stepwise import StepwiseRun

if TYPE_CHECKING:
    from fxopt.program import Program

__all__ = ["SubstituteInvertedResidual"]

_MEMORY = 2**29  # bytes of the activations of one run, of two
_LARGEST = 5  # kernel
_ROUND_TO = 8  # hidden channels
_SHARE = 0.5  # of a block's MACs


@dataclass(frozen=True, kw_only=True)
class SubstituteInvertedResidual(Pass):
    """Substitutes inverted residuals for residual blocks, initialised by regression on calibration data.

    Attributes:
        expansion: hidden channels per input channel; "auto" takes as many as half of a block's MACs allow.
        max_error: blocks that would lose a larger share of the variance of their outputs stay.
        gate: what a block has to save: "macs", or "time" as it is measured on the backend.
        steps: of gradient descent for each block; with 0 there is only what has a closed form.
        ignore: patterns of layer paths, "layer4.*": blocks with such a convolution are left alone.
    """

    name: ClassVar[str] = "substitute_inverted_residual"
    refuses: ClassVar[frozenset[str]] = frozenset(
        {"clustered", "fake_quantized", "mixed_precision", "quantized", "sparse"}
    )

    expansion: float | Literal["auto"] = "auto"
    max_error: float = 0.5
    gate: Gate = "macs"
    steps: int = 200
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        number: object = self.expansion
        if number != "auto" and (isinstance(number, bool) or not isinstance(number, int | float) or not number > 0):
            raise ValueError(f"expansion must be 'auto' or a number above 0, not {number!r}")
        error: object = self.max_error
        if isinstance(error, bool) or not isinstance(error, int | float) or not error > 0:
            raise ValueError(f"max_error must be a share above 0, such as 0.1, not {error!r}")
        check_choice("gate", self.gate, get_args(Gate))
        check_count("steps", self.steps, least=0)
        check_patterns("ignore", self.ignore)

    def plan(self, program: Program) -> Iterator[Rewrite | Skip]:
        """One decision per sum."""
        times: dict[str, float] = {}
        found = {node: self._looked_at(program, node, times) for node in program.nodes if program.op(node) == "add"}
        blocks = {node.name: block for node, block in found.items() if not isinstance(block, str)}
        fits: Mapping[str, Fit] = {}
        reason = _reason_not_to_fit(program)
        if blocks and reason is None:
            fits = self._fitted(program, {name: self._sizes(block) for name, block in blocks.items()}, {})
        for node, block in found.items():
            if isinstance(block, str) or reason is not None:
                yield Skip(node.name, block if isinstance(block, str) else cast("str", reason))
                continue
            error, sizes = fits[node.name].error, self._sizes(block)
            if error > self.max_error:
                yield Skip(
                    node.name, f"it would lose {error:.1%} of its outputs, and max_error is {self.max_error:.1%}"
                )
                continue
            names = listed([str(layer.target) for layer in block.convolutions(program)])
            taken = f"{_macs(block, sizes) / block.macs:.0%} of the MACs"
            if node.name in times:
                taken += f" and {times[node.name]:.0%} of the time"
            what = (
                f"an inverted residual of {sizes.hidden} channels, {sizes.kernel[0]} x {sizes.kernel[1]}, for {names}: "
                f"{taken}, loses {error:.2%} of the outputs"
            )
            yield Rewrite(node.name, what, {"hidden": sizes.hidden})

    def apply(self, program: Program, rewrite: Rewrite) -> None:
        """Puts one inverted residual in; those in front are there already."""
        node = program.node(rewrite.node)
        block = residual_block(program, node)
        if isinstance(block, str):
            raise PassError(f"no residual block: {block}", pass_name=self.name, node=rewrite.node)
        done = measured(program, _done) or _Done(program.copy(), {})
        sizes = _sizes(block, rewrite.params["hidden"])
        found = self._fitted(done.original, {node.name: sizes}, done.fits)[node.name]
        paths = zip(*(str(layer.target).split(".")[:-1] for layer in block.convolutions(program)), strict=False)
        folders = [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, paths)]
        trains = cast("Any", program.module_of(block.convolutions(program)[0])).weight.requires_grad
        value = block.source
        for name, layer in found.layers.named_children():
            # a copy: training writes into what a program holds
            layer = copy.deepcopy(layer).requires_grad_(trains)
            value = edit.insert_before(program, node, layer, (value,), name=".".join([*(folders or [node.name]), name]))
        if sizes.skip:
            edit.set_arguments(program, node, (block.source, value))
        else:
            edit.bypass(program, node, value)
        keep(program, _done, cast("_Done | None", _Done(done.original, {**done.fits, rewrite.node: found})))

    def _looked_at(self, program: Program, node: fx.Node, times: dict[str, float]) -> ResidualBlock | str:
        """The block that ends in a sum, or why it stays; `times` gets the share of its time if that is to be saved."""
        block = residual_block(program, node)
        if isinstance(block, str):
            return block
        if any(fnmatch(str(layer.target), pattern) for layer in block.convolutions(program) for pattern in self.ignore):
            return "ignored"
        sizes = self._sizes(block)
        if not _is_aligned(block, sizes):
            return "no depthwise convolution gives outputs of that size: its paddings and strides do not fit"
        macs = _macs(block, sizes)
        if macs >= block.macs:
            return f"an inverted residual of {sizes.hidden} channels takes {macs:,} MACs, and the block {block.macs:,}"
        if self.gate == "time":
            times[node.name] = _share_of_time(program, node, block, sizes)
            if times[node.name] > WORTH:
                taken = f"{times[node.name]:.0%} of the block's time"
                return f"an inverted residual of {sizes.hidden} channels takes {taken}"
        return block

    def _sizes(self, block: ResidualBlock) -> Sizes:
        if self.expansion != "auto":
            return _sizes(block, max(1, round(block.inputs[1] * self.expansion)))
        most = int(_SHARE * block.macs / _macs(block, _sizes(block, 1)))
        return _sizes(block, max(_ROUND_TO, most - most % _ROUND_TO))

    def _fitted(self, original: Program, wanted: Mapping[str, Sizes], done: Mapping[str, Fit]) -> dict[str, Fit]:
        """Inverted residuals for blocks, each as if those in front that lose little enough were there.

        Args:
            original: the program as it was.
            wanted: by the names of sums, in the order in which they run: what is to be fitted.
            done: what is there already.
        """
        known = dict(measured(original, _fits))
        fits, found = dict(done), dict[str, Fit]()
        runs: _Runs | None = None
        with (
            progress("fitting blocks", len(wanted), "blocks") as advance,
            torch.no_grad(),
            buffers_restored(original.module),
        ):
            for name, sizes in wanted.items():
                key = name, sizes, self.steps, tuple((other, there.sizes) for other, there in fits.items())
                if key not in known:
                    runs = runs or _Runs(original, [*done, *wanted])
                    with fixed_random_state():
                        known[key] = fit(sizes, _first_layer(original, name), runs.seen(name, fits), self.steps)
                found[name] = known[key]
                if found[name].error <= self.max_error:
                    fits[name] = found[name]
                advance(1)
        keep(original, _fits, known)
        return found


class _Done(NamedTuple):
    """What was substituted so far.

    Attributes:
        original: the program before.
        fits: by the names of the sums.
    """

    original: Program
    fits: Mapping[str, Fit]


def _done(_: Program) -> _Done | None:
    """What was substituted so far: nothing, unless it is kept under this name."""
    return None


def _fits(_: Program) -> dict[Any, Fit]:
    """What was fitted so far."""
    return {}


class _Runs:
    """Runs of the original on all batches in pairs: as it is, and with inverted residuals in the place of blocks."""

    def __init__(self, original: Program, names: Sequence[str]) -> None:
        order = {node: place for place, node in enumerate(original.nodes)}
        sums = sorted((original.node(name) for name in names), key=order.__getitem__)
        self._sources = {node.name: _block(original, node.name).source for node in sums}
        # what a block reads is asked for when its sum is reached
        last = {item: node for node, items in unused_after(original).items() for item in items}
        for node in sums:
            source = self._sources[node.name]
            last[source] = max(last[source], node, key=order.__getitem__)
        unused: dict[fx.Node, list[fx.Node]] = {node: [] for node in order}
        for item, node in last.items():
            unused[node].append(item)
        self._pairs = [
            (StepwiseRun(original, unused, inputs), StepwiseRun(original, unused, inputs))
            for inputs in next(windows(original, _MEMORY))
        ]
        self._ahead = [node.name for node in sums]

    def seen(self, name: str, fits: Mapping[str, Fit]) -> list[Seen]:
        """What a block reads, once these are in the place of others in front, and what its sum gave before."""
        while (other := self._ahead.pop(0)) != name:
            for _, after in self._pairs:
                if other in fits:
                    after.before(other)
                    after.give(fits[other](after.values[self._sources[other].name]))
        self._ahead.insert(0, name)
        found = []
        for before, after in self._pairs:
            before.through(name)
            after.before(name)
            found.append(Seen(after.values[self._sources[name].name], before.values[name]))
        return found


def _reason_not_to_fit(program: Program) -> str | None:
    if program.training:
        return "the model is in training mode: call model.eval() first"
    if program.calibration is None:
        return "it takes data to fit what comes in its place: pass calibration=, an iterable of batches"
    if isinstance(program.calibration, Iterator):
        return "it takes data to fit what comes in its place, and an iterator can be read once: pass a list"
    return None


def _share_of_time(program: Program, node: fx.Node, block: ResidualBlock, sizes: Sizes) -> float:
    """The time of an inverted residual over that of the block."""
    source = program.analysis(shapes)[block.source.name]
    return time_ratio(program, block_module(program, node, block), [Untrained(sizes).to(source.dtype)], source)


def _block(program: Program, name: str) -> ResidualBlock:
    return cast("ResidualBlock", residual_block(program, program.node(name)))


def _first_layer(program: Program, name: str) -> FirstLayer:
    """The first convolution of a block with the BatchNorm behind it."""
    branch = _block(program, name).branch
    place = next(place for place, node in enumerate(branch) if program.op(node) == "conv2d")
    layer = cast("nn.Conv2d", program.module_of(branch[place]))
    scale: Tensor = torch.ones(layer.out_channels, dtype=torch.float64, device=layer.weight.device)
    shift = torch.zeros_like(scale) if layer.bias is None else layer.bias.detach().double()
    behind = branch[place + 1 : place + 2]
    if behind and program.op(behind[0]) == "batch_norm":
        norm = cast("Affine", formula_of(program, behind[0]))
        scale = cast("Tensor", norm.operands[0][1])
        shift = scale * shift + norm.shift
    return FirstLayer(layer, scale, shift)


def _sizes(block: ResidualBlock, hidden: int) -> Sizes:
    """Of the inverted residual with so many hidden channels."""
    rows, columns = block.fields
    (height, above), (width, left) = _along(rows), _along(columns)
    return Sizes(
        block.inputs[1],
        hidden,
        block.outputs[1],
        (height, width),
        (rows.stride, columns.stride),
        (above, left),
        (rows.step, columns.step),
        block.inputs == block.outputs and all(field.stride == 1 for field in block.fields),
    )


def _along(field: Field) -> tuple[int, int]:
    """Kernel and padding along an axis: in the middle of the receptive field."""
    kernel = min((field.size - 1) // field.step + 1, _LARGEST)
    kernel -= 1 - kernel % 2
    return kernel, -field.start - (field.size - 1 - field.step * (kernel - 1)) // 2


def _is_aligned(block: ResidualBlock, sizes: Sizes) -> bool:
    """Whether the depthwise convolution is one, and its outputs are as large as the block's."""
    for axis in range(2):
        reach = sizes.dilation[axis] * (sizes.kernel[axis] - 1)
        room = block.inputs[2 + axis] + 2 * sizes.padding[axis] - reach - 1
        if sizes.padding[axis] < 0 or room // sizes.stride[axis] + 1 != block.outputs[2 + axis]:
            return False
    return True


def _macs(block: ResidualBlock, sizes: Sizes) -> int:
    """For the example."""
    before, after = (prod((shape[0], *shape[2:])) for shape in (block.inputs, block.outputs))
    return sizes.hidden * (before * sizes.inputs + after * (prod(sizes.kernel) + sizes.outputs))
