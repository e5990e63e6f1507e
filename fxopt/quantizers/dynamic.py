"""Dynamic quantization: the integers of activations are found as the program runs. It takes no data.

    x about s (q - z)        8 bits, one range for a tensor, from what it holds at each call
    W about s_o q            8 bits, one scale for each output

Linear layers, LSTMs and GRUs, whose kernels gain more than looking for a range costs. Convolutions gain nothing:
measured on ONNX Runtime, 8 times the time of static quantization. The steps of a GRU are a loop there, so that few
states gain nothing either (measured in `fxopt/lowering/onnx_loops.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, fx, nn

from fxopt import edit
from fxopt.analysis.originals import keep_original, original_of
from fxopt.dynamic_linear import DynamicLinear
from fxopt.dynamic_recurrent import DynamicGRU, DynamicLSTM, DynamicRecurrent, GRULayer, LSTMLayer, in_onnx_order
from fxopt.errors import InputError
from fxopt.integer_limits import IntegerLimits
from fxopt.passes_base import Rewrite, Skip
from fxopt.quantizers.base import Quantizer
from fxopt.quantizers.layers import Layers, find_layers
from fxopt.quantizers.sensitivity import Units
from fxopt.quantizers.weights import WeightCodes, WeightRounding
from fxopt.rounding import Rounding, rounded

if TYPE_CHECKING:
    from fxopt.program import Program

__all__ = ["DynamicQuantizer"]

_RECURRENT = frozenset({"lstm", "gru"})
_KERNELS = _RECURRENT | {"linear"}
_OTHERS = "has no fast integer kernel for ranges that are found as it runs"
_FEWEST_STATES = {"gru": 256}
"""That are worth it, by operator."""


class _Gates(NamedTuple):
    """What a recurrent layer multiplies by, in each of its directions.

    Attributes:
        codes: int8[directions, inputs, gates].
        scale: float32[directions, gates].
        bias: float32[directions, gates].
    """

    codes: Tensor
    scale: Tensor
    bias: Tensor


@dataclass(frozen=True)
class DynamicQuantizer(Quantizer):
    """Plans and applies dynamic quantization.

    Attributes:
        round: how weights of linear layers are rounded; it takes calibration data to round by anything but the nearest.
        per_channel: whether each output of a layer has a scale of its own.
        bias_correction: whether the bias takes up what rounding a weight loses on average.
        min_sqnr_db: ratio of signal to noise of the outputs that is reached by leaving the worst layers as they are.
        ignore: patterns of layer paths that are left alone.
    """

    round: Rounding
    per_channel: bool
    bias_correction: bool
    min_sqnr_db: float | None
    ignore: tuple[str, ...]

    def candidates(self, program: Program) -> tuple[list[list[str]], list[Skip]]:
        if program.scheme.activations.low < 0:
            raise InputError(
                "quantize(mode='dynamic') makes unsigned integers of what layers read, and "
                "the kernels that it is for multiply signed ones: use mode='static' or mode='weight_only'"
            )
        found = self._layers(program)
        return found.names, found.left

    def decisions(self, program: Program, units: Units) -> Iterator[Rewrite]:
        """One per weight of a linear layer, and one per recurrent layer."""
        for names in units:
            paths = ", ".join(sorted({str(program.node(name).target) for name in names}))
            bits = program.scheme.weight_bits if program.op(program.node(names[0])) in _RECURRENT else 8
            yield Rewrite(names[0], f"{bits}-bit weights of {paths}, ranges as it runs", {"layers": list(names)})

    def round_ahead(self, program: Program) -> None:
        for names in self._linear(program):
            self._codes(program, names)

    def apply(self, program: Program, rewrite: Rewrite) -> None:
        """Quantizes the layers of one weight, or one recurrent layer."""
        original = original_of(program)
        layers = [program.node(name) for name in rewrite.params["layers"]]
        if program.op(layers[0]) in _RECURRENT:
            layer = cast("nn.RNNBase", program.module_of(layers[0]))
            edit.set_module(program, layers[0], self._recurrent(layer, program.scheme.weight_bits))
        else:
            self._quantize(program, original, layers)
        keep_original(program, original)

    def _quantize(self, program: Program, original: Program, layers: Sequence[fx.Node]) -> None:
        found = self._codes(original, [item.name for item in layers])
        codes = found.codes.t().contiguous()
        for layer in layers:
            module = cast("Any", program.module_of(layer))
            if isinstance(module, DynamicLinear):
                continue  # called before
            bias = module.bias
            if len(layers) == 1 and bool(found.offset.any()):
                whole = found.bias(bias).to(module.weight.dtype)
                bias = nn.Parameter(whole, requires_grad=module.weight.requires_grad)
            edit.set_module(program, layer, DynamicLinear(codes, found.scale, bias))

    def _codes(self, original: Program, names: Sequence[str]) -> WeightCodes:
        pairs = original.scheme.pairs
        rounding = WeightRounding(8, self.round, self.per_channel, pairs=pairs, absorbed=self.bias_correction)
        return rounding.of(original, names, self._linear(original))

    def _linear(self, program: Program) -> list[list[str]]:
        return [names for names in self._layers(program).names if program.op(program.node(names[0])) == "linear"]

    def _recurrent(self, layer: nn.RNNBase, bits: int) -> DynamicRecurrent:
        pairs = [
            (self._gates(layer, f"ih_l{index}", bits), self._gates(layer, f"hh_l{index}", bits))
            for index in range(layer.num_layers)
        ]

        def held(bias: Tensor) -> Tensor:
            # zeros in the place of biases that a layer does not have are no parameters of the model
            return nn.Parameter(bias) if layer.bias else bias

        if isinstance(layer, nn.LSTM):
            lstm = [LSTMLayer(*read[:2], *own[:2], held(read.bias + own.bias)) for read, own in pairs]
            return DynamicLSTM(lstm, batch_first=layer.batch_first)
        gru = [GRULayer(*read[:2], held(read.bias), *own[:2], held(own.bias)) for read, own in pairs]
        return DynamicGRU(gru, batch_first=layer.batch_first)

    def _gates(self, layer: nn.RNNBase, name: str, bits: int) -> _Gates:
        """A weight of a recurrent layer as integers, and its bias."""
        order = in_onnx_order if isinstance(layer, nn.LSTM) else torch.clone
        codes, scales, biases = [], [], []
        for suffix in ("", "_reverse")[: 1 + layer.bidirectional]:
            weight = order(getattr(layer, f"weight_{name}{suffix}").detach())
            # [groups, inputs, outputs], as for a linear layer
            matrix = weight.double().t().unsqueeze(0)
            found = rounded(matrix, IntegerLimits(2 ** (bits - 1) - 1), None, per_channel=self.per_channel)
            codes.append(found.codes[0].to(torch.int8))
            scales.append(found.scale[0, 0].float())
            bias = getattr(layer, f"bias_{name}{suffix}").detach() if layer.bias else weight.new_zeros(len(weight))
            biases.append(order(bias))
        return _Gates(torch.stack(codes), torch.stack(scales), torch.stack(biases))

    def _layers(self, program: Program) -> Layers:
        return find_layers(program, _KERNELS, self.ignore, others=_OTHERS, fewest_states=_FEWEST_STATES)
