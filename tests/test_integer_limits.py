"""Weights whose products fit into 16 bits in pairs: what the processor does with others, and that ours do."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn

from fxopt.analysis.layer_moments import Moments
from fxopt.analysis.patches import PatchLayer
from fxopt.backend import Backend
from fxopt.integer_limits import IntegerLimits
from fxopt.integer_scheme import Pairs
from fxopt.lowering import OnnxBackend, OpenVinoBackend
from fxopt.rounding import rounded
from fxopt.target import Target

LAYERS: dict[str, nn.Module] = {
    "1 x 1": nn.Conv2d(16, 8, 1),
    "3 x 3": nn.Conv2d(16, 8, 3),
    "odd channels": nn.Conv2d(3, 8, 3),
    "groups": nn.Conv2d(12, 8, 3, groups=4),
    "two outputs a channel": nn.Conv2d(8, 16, 3, groups=8),
    "depthwise": nn.Conv2d(8, 8, 3, groups=8),
    "1-D": nn.Conv1d(5, 8, 3),
    "3-D": nn.Conv3d(4, 8, 3),
    "linear": nn.Linear(33, 8),
}


def added_in_pairs(layer: PatchLayer, products: Tensor, kind: Pairs = "across_places") -> Tensor:
    """The sums that a kernel gets which adds up pairs in 16 bits; products int64[..., D, outputs / groups]."""
    partners = IntegerLimits.of(layer, 8, pairs=kind).partners
    if partners is None:
        return products.sum(-2)
    own = torch.arange(len(partners))
    theirs = products[..., partners, :] * (partners != own).unsqueeze(1)
    return torch.where((own <= partners).unsqueeze(1), (products + theirs).clamp(-(2**15), 2**15 - 1), 0).sum(-2)


def step_of(layer: Any) -> np.float32:
    """1/60 of the largest possible output."""
    return np.float32(layer.weight[0].numel() * 127 * 255 / 60)


def integer_model(layer: Any, codes: Tensor, x: Tensor, *, joined: bool) -> bytes:
    """A layer of integers, from uint8 to uint8 in steps: as one node, or as the pattern that is joined to one."""
    linear = isinstance(layer, nn.Linear)
    weight = codes.to(torch.int8).numpy()
    outputs = len(weight)
    values = {
        "one": np.float32(1),
        "x0": np.uint8(0),
        "w": weight.T.copy() if linear else weight,
        "ws": np.ones(outputs, np.float32),
        "w0": np.zeros(outputs, np.int8),
        "ys": step_of(layer),
        "y0": np.uint8(128),
    }
    how = {} if linear else {"kernel_shape": layer.kernel_size, "group": layer.groups}
    if joined:
        operands = ["x", "one", "x0", "w", "ws", "w0", "ys", "y0"]
        nodes = [helper.make_node("QLinearMatMul" if linear else "QLinearConv", operands, ["y"], **how)]
    else:
        nodes = [
            helper.make_node("DequantizeLinear", ["x", "one", "x0"], ["read"]),
            helper.make_node("DequantizeLinear", ["w", "ws", "w0"], ["weight"], axis=1 if linear else 0),
            helper.make_node("MatMul" if linear else "Conv", ["read", "weight"], ["sums"], **how),
            helper.make_node("QuantizeLinear", ["sums", "ys", "y0"], ["y"]),
        ]
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", onnx.TensorProto.UINT8, x.shape)],
        [helper.make_tensor_value_info("y", onnx.TensorProto.UINT8, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9).SerializeToString()


def sums_of_onnxruntime(layer: Any, codes: Tensor, x: Tensor) -> Any:
    model = integer_model(layer, codes, x, joined=True)
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x.to(torch.uint8).numpy()})[0]


def sums_of_openvino(layer: Any, codes: Tensor, x: Tensor) -> Any:
    reason = OpenVinoBackend().unavailable()
    if reason is not None:
        pytest.skip(reason)
    import openvino

    core = openvino.Core()
    model = core.read_model(integer_model(layer, codes, x, joined=False))
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return compiled(x.to(torch.uint8).numpy())[0]


def simulated(layer: Any, codes: Tensor, x: Tensor, kind: Pairs | None) -> np.ndarray[Any, Any]:
    """What it should give."""
    patch_layer = PatchLayer(layer)
    with torch.no_grad():
        output = layer(x.float())
    matrix = patch_layer.as_matrix(codes)
    rows = patch_layer.patches(x.double(), output, torch.arange(patch_layer.positions(output)))
    products = rows.unsqueeze(3) * matrix.unsqueeze(1)  # [groups, rows, D, outputs / groups]
    sums = products.sum(2) if kind is None else added_in_pairs(patch_layer, products, kind)
    found = sums.transpose(0, 1).reshape(len(x), -1, len(codes))
    found = found if isinstance(layer, nn.Linear) else found.movedim(-1, 1)
    return (found.reshape(output.shape) / step_of(layer)).round().add(128).clamp(0, 255).to(torch.uint8).numpy()


@pytest.mark.parametrize("backend", [OnnxBackend(), OpenVinoBackend()], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_the_processor_computes_as_it_is_modelled(name: str, backend: Backend) -> None:
    layer: Any = LAYERS[name]
    generator = torch.Generator().manual_seed(0)
    picks = torch.tensor([-127, -50, 0, 50, 127])
    codes = picks[torch.randint(0, 5, layer.weight.shape, generator=generator)]
    sizes = [6] * (layer.weight.ndim - 2)
    x = torch.randint(150, 256, (1, layer.weight.shape[1] * getattr(layer, "groups", 1), *sizes), generator=generator)
    kind = backend.scheme(Target.detect()).pairs
    found = {"onnx": sums_of_onnxruntime, "openvino": sums_of_openvino}[backend.name](layer, codes, x)
    np.testing.assert_array_equal(found, simulated(layer, codes, x, kind))
    if kind is not None and name != "depthwise":
        assert (found != simulated(layer, codes, x, None)).any(), "saturation must show, else this shows nothing"


def moments_of(layer: Any) -> Moments:
    patch_layer = PatchLayer(layer)
    generator = torch.Generator().manual_seed(3)
    rows = torch.rand(patch_layer.groups, 500, patch_layer.length, generator=generator, dtype=torch.float64)
    around = rows - rows.mean(1, keepdim=True)
    return Moments(rows.mean(1), around.transpose(1, 2) @ around / 500, 1e-3)


@pytest.mark.parametrize("kind", ["across_places", "within_places"])
@pytest.mark.parametrize("how", ["nearest", "gptq"])
@pytest.mark.parametrize("name", LAYERS)
def test_rounded_weights_fit_and_use_more_than_seven_bits(name: str, how: Any, kind: Pairs) -> None:
    layer: Any = LAYERS[name]
    patch_layer = PatchLayer(layer)
    limits = IntegerLimits.of(patch_layer, 8, pairs=kind)
    found = rounded(patch_layer.weight, limits, moments_of(layer), how=how)
    codes = found.codes.transpose(1, 2).reshape(layer.weight.shape)
    assert torch.equal(limits.fitted(found.codes), found.codes)
    worst = torch.full((patch_layer.length, 1), 255.0, dtype=torch.float64)
    for sign in (1, -1):  # the activations that make the sums largest, and those that make them smallest
        products = (sign * found.codes).clamp(min=0) * worst * sign
        assert torch.equal(added_in_pairs(patch_layer, products, kind), products.sum(-2))
    seven = rounded(patch_layer.weight, IntegerLimits(64), moments_of(layer), how=how)
    assert float(found.scale.mean()) < float(seven.scale.mean())
    assert int(codes.abs().max()) > 64


@pytest.mark.parametrize("name", LAYERS)
def test_weights_that_fit_either_fit_both(name: str) -> None:
    layer: Any = LAYERS[name]
    patch_layer = PatchLayer(layer)
    codes = rounded(patch_layer.weight, IntegerLimits.of(patch_layer, 8, pairs="either"), None).codes
    kinds: tuple[Pairs, ...] = ("across_places", "within_places")
    partners = [IntegerLimits.of(patch_layer, 8, pairs=kind).partners for kind in kinds]
    for kind in kinds:
        assert torch.equal(IntegerLimits.of(patch_layer, 8, pairs=kind).fitted(codes), codes)
    if partners[0] is not None and partners[1] is not None and torch.equal(*partners):
        assert int(codes.abs().max()) > 64, "no bit is given up where engines agree"


def test_of_a_pair_both_give_way_alike() -> None:
    limits = IntegerLimits.of(PatchLayer(nn.Linear(5, 1)), 8, pairs="across_places")
    codes = torch.tensor([127.0, 126.0, 120.0, -120.0, 200.0]).reshape(1, 5, 1)
    assert limits.fitted(codes).reshape(-1).tolist() == [64.0, 64.0, 120.0, -120.0, 127.0]
    assert limits.bounds(0, codes) == (-127, 127)
    low, high = limits.bounds(1, codes)
    assert (int(low), int(high)) == (-127, 1)


def test_weights_of_four_bits_need_no_limits() -> None:
    assert IntegerLimits.of(PatchLayer(nn.Linear(6, 2)), 4, pairs="across_places").partners is None
    assert IntegerLimits.of(PatchLayer(nn.Linear(6, 2)), 8, pairs=None).partners is None
