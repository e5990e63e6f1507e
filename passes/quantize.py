"""Has layers hold their weights, and compute, with integers of a few bits.

    mode           activations                          weights
    static         8 bits, ranges from data             8 bits (4 bits: the same kernels, fewer values)
    dynamic        8 bits, ranges found at each call    8 bits; linear layers, LSTMs, GRUs
    weight_only    float32                              8 or 4 bits, in blocks
    qat            8 bits, ranges trained from there    8 or 4 bits, simulated: to be trained, then frozen

Each mode is described in its file of `fxopt/quantizers/`. Weights are rounded so that the least is lost, whereupon the
bias takes up what is lost on average.

Fold BatchNorms before; modes "static" and "qat" ask for it. Refused, with the reason: layers without an integer kernel,
that are ignored, whose weight comes from elsewhere, or that do not compute in float32; those that the target computes
no sooner with integers, as without VNNI a first convolution of few channels; and a program in which no layer is left.

Papers: arXiv:1712.05877 (integer inference), arXiv:2004.09602 (a survey of what works), arXiv:1902.08153 (learned
steps).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from fxopt.analysis.value_spreads import Observer
from fxopt.errors import InputError
from fxopt.options import check_choice, check_flag, check_number, check_patterns
from fxopt.passes_base import Pass, Rewrite, Skip
from fxopt.program import Program
from fxopt.quantizers.aware import AwareQuantizer
from fxopt.quantizers.base import Quantizer
from fxopt.quantizers.dynamic import DynamicQuantizer
from fxopt.quantizers.sensitivity import LayerLoss
from fxopt.quantizers.static import Equalize, StaticQuantizer
from fxopt.quantizers.weight_only import WeightOnlyQuantizer
from fxopt.rounding import Rounding

__all__ = ["Quantize"]

Mode = Literal["static", "dynamic", "weight_only", "qat"]

_USED_BY = {
    "observer": ("auto", ("static", "qat")),
    "per_channel": (True, ("static", "dynamic", "qat")),
    "weight_bits": (8, ("static", "weight_only", "qat")),
    "group_size": ("auto", ("weight_only",)),
    "equalize": ("auto", ("static", "qat")),
    "min_sqnr_db": (None, ("static", "dynamic", "weight_only")),
}
"""Of options that not every mode has: the default, and the modes that have it."""

_GROUP_SIZE = 32
_SMALLEST_GROUP = 16


@dataclass(frozen=True, kw_only=True)
class Quantize(Pass):
    """Quantizes a program for integer kernels.

    Attributes:
        mode: "static", "dynamic", "weight_only"; or "qat", whose program trains and goes to `freeze_quantization`.
        weight_bits: of a weight, 8 or 4.
        group_size: how many inputs of an output of a linear layer share a scale, a power of two from 16; None: all;
            "auto" is 32 for weights of 4 bits, and None for others.
        observer: how ranges of activations are chosen: "minmax", "percentile", "mse" or "entropy"; "auto" is
            "mse" or "percentile", as the outputs lose less on the calibration data.
        round: how weights are rounded: "nearest"; "adaround", up or down as is best for what the layer gives; or
            "gptq", which lets weights make up for each other by more than a step. The last two take calibration data;
            "auto" is "gptq" where there are some.
        per_channel: whether each output of a layer has a scale of its own.
        equalize: "auto" scales channels between layers where less is lost then, by calibration data; "off" does not.
        bias_correction: whether the bias takes up what rounding a weight loses on average; in modes "static" and
            "qat" that of the last layers takes up what quantizing the whole program does.
        min_sqnr_db: signal to quantization noise ratio of the outputs on calibration data, in decibel, that is
            reached by leaving as few layers as it takes in floating point, the worst first; None: all are quantized.
        ignore: patterns of layer paths, "head.*", that go on computing in floating point.
    """

    name: ClassVar[str] = "quantize"
    requires: ClassVar[frozenset[str]] = frozenset({"batch_norm_folded"})  # not every mode
    provides: ClassVar[frozenset[str]] = frozenset({"quantized"})
    refuses: ClassVar[frozenset[str]] = frozenset({"clustered", "fake_quantized", "mixed_precision", "quantized"})

    mode: Mode = "static"
    weight_bits: Literal[8, 4] = 8
    group_size: int | Literal["auto"] | None = "auto"
    observer: Observer | Literal["auto"] = "auto"
    round: Rounding | Literal["auto"] = "auto"
    per_channel: bool = True
    equalize: Equalize = "auto"
    bias_correction: bool = True
    min_sqnr_db: float | None = None
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, get_args(Mode))
        check_choice("weight_bits", self.weight_bits, (8, 4))
        check_choice("observer", self.observer, ("auto", *get_args(Observer)))
        check_choice("round", self.round, ("auto", *get_args(Rounding)))
        check_choice("equalize", self.equalize, get_args(Equalize))
        check_flag("per_channel", self.per_channel)
        check_flag("bias_correction", self.bias_correction)
        if self.min_sqnr_db is not None:
            check_number("min_sqnr_db", self.min_sqnr_db)
        check_patterns("ignore", self.ignore)
        if self.group_size not in ("auto", None) and not _is_group_size(self.group_size):
            raise ValueError(
                f"group_size must be a power of two, {_SMALLEST_GROUP} or more, None or 'auto', not {self.group_size!r}"
            )
        for option, (default, modes) in _USED_BY.items():
            if getattr(self, option) != default and self.mode not in modes:
                raise ValueError(f"{option} is for mode={' and '.join(map(repr, modes))}, and mode is {self.mode!r}")
        if self.mode in ("dynamic", "weight_only"):
            object.__setattr__(self, "requires", frozenset())
        if self.mode == "qat":
            object.__setattr__(self, "provides", frozenset({"fake_quantized"}))

    def plan(self, program: Program) -> Iterable[Rewrite | Skip]:
        """One decision per value to quantize, then one per weight.

        Raises:
            InputError: if there are no calibration data and the mode or the rounding takes them, or no layer can be
                quantized.
        """
        return self._quantizer(program).plan(program)

    def losses(self, program: Program) -> list[LayerLoss]:
        """Which layers lose what is lost: what each costs when it alone is quantized, the worst first.

        Args:
            program: with calibration data; mode="static" also wants batch norms folded:
                `fxopt.optimize(model, inputs, ["default"], calibration=...)`.

        Raises:
            InputError: if there are no calibration data, or no layer can be quantized.
        """
        return self._quantizer(program).losses(program)

    def apply(self, program: Program, rewrite: Rewrite) -> None:
        self._quantizer(program).apply(program, rewrite)

    def _quantizer(self, program: Program) -> Quantizer:
        rounding = self._rounding(program)
        if self.mode == "dynamic":
            return DynamicQuantizer(rounding, self.per_channel, self.bias_correction, self.min_sqnr_db, self.ignore)
        if self.mode == "weight_only":
            default = _GROUP_SIZE if self.weight_bits < 8 else None
            block = default if self.group_size == "auto" else self.group_size
            return WeightOnlyQuantizer(
                rounding, self.weight_bits, block, self.bias_correction, self.min_sqnr_db, self.ignore
            )
        kind = AwareQuantizer if self.mode == "qat" else StaticQuantizer
        return kind(
            observers=("mse", "percentile") if self.observer == "auto" else (self.observer,),
            round=rounding,
            weight_bits=self.weight_bits,
            per_channel=self.per_channel,
            ignore=self.ignore,
            equalize=self.equalize,
            bias_correction=self.bias_correction,
            min_sqnr_db=self.min_sqnr_db,
        )

    def _rounding(self, program: Program) -> Rounding:
        """How weights are rounded where data are not a must."""
        if program.calibration is None and self.round not in ("auto", "nearest"):
            raise InputError(f"quantize(round={self.round!r}) looks at what layers read: pass calibration=")
        if self.round == "auto":
            return "nearest" if program.calibration is None else "gptq"
        return self.round


def _is_group_size(value: Any) -> bool:
    return type(value) is int and value >= _SMALLEST_GROUP and value & (value - 1) == 0
