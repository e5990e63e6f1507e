"""Has the layers that give a program's outputs keep the mean of what they give, once all before them is quantized.

What quantization loses is not zero on average, and nothing behind the last layers evens it out: their bias does, by the
mean difference over the calibration data (bias correction by data, arXiv:1906.04721, appendix D, which corrects every
layer so). Of layers in the middle a mean over little data tells less: EfficientNet-Lite0, calibrated on 64 crops, was
at 23.0 dB without, 23.4 dB with the last layer corrected, and 22.1 dB with all.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from fxopt.analysis.liveness import unused_after
from fxopt.progress import progress
from fxopt.randomness import fixed_random_state
from fxopt.sharing import buffers_restored
from fxopt.stepwise import StepwiseRun

if TYPE_CHECKING:
    from fxopt.program import Program

__all__ = ["last_layers", "mean_loss"]


def last_layers(program: Program, layers: Collection[str]) -> set[str]:
    """Those of some layers, by node name, behind which there is no other of them."""
    followed: set[fx.Node] = set()
    found: set[str] = set()
    for node in reversed(program.nodes):
        if node.name in layers and node not in followed:
            found.add(node.name)
        if node.name in layers or node in followed:
            followed.update(node.all_input_nodes)
    return found


def mean_loss(original: Program, program: Program, name: str, weight: Tensor) -> Tensor:
    """What a layer gives in the original less what it would give now with another weight, on average.

    Args:
        original: the program before quantization, with calibration data.
        program: the same with all quantized that comes before the layer.
        name: of the node that calls it, a convolution or linear layer.
        weight: what will take the place of its weight.

    Returns:
        float64[outputs].

    Raises:
        InputError: if the data do not fit the model.
    """
    layer = cast("nn.Module", program.module_of(program.node(name)))
    outputs = -1 if program.op(program.node(name)) == "linear" else 1 - weight.ndim
    total: Any = 0.0
    count = 0
    with (
        progress(f"comparing what {name} gives", 0) as advance,
        fixed_random_state(),
        torch.no_grad(),
        buffers_restored(original.module),
        buffers_restored(program.module),
    ):
        unused = unused_after(original), unused_after(program)
        for inputs in original.calibration_inputs():
            before, now = StepwiseRun(original, unused[0], inputs), StepwiseRun(program, unused[1], inputs)
            before.through(name)
            now.before(name)
            given = functional_call(layer, {"weight": weight.to(cast("Any", layer).weight)}, (now.argument(name),))
            lost = (before.values[name] - given).double()
            lost = lost.movedim(outputs, 0).reshape(len(weight), -1)
            total, count = total + lost.sum(1), count + lost.shape[1]
            advance(1)
    return cast("Tensor", total / count)
