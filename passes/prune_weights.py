"""Sets the least important single weights of convolutions and linear layers to zero, and keeps them there by a mask.

Scores, of the weight W_ij of output i for input channel j (at any place of the kernel):

    l1:     |W_ij|
    wanda:  |W_ij| sqrt(E[x_j²])     over all samples and positions of the calibration data (arXiv:2306.11695)

The smallest scores go: `sparsity` of every layer (scope "layer"; wanda compares the weights of one output, as its paper
does, so that each loses its share), or of all layers together (scope "global"). What goes at a time is, by pattern,

    unstructured:  one weight
    block:         4 outputs x 4 input channels at one place of the kernel, with the sum of their scores. Kernels for
                   sparse weights work on 4 outputs x 1 input (XNNPACK; arXiv:1911.09723) or 1 x 4 (TensorFlow Lite):
                   blocks of 4 x 4 suit both, and the block layouts of torch.sparse.
    2:4:           two of every four consecutive input channels of an output at one place of the kernel, half of all
                   (arXiv:2104.08378): what the sparse tensor cores of NVIDIA run, where TensorRT looks for it

Shapes stay, so it is the file that shrinks (`Compiled.save(..., compress=True)`), and the time only where the runtime
has kernels for the pattern. Weights that are pruned already are the first to go, and are never brought back.

Refused, with the reason: layers named by `ignore`; weights that come from elsewhere, are tied or not finite; channels
that do not divide by four, with the patterns that take four; layers that have as many zeros behind their mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any, ClassVar, Literal, cast, get_args

import torch
from torch import Tensor, fx, nn

from fxopt import edit
from fxopt.analysis.constants import held_tensors
from fxopt.analysis.statistics import Statistics, carry, collect
from fxopt.errors import InputError, PassError
from fxopt.kernels import connections, laid_out
from fxopt.masking import mask_of, with_mask, without_mask
from fxopt.options import check_choice, check_patterns, check_share
from fxopt.passes_base import Pass, Rewrite, Skip
from fxopt.program import Program

__all__ = ["PruneWeights"]

_CONVOLUTIONS = frozenset(f"conv{kind}{axes}d" for kind in ("", "_transpose") for axes in (1, 2, 3))
_LAYERS = _CONVOLUTIONS | {"linear"}
_BLOCK = {"unstructured": (1, 1), "block": (4, 4), "2:4": (1, 1)}  # outputs, input channels

Pattern = Literal["unstructured", "2:4", "block"]
Criterion = Literal["l1", "wanda"]


@dataclass(frozen=True, kw_only=True)
class PruneWeights(Pass):
    """Sets single weights to zero.

    Attributes:
        sparsity: the share of weights that are zero afterwards, of those that the pass may prune.
        scope: "layer" prunes this share of every layer, "global" of all layers together, by one threshold.
        pattern: "unstructured", "2:4" (takes a sparsity of 0.5 and scope "layer"), or "block" of 4 outputs x 4 inputs.
        criterion: "l1", or "wanda", which takes calibration data.
        ignore: patterns of layer paths, "head.*", that are left whole.
        permanent: write the zeros into the weights and keep no mask: training brings them back. Makes the masks of
            earlier runs permanent too.
    """

    name: ClassVar[str] = "prune_weights"
    provides: ClassVar[frozenset[str]] = frozenset({"sparse"})
    refuses: ClassVar[frozenset[str]] = frozenset({"clustered", "fake_quantized", "quantized"})

    sparsity: float = 0.5
    scope: Literal["layer", "global"] = "layer"
    pattern: Pattern = "unstructured"
    criterion: Criterion = "l1"
    ignore: tuple[str, ...] = ()
    permanent: bool = False

    def __post_init__(self) -> None:
        check_share("sparsity", self.sparsity)
        check_choice("scope", self.scope, ("layer", "global"))
        check_choice("pattern", self.pattern, get_args(Pattern))
        check_choice("criterion", self.criterion, get_args(Criterion))
        if self.pattern == "2:4" and self.sparsity != 0.5:
            raise ValueError(f'pattern "2:4" has a sparsity of 0.5, not {self.sparsity!r}')
        if self.pattern == "2:4" and self.scope != "layer":
            raise ValueError('pattern "2:4" is decided four weights at a time: leave scope at "layer"')
        check_patterns("ignore", self.ignore)
        if type(self.permanent) is not bool:
            raise ValueError(f"permanent must be True or False, not {self.permanent!r}")

    def plan(self, program: Program) -> Iterator[Rewrite | Skip]:
        """One decision per layer."""
        layers: list[fx.Node] = []
        for node in program.nodes:
            if program.op(node) not in _LAYERS or program.callers(node)[:1] not in ([], [node]):
                continue  # a layer that is called at several places is pruned once
            reason = self._reason_to_keep(program, node)
            if reason is None:
                layers.append(node)
            else:
                yield Skip(node.name, reason)
        statistics = self._statistics(program, layers)
        scores = [self._scores(program, node, statistics) for node in layers]
        for node, units, count in zip(layers, scores, self._counts(scores), strict=True):
            module = cast("nn.Module", program.module_of(node))
            mask, old = self._mask(module, units, count), mask_of(module)
            zeros, total = int((~mask).sum()), mask.numel()
            already = 0 if old is None else int((~old).sum())
            if not zeros:
                whose = f"its {units.numel()}" if self.scope == "layer" else "all"
                yield Skip(node.name, f"no weight of it is among the least {self.sparsity:.0%} of {whose} {self._unit}")
            elif zeros == already and not self.permanent:
                yield Skip(node.name, f"{already} of its {total} weights are masked already")
            else:
                pattern = "" if self.pattern == "unstructured" else f", pattern {self.pattern}"
                what = f"prune {zeros} of {total} weights ({zeros / total:.1%}) of {node.target}{pattern}"
                yield Rewrite(node.name, what, {"count": count, "units": units.numel()})

    def apply(self, program: Program, rewrite: Rewrite) -> None:
        """Prunes one layer: as many of its weights as the plan says, by the scores that they have here."""
        node = program.node(rewrite.node)
        module = program.module_of(node)
        statistics = self._statistics(program, [node])
        units = torch.empty(0) if module is None else self._scores(program, node, statistics)
        if module is None or units.numel() != rewrite.params["units"]:
            raise PassError(
                f"the program has no layer of {rewrite.params['units']} {self._unit} there",
                pass_name=self.name,
                node=node.name,
            )
        mask = self._mask(module, units, rewrite.params["count"])
        edit.set_module(program, node, without_mask(module, mask) if self.permanent else with_mask(module, mask))
        if statistics is not None:
            carry(program, statistics)

    def _reason_to_keep(self, program: Program, node: fx.Node) -> str | None:
        """Why a layer is left alone, whatever its scores; None if it is not."""
        module: Any = program.module_of(node)
        if module is None:
            return "its weight is computed, or read from elsewhere: there is no layer to hold a mask"
        if any(fnmatch(str(node.target), pattern) for pattern in self.ignore):
            return "ignored"
        callers = program.callers(node)
        for other in program.nodes:
            if other not in callers and any(tensor is module.weight for tensor in held_tensors(program, other)):
                return f"its weight is also that of {other.target}: a mask would untie them"
        if not module.weight.isfinite().all():
            return "its weight is not finite"
        _, outputs, inputs, _ = connections(module, module.weight).shape
        if self.pattern == "2:4" and inputs % 4:
            return f"2:4 takes a multiple of 4 input channels for each output, not {inputs}"
        if self.pattern == "block" and (outputs % 4 or inputs % 4):
            return f"blocks of 4 outputs x 4 inputs do not fill {outputs} x {inputs}"
        return None

    @property
    def _unit(self) -> str:
        return "blocks" if self.pattern == "block" else "weights"

    def _statistics(self, program: Program, layers: Sequence[fx.Node]) -> Statistics | None:
        """What the layers see of the calibration data; None where it does not matter."""
        if self.criterion != "wanda" or not layers:
            return None
        if program.calibration is None:
            raise InputError(
                'criterion "wanda" ranks weights by the inputs that they see: pass calibration=, an iterable of '
                'batches, or take criterion "l1"'
            )
        return collect(program, [caller.name for layer in layers for caller in program.callers(layer)], gram=False)

    def _scores(self, program: Program, layer: fx.Node, statistics: Statistics | None) -> Tensor:
        """One score per weight or block, [groups, outputs, inputs, places], in float64; -1 where a mask is already."""
        module: Any = program.module_of(layer)
        scores = connections(module, module.weight.detach().double().abs())
        if statistics is not None:
            seen = [statistics[caller.name] for caller in program.callers(layer)]
            square = sum(each.square * each.count for each in seen) / sum(each.count for each in seen)
            scores = scores * cast("Tensor", square).sqrt().reshape(scores.shape[0], 1, scores.shape[2], 1)
        old = mask_of(module)
        if old is not None:
            scores = torch.where(connections(module, old), scores, -1.0)
        rows, columns = _BLOCK[self.pattern]
        groups, outputs, inputs, places = scores.shape
        blocks = scores.reshape(groups, outputs // rows, rows, inputs // columns, columns, places)
        return blocks.sum((2, 4))

    def _counts(self, scores: Sequence[Tensor]) -> list[int]:
        """How many weights or blocks each layer loses."""
        if self.scope == "layer" or not scores:
            return [round(self.sparsity * units.numel()) for units in scores]
        everything = torch.cat([units.reshape(-1) for units in scores])
        owner = torch.repeat_interleave(torch.tensor([units.numel() for units in scores]))
        gone = everything.argsort(stable=True)[: round(self.sparsity * len(everything))].cpu()
        return torch.bincount(owner[gone], minlength=len(scores)).tolist()

    def _mask(self, module: nn.Module, scores: Tensor, count: int) -> Tensor:
        """The mask of a layer that loses so many weights or blocks: bool, of the weight's shape."""
        groups, outputs, inputs, places = scores.shape
        if self.pattern == "2:4":
            fours = scores.reshape(groups, outputs, inputs // 4, 4, places)
            kept = (_ranks(fours, 3) >= 2).reshape(scores.shape)
        elif self.criterion == "wanda" and self.scope == "layer":
            kept = _share_of_rows(scores.reshape(groups * outputs, inputs * places), count).reshape(scores.shape)
        else:
            kept = (_ranks(scores.reshape(-1), 0) >= count).reshape(scores.shape)
        rows, columns = _BLOCK[self.pattern]
        mask = laid_out(module, kept.repeat_interleave(rows, 1).repeat_interleave(columns, 2)).contiguous()
        old = mask_of(module)
        return mask if old is None else mask & old


def _ranks(scores: Tensor, axis: int) -> Tensor:
    """The place of every score along an axis, 0 for the smallest; equal ones in their order."""
    return scores.argsort(dim=axis, stable=True).argsort(dim=axis)


def _share_of_rows(scores: Tensor, count: int) -> Tensor:
    """Which weights are kept if every row loses the same number, or one more: those whose next one is least."""
    each, rest = divmod(count, len(scores))
    kept = _ranks(scores, 1) >= each
    if rest:
        following, place = scores.masked_fill(~kept, torch.inf).min(1)
        rows = following.argsort(stable=True)[:rest]
        kept[rows, place[rows]] = False
    return kept
