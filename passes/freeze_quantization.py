"""Makes integers of fake quantization: what `quantize(mode="qat")` simulates and training has moved, engines compute.

    s clamp(round(x / s), low, high)     becomes     quantize and dequantize nodes     for a value
                                                     a weight held as integers         for a weight

These are the nodes that `quantize` makes by itself; a linear layer gets its bias as 32-bit integers too, as kernels
want it. It works on a program, and on `program.module` captured again after training.

What is computed stays the same to the last bit but for two things: biases of linear layers are rounded, and an engine
may round a number between two integers to the other one. So it is not exact; the report says what it cost.

Refused: integers that the kernels of the target do not multiply, or that their sums of products would not hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import fx

from fxopt import edit
from fxopt.errors import InputError
from fxopt.fake_quantization import FakeQuantize, FakeQuantizedWeight
from fxopt.passes_base import Pass, Rewrite, Skip
from fxopt.program import Program
from fxopt.quantization import QuantizedTensor, dequantize, quantize
from fxopt.quantizers.static import integer_bias, read_integers

__all__ = ["FreezeQuantization"]


@dataclass(frozen=True, kw_only=True)
class FreezeQuantization(Pass):
    """Turns fake quantization into integers."""

    name: ClassVar[str] = "freeze_quantization"
    provides: ClassVar[frozenset[str]] = frozenset({"quantized"})

    def plan(self, program: Program) -> Iterator[Rewrite | Skip]:
        """One decision per value, then one per weight; whatever they are by then is taken.

        Raises:
            InputError: if the program was trained for integers that the kernels of its target do not multiply.
        """
        scheme = program.scheme
        for node in program.nodes:
            module = program.module_of(node)
            if isinstance(module, FakeQuantize):
                if module.integers != scheme.activations:
                    raise _other_target(node, module.integers.name, scheme.activations.name)
                low, high = module.affine.range
                yield Rewrite(node.name, f"{module.integers.name} from {low:.4g} to {high:.4g}")
        for node in program.nodes:
            module = program.module_of(node)
            if isinstance(module, FakeQuantizedWeight):
                if module.bits > scheme.weight_bits:
                    raise _other_target(node, f"weights of {module.bits} bits", f"those of {scheme.weight_bits}")
                yield Rewrite(node.name, f"{module.bits}-bit weights of {node.target}")

    def apply(self, program: Program, rewrite: Rewrite) -> None:
        """Freezes one value or one weight."""
        node = program.node(rewrite.node)
        module = program.module_of(node)
        if isinstance(module, FakeQuantize):
            affine = module.affine
            codes = edit.insert_before(program, node, quantize, (node.args[0], *affine.arguments))
            edit.replace(program, node, dequantize, (codes, *affine.arguments), {})
        else:
            _freeze_weight(program, node, cast("FakeQuantizedWeight", module).frozen())


def _freeze_weight(program: Program, node: fx.Node, held: QuantizedTensor) -> None:
    """Holds a weight as integers, and the bias of a linear layer that alone reads it."""
    # the biases sit at the path that the integers go to
    biases = {item: program.tensor_of(item) for item in program.nodes if _inside(item, node)}
    integers = _bias_of(program, node, held)
    edit.set_module(program, node, held)
    for item, tensor in biases.items():
        name = str(item.target)
        if integers is not None:
            new = edit.insert_before(program, item, integers, (), name=name)
        else:
            new = edit.insert_tensor(program, item, cast("torch.Tensor", tensor), name=name)
        edit.bypass(program, item, new)


def _bias_of(program: Program, node: fx.Node, held: QuantizedTensor) -> QuantizedTensor | None:
    """The bias beside a linear layer's weight as integers; None where it stays as it is."""
    (layer, *others) = node.users
    call = program.call(layer)
    if call.op != "linear" or others or not program.scheme.integer_biases:
        return None
    bias, source = call.arguments.get("bias"), read_integers(program, layer)
    if source is None or not isinstance(bias, fx.Node) or not _inside(bias, node) or len(bias.users) != 1:
        return None
    return integer_bias(cast("torch.Tensor", program.tensor_of(bias)).detach().double(), held.scale, source)


def _inside(item: fx.Node, node: fx.Node) -> bool:
    return item.op == "get_attr" and str(item.target).startswith(f"{node.target}.")


def _other_target(node: fx.Node, trained: str, multiplied: str) -> InputError:
    return InputError(
        f"{node.target} was trained for {trained}, and the kernels of this target multiply {multiplied}: "
        "pass target= to quantize as to compile, and train for it"
    )
