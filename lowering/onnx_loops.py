"""The steps of a recurrent layer of integers as a loop in the graph: ONNX Runtime has no operator for those of a GRU.

torch's exporter has no way to say a loop from the forward of a module. So the module gives one node that stands for it
(`gru_steps`), and `spell_loops` puts a Scan in its place. The body says the product as `onnx_integers` does, for ONNX
Runtime to make one DynamicQuantizeMatMul of it.

    r = sigmoid(a_r + b_r)      a: what the input gives, for all steps at once, before the loop
    z = sigmoid(a_z + b_z)      b: what the state gives, W h + bias, in integers
    n = tanh(a_n + r b_n)
    h = n + z (h - n)

A step costs 10 us beyond its product. Measured (ONNX Runtime 1.32, AVX2 without VNNI, one thread, 50 steps, batch 1 and
8), the time of its GRU in float32 over that of this: 0.22 and 0.60 with 64 states, 0.46 and 0.96 with 128, 1.2 and 1.4
with 256, 1.8 and 1.8 with 512, 3.0 and 2.4 with 1024.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fxopt.lowering.onnx_nodes import nodes

if TYPE_CHECKING:
    import onnx_ir

__all__ = ["gru_steps", "spell_loops"]

_DOMAIN, _STEPS = "fxopt", "GRUSteps"


def gru_steps(
    read: Tensor, hidden: Tensor, codes: Tensor, scale: Tensor, bias: Tensor, *, backwards: bool
) -> tuple[Tensor, Tensor]:
    """A node that stands for the steps of one direction of a GRU, for the forward of a module.

    Args:
        read: what the input gives, float32[steps, batch, 3 n].
        hidden: at the beginning, float32[batch, n].
        codes: int8[n, 3 n].
        scale: float32[3 n].
        bias: float32[3 n].
        backwards: whether the last step comes first.

    Returns:
        The states at all steps, float32[steps, batch, n], and the last, float32[batch, n].
    """
    steps, batch, _ = read.shape
    states = hidden.shape[1]
    given, last = nodes(
        f"{_DOMAIN}::{_STEPS}",
        [read, hidden, codes, scale, bias],
        (torch.float32, torch.float32),
        ((steps, batch, states), (batch, states)),
        {"states": states, "backwards": int(backwards)},
    )
    return given, last


def spell_loops(model: onnx_ir.Model) -> None:
    """Puts loops, in place, where nodes stand for them."""
    from onnx_ir import convenience

    for node in list(model.graph):
        if node.domain != _DOMAIN:
            continue
        loop, constants = _loop(node)
        given, last = node.outputs
        convenience.replace_nodes_and_values(
            model.graph, node, [node], [*constants, loop], [given, last], [loop.outputs[1], loop.outputs[0]]
        )
    model.opset_imports.pop(_DOMAIN, None)


def _loop(node: onnx_ir.Node) -> tuple[onnx_ir.Node, list[onnx_ir.Node]]:
    """The loop that a node stands for, and what gives constants that its body reads."""
    import onnx_ir
    from onnx_ir.tape import Tape

    read, hidden, codes, scale, bias = node.inputs
    states = node.attributes["states"].as_int()
    around, inside = Tape(), Tape()
    two, one = (around.op("Constant", [], {"value_ints": sizes}) for sizes in ([2 * states, states], [states] * 2))
    label = node.outputs[0].name
    state, taken = (onnx_ir.val(f"{label}_{name}", dtype=onnx_ir.DataType.FLOAT) for name in ("state", "taken"))
    quantized, step, zero = inside.op_multi_out("DynamicQuantizeLinear", [state], num_outputs=3)
    sums = inside.op(
        "Cast", [inside.op("MatMulInteger", [quantized, codes, zero])], {"to": onnx_ir.DataType.FLOAT.value}
    )
    product = inside.op("Add", [inside.op("Mul", [sums, inside.op("Mul", [step, scale])]), bias])
    gates, new = inside.op_multi_out("Split", [taken, two], {"axis": 1}, num_outputs=2)
    own_gates, known = inside.op_multi_out("Split", [product, two], {"axis": 1}, num_outputs=2)
    opened = inside.op("Sigmoid", [inside.op("Add", [gates, own_gates])])
    reset, update = inside.op_multi_out("Split", [opened, one], {"axis": 1}, num_outputs=2)
    fresh = inside.op("Tanh", [inside.op("Add", [new, inside.op("Mul", [reset, known])])])
    ahead = inside.op("Mul", [update, inside.op("Sub", [state, fresh])])
    following = inside.op("Add", [fresh, ahead])
    shown = inside.op("Identity", [following])
    for index, value in enumerate(value for made in (*around.nodes, *inside.nodes) for value in made.outputs):
        value.name = f"{label}_{index}"  # no other value of the model may have it
    for value in (following, shown):
        value.dtype = onnx_ir.DataType.FLOAT
    body = onnx_ir.Graph([state, taken], [following, shown], nodes=inside.nodes, name=f"{label}_body")
    backwards = [node.attributes["backwards"].as_int()]
    where: dict[str, Any] = {"scan_input_directions": backwards, "scan_output_directions": backwards}
    around.op_multi_out("Scan", [hidden, read], {"body": body, "num_scan_inputs": 1, **where}, num_outputs=2)
    *constants, loop = around.nodes
    return loop, constants
