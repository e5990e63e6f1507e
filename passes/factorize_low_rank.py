"""Writes layers as two or three narrower ones in a row: low-rank factorization.

Linear layers and convolutions become a layer with few outputs and one that makes the outputs from these; see
`fxopt/low_rank.py` for the forms, and how the subspaces between are chosen. With calibration data those lose the least
of what the outputs are on the data (`whiten`), and in the end the new layers and all behind them are fitted to what
was there before (`fit`, `fxopt/reconstruction.py`). The error of a layer is the share of the variance of its outputs
that is lost, each output counted as what is behind makes of it.

How narrow: a rank for all layers (`rank`), a share of each layer's MACs (`ratio`) or of its outputs' variance
(`energy`), or a budget of MACs for the whole program (`macs`), which goes where it saves the most error. With
`gate="time"` only forms count that are faster than the layer where the program is to run (`fxopt/layer_times.py`).

Refused, with the reason: layers that no form makes cheaper or faster, that are ignored, called at several places,
tied, masked, or not modules. Factorize before BatchNorms are folded, run `reestimate_batch_norm` behind.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, cast, get_args

from torch import Tensor, fx, nn

from fxopt.analysis.costs import macs_by_node
from fxopt.analysis.layer_moments import layer_moments
from fxopt.analysis.measurements import keep, measured
from fxopt.analysis.originals import original_of
from fxopt.analysis.patches import PatchLayer
from fxopt.analysis.tradeoff import Option, choose
from fxopt.errors import InputError, PassError
from fxopt.layer_times import WORTH, Gate
from fxopt.low_rank import Factors, Form, Grid, LowRank, Method, methods_for
from fxopt.options import check_choice, check_count, check_patterns, check_share
from fxopt.passes_base import Pass, Rewrite, Skip
from fxopt.progress import progress
from fxopt.reconstruction import plan_fit, reconstruct
from fxopt.substitution import (
    LONGEST,
    convolution_like,
    output_scale,
    reason_to_keep,
    share_of_time,
    sizes_of,
    sorted_out,
    substitute,
    with_weight,
)

if TYPE_CHECKING:
    from fxopt.program import Program

__all__ = ["FactorizeLowRank"]

_KINDS = ("linear", "conv1d", "conv2d", "conv3d")
_NARROWER = 0.8  # of the MACs of a form that is too slow: what is tried next


@dataclass(frozen=True, kw_only=True)
class FactorizeLowRank(Pass):
    """Factorizes linear layers and convolutions. Give one of `rank`, `ratio`, `energy` and `macs`.

    Attributes:
        rank: channels between the new layers, per group of a convolution.
        ratio: share of each layer's MACs to keep, at most.
        energy: share of the variance of each layer's outputs to keep, at least.
        macs: share of the program's MACs to keep, at most.
        method: "svd" (a kernel to few channels, then 1 x 1), "spatial" (k x 1, then 1 x k) or "tucker" (1 x 1, k x k,
            1 x 1) where a layer has that form; "auto" takes what loses the least. Linear layers have "svd".
        whiten: with calibration data, keep what the outputs are on these; else the plain SVD of the weights.
        fit: with calibration data, fit the layers to what they gave before.
        gate: what a layer's form has to save: "macs", or "time" as it is measured on the backend, which takes about a
            second for each shape of a layer.
        round_to: ranks are multiples of this; 8 suits most kernels. `rank` is taken as it is.
        ignore: patterns of layer paths, "head.*", that are left alone.
    """

    name: ClassVar[str] = "factorize_low_rank"
    refuses: ClassVar[frozenset[str]] = frozenset({"clustered", "fake_quantized", "quantized", "sparse"})

    rank: int | None = None
    ratio: float | None = None
    energy: float | None = None
    macs: float | None = None
    method: Method | Literal["auto"] = "auto"
    whiten: bool = True
    fit: bool = True
    gate: Gate = "macs"
    round_to: int = 8
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        given = [name for name in ("rank", "ratio", "energy", "macs") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of rank, ratio, energy and macs, not {' and '.join(given) or 'none'}")
        for name in ("ratio", "energy", "macs"):
            if getattr(self, name) is not None:
                check_share(name, getattr(self, name))
        for name in ("rank", "round_to"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        check_choice("method", self.method, ("auto", *get_args(Method)))
        check_choice("gate", self.gate, get_args(Gate))
        check_patterns("ignore", self.ignore)

    def plan(self, program: Program) -> Iterator[Rewrite | Skip]:
        """One decision per layer."""
        layers, left = sorted_out(program, _KINDS, self._reason_to_leave)
        yield from left
        found = self._low_rank(program, [node.name for node in layers])
        chosen, times = self._worthwhile(program, layers, found)
        changed = []
        for place, (node, form) in enumerate(zip(layers, chosen, strict=True)):
            if isinstance(form, str):
                yield Skip(node.name, form)
                continue
            changed.append(node)
            ranks = " and ".join(map(str, form.ranks))
            taken = f"{form.macs / found[node.name].macs:.0%} of its MACs"
            if (place, form) in times:
                taken += f" and {times[place, form]:.0%} of its time"
            yield Rewrite(
                node.name,
                f"{form.method} of {node.target} through {ranks} channels: {taken}, "
                f"loses {form.error:.2%} of its outputs",
                {"method": form.method, "ranks": list(form.ranks)},
            )
        if changed and self.fit and program.calibration is not None:
            yield from plan_fit(program, changed, changed)

    def apply(self, program: Program, rewrite: Rewrite) -> None:
        """Factorizes one layer; or fits layers, once all are factorized."""
        original = original_of(program)
        if "fit" in rewrite.params:
            reconstruct(program, original, rewrite.params["fit"], lambda _, value: value)
            return
        node = program.node(rewrite.node)
        method, ranks = rewrite.params["method"], tuple(rewrite.params["ranks"])
        layer: Any = program.module_of(node)
        if program.op(node) not in _KINDS or layer is None or method not in methods_for(layer):
            raise PassError(f"{rewrite.node} has no {method} form", pass_name=self.name, node=rewrite.node)
        found = self._low_rank(original, [rewrite.node])
        factors = found[rewrite.node].factors(method, ranks)
        *first, last = _layers(layer, factors, method)
        substitute(program, node, dict(zip(("reduce", "core"), first, strict=False)), last, factors.offset, original)

    def _reason_to_leave(self, program: Program, node: fx.Node) -> str | None:
        """Why a layer is left alone, whatever its ranks; None if it is not."""
        reason = reason_to_keep(program, node, self.ignore)
        if reason is None and self.method not in ("auto", *methods_for(cast("nn.Module", program.module_of(node)))):
            return f"it has no {self.method} form"
        return reason

    def _worthwhile(
        self, program: Program, nodes: list[fx.Node], found: dict[str, LowRank]
    ) -> tuple[list[Form | str], dict[tuple[int, Form], float]]:
        """The form of each layer, or why it has none; and the share of a layer's time that each form takes.

        Of forms that are too slow narrower ones are tried, and other methods. Times are known if they have to be saved.
        """
        layers = [found[node.name] for node in nodes]
        candidates = [_Candidates(layer.forms, self._no_gain) for layer in layers]
        times: dict[tuple[int, Form], float] = {}
        while True:
            chosen = list(self._chosen(program, layers, candidates))
            new = [(place, form) for place, form in enumerate(chosen) if isinstance(form, Form)]
            new = [] if self.gate == "macs" else [item for item in new if item not in times]
            if not new:
                return chosen, times
            with progress("timing layers", len(new), "layers") as advance:
                for place, form in new:
                    times[place, form] = self._time_ratio(program, nodes[place], layers[place], form)
                    if times[place, form] > WORTH:
                        candidates[place] = candidates[place].without(form, times[place, form])
                    advance(1)

    def _time_ratio(self, program: Program, node: fx.Node, layer: LowRank, form: Form) -> float:
        factors = layer.factors(form.method, form.ranks)
        return share_of_time(program, node, _layers(program.module_of(node), factors, form.method))

    def _chosen(
        self, program: Program, layers: Sequence[LowRank], candidates: Sequence[_Candidates]
    ) -> Iterator[Form | str]:
        """The form of each layer that loses the least, or why it has none."""
        if self.macs is not None:
            yield from self._within_budget(program, layers, candidates)
            return
        for layer, (forms, none) in zip(layers, candidates, strict=True):
            if not forms:
                yield none
            elif self.energy is not None:
                good = [form for form in forms if 1 - form.error >= self.energy]
                least = min(good, key=lambda form: (form.macs, form.error), default=None)
                yield least or f"no form that keeps {self.energy:.0%} of its outputs saves {self._saved}"
            else:
                limit = layer.macs * (1.0 if self.ratio is None else self.ratio)
                small = [form for form in forms if form.macs <= limit]
                best = min(small, key=lambda form: (form.error, form.macs), default=None)
                yield best or f"no form takes {self.ratio:.0%} of its MACs or less"

    @property
    def _no_gain(self) -> str:
        if self.rank is not None:
            return f"rank {self.rank} saves no MACs"
        return f"no rank that is a multiple of {self.round_to} saves MACs"

    @property
    def _saved(self) -> str:
        return "MACs" if self.gate == "macs" else "MACs and time"

    def _within_budget(
        self, program: Program, layers: Sequence[LowRank], candidates: Sequence[_Candidates]
    ) -> Iterator[Form | str]:
        whole = sum(program.analysis(macs_by_node).values())
        rest = whole - sum(layer.macs for layer in layers)
        things = [
            [Option(layer.macs, 0.0), *(Option(form.macs, form.error) for form in forms)]
            for layer, (forms, _) in zip(layers, candidates, strict=True)
        ]
        budget = cast("float", self.macs) * whole - rest
        least = sum(min(option.cost for option in options) for options in things)
        if least > budget:
            narrowest = "narrowest form" if self.gate == "macs" else "narrowest form that was not found too slow"
            raise InputError(
                f"macs of {self.macs:g} cannot be reached: with the {narrowest} of every layer "
                f"{(least + rest) / whole:.0%} are left. fxopt.explain shows what is left alone, and why; "
                "a smaller round_to gives narrower forms."
            )
        for (forms, none), place in zip(candidates, choose(things, budget), strict=True):
            if not forms:
                yield none
            else:
                yield forms[place - 1] if place else "the budget is met without it"

    def _low_rank(self, program: Program, layers: Sequence[str]) -> dict[str, LowRank]:
        """The forms of layers, which are kept with the program."""
        known = dict(measured(program, _forms))
        key = self.method, self.whiten, self.round_to, self.rank
        missing = [name for name in layers if (name, key) not in known]
        if missing:
            methods = {name: self._methods(program, name) for name in missing}
            for name, moments in self._moments(program, missing, methods):
                node = program.node(name)
                layer = cast("nn.Module", program.module_of(node))
                grid = Grid(methods[name], self.round_to, self.rank)
                known[name, key] = LowRank(layer, output_scale(program, node), sizes_of(program, node), grid, moments)
            keep(program, _forms, known)
        return {name: known[name, key] for name in layers}

    def _moments(self, program: Program, layers: Sequence[str], methods: dict[str, tuple[Method, ...]]) -> Any:
        if not self.whiten or program.calibration is None:
            yield from ((name, None) for name in layers)
            return
        with progress("measuring layers", len(layers), "layers") as advance:
            for found in layer_moments(program, layers, lambda layer: layer.length <= LONGEST):
                yield found
                advance(1)

    def _methods(self, program: Program, name: str) -> tuple[Method, ...]:
        layer = cast("nn.Module", program.module_of(program.node(name)))
        able = methods_for(layer) if self.method == "auto" else (self.method,)
        seen = self.whiten and program.calibration is not None
        if seen and PatchLayer(layer).length > LONGEST:
            return ("svd",)
        return able


def _forms(_: Program) -> dict[Any, LowRank]:
    """What was found out so far."""
    return {}


class _Candidates(NamedTuple):
    """The forms that a layer may take, and what to say if there are none."""

    forms: tuple[Form, ...]
    none: str

    def without(self, form: Form, ratio: float) -> _Candidates:
        """What is left once a form turned out to be slow, with all others of its method but much narrower ones."""
        left = (other for other in self.forms if other.method != form.method or other.macs < _NARROWER * form.macs)
        ranks = " and ".join(map(str, form.ranks))
        return _Candidates(
            tuple(left), f"no form is faster: {form.method} through {ranks} channels takes {ratio:.0%} of its time"
        )


def _layers(layer: Any, factors: Factors, method: Method) -> list[nn.Module]:
    """The layers of a form, in the order in which they run."""
    return [_make(layer, weight, place, method) for place, weight in enumerate(factors.weights)]


def _make(layer: Any, weight: Tensor, place: int, method: Method) -> nn.Module:
    """The layer of a form that has this weight."""
    if isinstance(layer, nn.Linear):
        return with_weight(nn.Linear(weight.shape[1], len(weight), bias=False, device="meta"), weight, layer)
    axes = weight.ndim - 2
    carries = {"svd": (0,) * axes, "spatial": (0, 1), "tucker": (1,) * axes}[method]
    return convolution_like(layer, weight, [carry == place for carry in carries], layer.groups)
