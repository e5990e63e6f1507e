"""Has layers hold their weights, and compute, with integers of a few bits.

    mode           activations                          weights
    static         8 bits, ranges from data             8 bits (4 bits: the same kernels, fewer values)
    qat            8 bits, ranges trained from there    8 or 4 bits, simulated: to be trained, then frozen

Each mode is described in its file of `fxopt/quantizers/`. Weights are rounded so that the least is lost, whereupon the
bias takes up what is lost on average.

Fold BatchNorms before. Refused, with the reason: layers without an integer kernel, that are ignored, whose weight comes
from elsewhere, or that do not compute in float32; and a program in which no layer is left.

Papers: arXiv:1712.05877 (integer inference), arXiv:2004.09602 (a survey of what works), arXiv:1902.08153 (learned
steps).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from fxopt.analysis.value_spreads import Observer
from fxopt.options import check_choice, check_flag, check_number, check_patterns
from fxopt.passes_base import Pass, Rewrite, Skip
from fxopt.program import Program
from fxopt.quantizers.aware import AwareQuantizer
from fxopt.quantizers.sensitivity import LayerLoss
from fxopt.quantizers.static import Equalize, StaticQuantizer
from fxopt.rounding import Rounding

__all__ = ["Quantize"]

Mode = Literal["static", "qat"]

_QUANTIZERS: Mapping[Mode, type[StaticQuantizer]] = {"static": StaticQuantizer, "qat": AwareQuantizer}


@dataclass(frozen=True, kw_only=True)
class Quantize(Pass):
    """Quantizes a program for integer kernels.

    Attributes:
        mode: "static"; or "qat", whose program trains and goes to `freeze_quantization`.
        weight_bits: of a weight, 8 or 4.
        observer: how ranges of activations are chosen: "minmax", "percentile", "mse" or "entropy"; "auto" is "mse".
        round: how weights are rounded: "nearest"; "adaround", up or down as is best for what the layer gives; or
            "gptq", which lets weights make up for each other by more than a step; "auto" is "gptq".
        per_channel: whether each output of a layer has a scale of its own.
        equalize: "auto" scales channels between layers where less is lost then, by calibration data; "off" does not.
        bias_correction: whether the bias takes up what rounding a weight loses on average.
        min_sqnr_db: signal to quantization noise ratio of the outputs on calibration data, in decibel, that is
            reached by leaving as few layers as it takes in floating point, the worst first; None: all are quantized.
        ignore: patterns of layer paths, "head.*", that go on computing in floating point.
    """

    name: ClassVar[str] = "quantize"
    requires: ClassVar[frozenset[str]] = frozenset({"batch_norm_folded"})
    provides: ClassVar[frozenset[str]] = frozenset({"quantized"})
    refuses: ClassVar[frozenset[str]] = frozenset({"clustered", "fake_quantized", "mixed_precision", "quantized"})

    mode: Mode = "static"
    weight_bits: Literal[8, 4] = 8
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
        if self.mode == "qat":
            object.__setattr__(self, "provides", frozenset({"fake_quantized"}))

    def plan(self, program: Program) -> Iterable[Rewrite | Skip]:
        """One decision per value to quantize, then one per weight.

        Raises:
            InputError: if there are no calibration data, or no layer can be quantized.
        """
        return self._quantizer().plan(program)

    def losses(self, program: Program) -> list[LayerLoss]:
        """Which layers lose what is lost: what each costs when it alone is quantized, the worst first.

        Args:
            program: with batch norms folded, and calibration data: `fxopt.optimize(model, inputs, ["default"], ...)`.

        Raises:
            InputError: if there are no calibration data, or no layer can be quantized.
        """
        return self._quantizer().losses(program)

    def apply(self, program: Program, rewrite: Rewrite) -> None:
        self._quantizer().apply(program, rewrite)

    def _quantizer(self) -> StaticQuantizer:
        return _QUANTIZERS[self.mode](
            observer="mse" if self.observer == "auto" else self.observer,
            round="gptq" if self.round == "auto" else self.round,
            weight_bits=self.weight_bits,
            per_channel=self.per_channel,
            ignore=self.ignore,
            equalize=self.equalize,
            bias_correction=self.bias_correction,
            min_sqnr_db=self.min_sqnr_db,
        )
