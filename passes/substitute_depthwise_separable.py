"""Writes dense convolutions as a depthwise and a pointwise one, with weights that are fitted to what they were.

See `fxopt/depthwise_separable.py` for the two orders and how they are fitted: to the weights, or with calibration data
to what the layer gives on these (`fit`), whereupon in the end the new layers and all behind them are fitted to what was
there before (`fxopt/reconstruction.py`). The error of a layer is the share of the variance of its outputs that is lost,
each output counted as what is behind makes of it; without data, of the energy of its weights.

How wide: a multiplier for all layers, or for each the form of the fewest MACs whose error is at most `max_error`. With
`gate="time"` it must be faster than the layer where the program is to run (`fxopt/layer_times.py`).

Refused, with the reason: 1 x 1 kernels, depthwise convolutions, layers of which no form saves MACs (and time) or is
within `max_error`, and those that are ignored, called at several places, tied, masked, or not modules. Groups stay:
slices are within them. Substitute before BatchNorms are folded, run `reestimate_batch_norm` behind.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from torch import fx, nn

from fxopt.analysis.layer_moments import layer_moments
from fxopt.analysis.measurements import keep, measured
from fxopt.analysis.originals import original_of
from fxopt.depthwise_separable import Fitted, Form, Order, Separable
from fxopt.errors import InputError, PassError
from fxopt.layer_times import WORTH, Gate
from fxopt.options import check_choice, check_patterns
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
)

if TYPE_CHECKING:
    from fxopt.program import Program

__all__ = ["SubstituteDepthwiseSeparable"]

_KINDS = ("conv1d", "conv2d", "conv3d")


@dataclass(frozen=True, kw_only=True)
class SubstituteDepthwiseSeparable(Pass):
    """Substitutes depthwise separable convolutions for dense ones.

    Attributes:
        multiplier: channels between the two layers, per input channel (depthwise first) or per output (pointwise
            first); "auto" takes for each layer the form of the fewest MACs that is within `max_error`.
        order: which of the two is first; "auto" takes the order that loses less, or with multiplier "auto" saves more.
        max_error: the share of a layer's outputs that may be lost, at most; layers that would lose more are left
            alone. None is no limit, for a multiplier that is a number. The default is the largest of those measured
            that costs less than a point before any training: on the ResNet-14 of the benchmarks (93.6 %) 0.05 gives
            92.8 % at 37 % of the MACs, 0.1 gives 92.1 % at 28 %, and 0.2 gives 89.0 % at 18 %.
        fit: to the "weights", or to the calibration "data"; "auto" takes the data if there are some.
        gate: what has to be saved: "macs", or "time" as it is measured on the backend.
        ignore: patterns of layer paths, "head.*", that are left alone.
    """

    name: ClassVar[str] = "substitute_depthwise_separable"
    refuses: ClassVar[frozenset[str]] = frozenset({"clustered", "fake_quantized", "quantized", "sparse"})

    multiplier: int | Literal["auto"] = "auto"
    order: Order | Literal["auto"] = "auto"
    max_error: float | None = 0.05
    fit: Literal["auto", "weights", "data"] = "auto"
    gate: Gate = "macs"
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        multiplier: object = self.multiplier
        if multiplier != "auto" and (type(multiplier) is not int or multiplier < 1):
            raise ValueError(f"multiplier must be 'auto' or an integer of at least 1, not {multiplier!r}")
        check_choice("order", self.order, ("auto", *get_args(Order)))
        limit: object = self.max_error
        if limit is None:
            if multiplier == "auto":
                raise ValueError("multiplier 'auto' is chosen by max_error: give it, or a multiplier such as 2")
        elif not isinstance(limit, int | float) or not 0 < limit < 1:
            raise ValueError(f"max_error must be a share between 0 and 1, or None, not {limit!r}")
        check_choice("fit", self.fit, ("auto", "weights", "data"))
        check_choice("gate", self.gate, get_args(Gate))
        check_patterns("ignore", self.ignore)

    def plan(self, program: Program) -> Iterator[Rewrite | Skip]:
        """One decision per convolution."""
        layers, left = sorted_out(program, _KINDS, self._reason_to_leave)
        yield from left
        chosen = self._chosen(program, [node.name for node in layers])
        times = self._times(program, layers, chosen)
        changed = []
        for node in layers:
            found = chosen[node.name]
            if isinstance(found, str):
                yield Skip(node.name, found)
                continue
            taken = f"{found.form.macs / _dense_macs(program, node):.0%} of its MACs"
            if node.name in times:
                taken += f" and {times[node.name]:.0%} of its time"
                if times[node.name] > WORTH:
                    yield Skip(node.name, f"{_name(found)} takes {taken}")
                    continue
            changed.append(node)
            order, multiplier, _ = found.form
            yield Rewrite(
                node.name,
                f"{_name(found)} for {node.target}: {taken}, loses {found.error:.2%} of its outputs",
                {"order": order, "multiplier": multiplier},
            )
        if changed and self._looks_at_data(program):
            yield from plan_fit(program, changed, changed)

    def apply(self, program: Program, rewrite: Rewrite) -> None:
        """Substitutes one layer; or fits layers, once all are substituted."""
        original = original_of(program)
        if "fit" in rewrite.params:
            reconstruct(program, original, rewrite.params["fit"], lambda _, value: value)
            return
        node = program.node(rewrite.node)
        layer: Any = program.module_of(node)
        if program.op(node) not in _KINDS or layer is None:
            raise PassError(
                f"{rewrite.node} is no convolution that is a module", pass_name=self.name, node=rewrite.node
            )
        order: Order = rewrite.params["order"]
        found = self._fitted(original, rewrite.node, order, rewrite.params["multiplier"])
        (name, first), (_, last) = _layers(layer, found).items()
        substitute(program, node, {name: first}, last, found.offset, original)

    def _reason_to_leave(self, program: Program, node: fx.Node) -> str | None:
        """Why a convolution is left alone, whatever its forms; None if it is not."""
        reason = reason_to_keep(program, node, self.ignore)
        if reason is not None:
            return reason
        weight = _layer(program, node).weight
        if weight[0, 0].numel() == 1:
            return "its kernel has one place: it is pointwise already"
        if weight.shape[1] == 1:
            return "each output reads one channel: it is depthwise already"
        if self.fit == "data" and weight[0].numel() > LONGEST:
            return f"each output reads {weight[0].numel()} values, and {LONGEST} is the most that is fitted to data"
        return None

    def _looks_at_data(self, program: Program) -> bool:
        if self.fit == "data" and program.calibration is None:
            raise InputError("fit='data' needs data: pass calibration=, an iterable of batches, or take fit='auto'")
        return self.fit != "weights" and program.calibration is not None

    def _chosen(self, program: Program, layers: Sequence[str]) -> dict[str, Fitted | str]:
        """The form of each layer, or why it has none; kept with the program."""
        key = self.multiplier, self.order, self.max_error, self._looks_at_data(program)
        known = dict(measured(program, _choices))
        missing = [name for name in layers if (name, key) not in known]
        for name, layer in self._separable(program, missing):
            known[name, key] = self._choice(layer)
        keep(program, _choices, known)
        return {name: known[name, key] for name in layers}

    def _times(
        self, program: Program, layers: Sequence[fx.Node], chosen: Mapping[str, Fitted | str]
    ) -> dict[str, float]:
        """By layer the share of its time that its form takes, if time is what has to be saved."""
        times = {}
        if self.gate == "time":
            with progress("timing layers", len(layers), "layers") as advance:
                for node in layers:
                    found = chosen[node.name]
                    if not isinstance(found, str):
                        rewritten = _layers(_layer(program, node), found)
                        times[node.name] = share_of_time(program, node, list(rewritten.values()))
                    advance(1)
        return times

    def _choice(self, layer: Separable) -> Fitted | str:
        orders: tuple[Order, ...] = get_args(Order) if self.order == "auto" else (self.order,)
        is_auto = self.multiplier == "auto"
        forms = list(layer.forms(orders, None if self.multiplier == "auto" else self.multiplier))
        found: list[Fitted] = []
        for order in orders:
            # what takes more MACs than a form that is good enough is not fitted
            most = min((each.form.macs for each in found if is_auto and self._is_within(each)), default=math.inf)
            of_order = [form for form in forms if form.order == order and form.macs <= most]
            if of_order:
                found.append(self._narrowest(layer, of_order))
        which = "no multiplier" if is_auto else f"multiplier {self.multiplier}"
        if not found:
            return f"{which} saves {'' if is_auto else 'no '}MACs"
        good = [each for each in found if self._is_within(each)]
        if good:
            return min(good, key=lambda each: (each.form.macs if is_auto else 0, each.error))
        least = min(found, key=lambda each: each.error)
        return f"at best it loses {least.error:.2%} of its outputs, {_name(least)}; max_error is {self.max_error:.2%}"

    def _narrowest(self, layer: Separable, forms: Sequence[Form]) -> Fitted:
        """The first form that is within `max_error`, or the last of all; each loses less than the one before it."""
        low, high = 0, len(forms) - 1
        found = layer.fitted(forms[high])
        while low < high and self._is_within(found):
            middle = (low + high) // 2
            tried = layer.fitted(forms[middle])
            if self._is_within(tried):
                found, high = tried, middle
            else:
                low = middle + 1
        return found

    def _is_within(self, found: Fitted) -> bool:
        return self.max_error is None or found.error <= self.max_error

    def _fitted(self, program: Program, name: str, order: Order, multiplier: int) -> Fitted:
        """The weights of a form: what planning found, if that was planned on this program."""
        looks = self._looks_at_data(program)
        for (node, key), found in measured(program, _choices).items():
            if (
                node == name
                and key[-1] == looks
                and not isinstance(found, str)
                and found.form[:2] == (order, multiplier)
            ):
                return found
        ((_, layer),) = self._separable(program, [name])
        return layer.fitted(layer.form(order, multiplier))

    def _separable(self, program: Program, layers: Sequence[str]) -> Iterator[tuple[str, Separable]]:
        """The layers in turn, with what is known of their patches."""
        if not layers:
            return
        with progress("fitting depthwise separable layers", len(layers), "layers") as advance:
            if self._looks_at_data(program):
                seen = layer_moments(program, layers, lambda layer: layer.length <= LONGEST)
                patches = ((name, moments.patches) for name, moments in seen)
            else:
                patches = ((name, None) for name in layers)
            for name, moments in patches:
                node = program.node(name)
                yield (
                    name,
                    Separable(_layer(program, node), output_scale(program, node), sizes_of(program, node), moments),
                )
                advance(1)


def _layer(program: Program, node: fx.Node) -> Any:
    return program.module_of(node)


def _dense_macs(program: Program, node: fx.Node) -> int:
    return math.prod(sizes_of(program, node).outputs) * int(_layer(program, node).weight.numel())


def _layers(layer: Any, found: Fitted) -> dict[str, nn.Module]:
    """The two layers of a form by their kind, in the order in which they run."""
    first, last = found.weights
    is_depthwise = found.form.order == "depthwise_first"
    axes, groups = len(layer.kernel_size), layer.groups
    made = {
        "depthwise": convolution_like(
            layer,
            first if is_depthwise else last,
            [True] * axes,
            layer.in_channels if is_depthwise else layer.out_channels,
        ),
        "pointwise": convolution_like(layer, last if is_depthwise else first, [False] * axes, groups),
    }
    return made if is_depthwise else dict(reversed(made.items()))


def _name(found: Fitted) -> str:
    return f"{found.form.order.replace('_', ' ')} with multiplier {found.form.multiplier}"


def _choices(_: Program) -> dict[Any, Fitted | str]:
    """What was found out so far."""
    return {}
