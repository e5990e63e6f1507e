"""What computes with integers, or holds weights so, as ONNX says it: in the form of which ONNX Runtime makes the best.

A weight that is held as integers (`fxopt/packed_weight.py`): a linear layer becomes DequantizeLinear, over blocks of
the inputs, and MatMul. ONNX Runtime makes one MatMulNBits of both, which reads integers, if the weight is laid out as
[inputs, outputs] and MatMul reads it without a Transpose. A convolution has no such kernel: behind a DequantizeLinear
its weight would be computed anew at every call, and it would keep out of the layout that fast kernels take. Cast and
Mul say the same, and are computed once, as a model is loaded. Matrices get a third axis on the way: ONNX Runtime (1.32)
does not fuse a product of matrices with a Relu between it and the next.

Integers of 4 bits are packed by ONNX as by us. The exporter has no type for them: it is told of bytes, and the type is
put right behind it (`in_four_bits`).

Layers that quantize what they read as they run (`fxopt/dynamic_linear.py`, `fxopt/dynamic_recurrent.py`):
DynamicQuantizeLinear and MatMulInteger, of which ONNX Runtime makes one DynamicQuantizeMatMul. For an LSTM it has an
operator of its own, which is no part of ONNX; for a GRU it has none (`lowering/onnx_loops.py`).

All of it is said by modules that take the place of ours in a copy of the program, and whose nodes torch's exporter
takes over as they are. To run, they are of no use.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, fx

from fxopt import edit
from fxopt.analysis.shapes import shapes
from fxopt.dynamic_linear import DynamicLinear
from fxopt.dynamic_recurrent import DynamicGRU, DynamicLSTM, GRULayer
from fxopt.lowering.onnx_loops import gru_steps
from fxopt.lowering.onnx_nodes import node as _node
from fxopt.lowering.onnx_nodes import nodes as _nodes
from fxopt.packed_weight import PackedWeight
from fxopt.sharing import share_module

if TYPE_CHECKING:
    import onnx_ir

    from fxopt.program import Program

__all__ = ["PACKED_OPSET", "four_bit_tensors", "in_four_bits", "spell_integers"]

PACKED_OPSET = 21
"""The first that has integers of 4 bits, and scales for blocks."""

_FLOAT = 1  # onnx.TensorProto.FLOAT
_FUSED_RANK = 3


def spell_integers(program: Program, *, dequantize: bool = False) -> Program:
    """The program itself if it holds no integers that the exporter does not know, else a copy where it finds them.

    Args:
        program: left unchanged.
        dequantize: whether weights of convolutions are said as DequantizeLinear, as those of linear layers always are:
            TensorRT takes integers for weights nowhere else.
    """
    names = [node.name for node in program.nodes if isinstance(program.module_of(node), _OURS)]
    if not names:
        return program
    spelled, known = program.copy(), program.analysis(shapes)
    for name in names:
        node = spelled.node(name)
        module = spelled.module_of(node)
        if isinstance(module, DynamicLinear):
            edit.set_module(spelled, node, _Linear(module.codes, module.scale, module.bias))
        elif isinstance(module, DynamicLSTM):
            edit.set_module(spelled, node, _LSTM(module))
        elif isinstance(module, DynamicGRU):
            edit.set_module(spelled, node, _GRU(module))
        elif isinstance(module, PackedWeight):
            flat = {
                layer.name
                for layer in program.node(name).users
                if len(known[program.call(layer).arguments["input"].name].shape) < _FUSED_RANK
            }
            _spell_weight(spelled, node, module, flat, _DequantizedFilter if dequantize else _ComputedWeight)
    return spelled


def four_bit_tensors(program: Program) -> dict[str, tuple[int, int]]:
    """By the name of a tensor: the sizes of what it holds as integers of 4 bits."""
    held = {str(node.target): program.module_of(node) for node in program.nodes}
    return {
        f"{path}.codes": (module.places, module.shape[0])
        for path, module in held.items()
        if isinstance(module, PackedWeight) and module.bits < torch.iinfo(torch.int8).bits
    }


def in_four_bits(model: onnx_ir.Model, sizes: Mapping[str, tuple[int, int]]) -> None:
    """Has initializers that hold two integers in a byte say so."""
    import onnx
    import onnx_ir

    for name, shape in sizes.items():
        value = model.graph.initializers[name]
        packed = cast("Any", value.const_value).tobytes()
        tensor = onnx.helper.make_tensor(name, onnx.TensorProto.INT4, shape, packed, raw=True)
        value.const_value = onnx_ir.serde.deserialize_tensor(tensor)
        value.dtype, value.shape = onnx_ir.DataType.INT4, onnx_ir.Shape(shape)


def _spell_weight(
    program: Program, node: fx.Node, held: PackedWeight, flat: Container[str], of_convolution: type[PackedWeight]
) -> None:
    """Spells a weight and the layers that read it; `flat` names those that read a matrix."""
    layers = list(node.users)
    linear = all(program.op(layer) == "linear" for layer in layers)
    # a copy, as biases may be kept inside of the module
    spelled = share_module(held)
    spelled.__class__ = _DequantizedWeight if linear else of_convolution
    edit.set_module(program, node, spelled)
    for layer in layers if linear else ():
        arguments = program.call(layer).arguments
        source, bias = arguments["input"], arguments.get("bias")
        lifted = layer.name in flat
        if lifted:
            source = edit.insert_before(program, layer, torch.unsqueeze, (source, 0))
        found = edit.replace(program, layer, torch.matmul, (source, node))
        if bias is not None:
            found = edit.insert_after(program, found, torch.add, (found, bias))
        if lifted:
            edit.insert_after(program, found, torch.squeeze, (found, 0))


class _DequantizedWeight(PackedWeight):
    """The weight of a linear layer, [inputs, outputs]."""

    def forward(self) -> Tensor:
        whole = len(self.scale) == 1
        where = {"axis": 1} if whole else {"axis": 0, "block_size": self.block}
        operands = [self.codes, self.scale[0] if whole else self.scale]
        return _node("DequantizeLinear", operands, torch.float32, (self.places, self.shape[0]), where)


class _ComputedWeight(PackedWeight):
    """The weight of a convolution, in its shape; each output has one scale."""

    def forward(self) -> Tensor:
        numbers = _node("Cast", [self.codes], torch.float32, (self.places, self.shape[0]), {"to": _FLOAT})
        return (numbers * self.scale).t().reshape(self.shape)


class _DequantizedFilter(PackedWeight):
    """The same, for who dequantizes by nothing but an operator."""

    def forward(self) -> Tensor:
        operands = [self.codes, self.scale[0]]
        numbers = _node("DequantizeLinear", operands, torch.float32, (self.places, self.shape[0]), {"axis": 1})
        return numbers.t().reshape(self.shape)


class _Linear(DynamicLinear):
    """A linear layer that quantizes what it reads."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the name that torch gives it)
        found = _product(input, self.codes, self.scale)
        return found if self.bias is None else found + self.bias


class _LSTM(DynamicLSTM):
    """An LSTM that quantizes what it reads."""

    def __init__(self, lstm: DynamicLSTM) -> None:
        layers = [lstm.layer(index) for index in range(lstm.layers)]
        super().__init__(layers, batch_first=lstm.batch_first)
        for index, layer in enumerate(layers):
            # ONNX adds two biases, and takes zero points
            self.register_buffer(f"both_{index}", torch.cat([layer.bias.detach(), torch.zeros_like(layer.bias)], 1))
            self.register_buffer(f"zero_{index}", torch.zeros_like(layer.scale, dtype=torch.int8))

    def run(self, index: int, value: Tensor, states: Sequence[Tensor]) -> tuple[Tensor, ...]:
        layer = self.layer(index)
        both, zero = self.get_buffer(f"both_{index}"), self.get_buffer(f"zero_{index}")
        steps, batch, _ = value.shape
        directions, size = layer.recurrent_codes.shape[:2]
        given, *last = _nodes(
            "com.microsoft::DynamicQuantizeLSTM",
            [
                *(value, layer.codes, layer.recurrent_codes, both, None, *states, None),
                *(layer.scale, zero, layer.recurrent_scale, zero),
            ],
            (torch.float32,) * 3,
            ((steps, directions, batch, size), (directions, batch, size), (directions, batch, size)),
            {"hidden_size": size, "direction": "forward" if directions == 1 else "bidirectional"},
        )
        return given.transpose(1, 2).flatten(2), *last


class _GRU(DynamicGRU):
    """A GRU that quantizes what it reads."""

    def __init__(self, gru: DynamicGRU) -> None:
        layers = [gru.layer(index) for index in range(gru.layers)]
        super().__init__(layers, batch_first=gru.batch_first)
        # to the bodies of loops constants come by name: a part of a tensor would be none
        for index, layer in enumerate(layers):
            for name, tensor in layer._asdict().items():
                for direction, part in enumerate(tensor.detach()):
                    self.register_buffer(f"{name}_{index}_{direction}", part.clone())

    def run(self, index: int, value: Tensor, states: Sequence[Tensor]) -> tuple[Tensor, ...]:
        (hidden,) = states
        given, last = [], []
        for direction in range(len(self.layer(index).codes)):
            layer = GRULayer(*(self.get_buffer(f"{name}_{index}_{direction}") for name in GRULayer._fields))
            read = _product(value, layer.codes, layer.scale) + layer.bias
            recurrent = layer.recurrent_codes, layer.recurrent_scale, layer.recurrent_bias
            outputs, end = gru_steps(read, hidden[direction], *recurrent, backwards=direction == 1)
            given.append(outputs)
            last.append(end)
        return torch.cat(given, 2), torch.stack(last)


def _product(value: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """Of a value that is quantized on the way and integers, [..., inputs] and [inputs, outputs]."""
    types, sizes = (torch.uint8, torch.float32, torch.uint8), (value.shape, (), ())
    read, step, zero_point = _nodes("DynamicQuantizeLinear", [value], types, sizes)
    sums = _node("MatMulInteger", [read, codes, zero_point], torch.int32, (*value.shape[:-1], codes.shape[1]))
    return sums.float() * (step * scale)


_OURS = (DynamicLinear, DynamicLSTM, DynamicGRU, PackedWeight)
