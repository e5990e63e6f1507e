"""freeze_quantization: integers that give what fake quantization gave, also after training, and kernels that fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxopt
from fxopt import Program
from fxopt.errors import InputError
from fxopt.manager import NoMatchWarning
from fxopt.passes import FreezeQuantization, Quantize

pytestmark = pytest.mark.usefixtures("integers_everywhere")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 1, bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 12),
        nn.ReLU(),
        nn.Linear(12, 5),
    ).eval()


@pytest.fixture(scope="module")
def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(16, 3, 8, 8, generator=generator), torch.randint(0, 5, (16,), generator=generator))
        for _ in range(3)
    ]


def quantized(model: nn.Module, batches: Any, *passes: Any, **options: Any) -> Program:
    return fxopt.optimize(
        model,
        (batches[0][0][:2],),
        ["fold_batch_norm", *passes],
        calibration=batches,
        on_no_match="ignore",
        **options,
    )


@pytest.fixture(scope="module")
def trained(batches: list[tuple[Tensor, Tensor]]) -> nn.Module:
    """A program's module after some steps."""
    module = quantized(network(), batches, Quantize(mode="qat", weight_bits=4)).module.train()
    optimizer = torch.optim.Adam(module.parameters(), 0.003)
    for _ in range(5):
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(module(x), y).backward()
            optimizer.step()
    return module.eval()


def test_a_program_that_was_not_trained_becomes_what_static_quantization_makes(
    batches: list[tuple[Tensor, Tensor]],
) -> None:
    static = quantized(network(), batches, Quantize(weight_bits=4))
    frozen = quantized(network(), batches, Quantize(mode="qat", weight_bits=4), "freeze_quantization")
    assert {"quantized", "batch_norm_folded"} <= frozen.properties
    assert sorted(frozen.op(node) for node in frozen.nodes) == sorted(static.op(node) for node in static.nodes)
    state, expected = frozen.module.state_dict(), static.module.state_dict()
    assert {name for name in state if name.endswith("codes")} == {name for name in expected if name.endswith("codes")}
    for name, tensor in expected.items():
        # the last bias keeps the mean of the outputs, behind layers whose own biases are integers in one and not yet
        # in the other
        assert int((state[name] != tensor).sum()) == 0 or (name == "10.bias.codes" and _apart(state[name], tensor) == 1)
    x = torch.randn(9, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.testing.assert_close(frozen.module(x), static.module(x), rtol=0, atol=5e-5)


def _apart(left: Tensor, right: Tensor) -> int:
    return int((left.long() - right.long()).abs().max())


def test_an_engine_computes_what_was_trained(
    trained: nn.Module, batches: list[tuple[Tensor, Tensor]], tmp_path: Path
) -> None:
    import onnx
    import onnxruntime

    compiled = fxopt.compile(trained, (batches[0][0][:2],), passes=["freeze_quantization"], backend="onnx")
    x = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = trained(x)
    error = (compiled(x) - expected).square().sum() / expected.square().sum()
    assert error < 1e-3  # numbers between two integers go either way
    compiled.save(tmp_path / "engine")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    path = tmp_path / "engine" / "model.onnx"
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert kinds.count("QLinearConv") == 3
    assert kinds.count("QGemm") == 2
    assert "Conv" not in kinds
    assert "Gemm" not in kinds


def test_convolutions_give_the_same_to_the_last_bit(batches: list[tuple[Tensor, Tensor]]) -> None:
    model = network()[:6]
    module = quantized(model, batches, Quantize(mode="qat", weight_bits=4)).module
    program = fxopt.optimize(module, (batches[0][0][:2],), ["freeze_quantization"])
    (report,) = program.report.passes
    assert report.max_abs_error == 0
    assert not report.skips
    with torch.no_grad():
        assert torch.equal(module(batches[1][0]), program.module(batches[1][0]))


def test_what_is_made_of_each(trained: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    program = fxopt.optimize(trained, (batches[0][0][:2],), ["freeze_quantization"])
    (report,) = program.report.passes
    texts = [rewrite.what for rewrite in report.rewrites]
    assert sum(text.startswith("uint8 from ") for text in texts) == 8
    assert texts[-5:] == [f"4-bit weights of {path}" for path in (0, 3, 5, 8, 10)]
    kinds = [program.op(node) for node in program.nodes]
    assert not {"fake_quantize", "fake_quantized_weight"} & set(kinds)
    assert kinds.count("quantize") == kinds.count("dequantize") == 8
    assert kinds.count("quantized_tensor") == 7  # five weights and the biases of two linear layers
    codes = {name: value for name, value in program.module.named_buffers() if name.endswith("codes")}
    assert all(int(value.abs().max()) <= 7 for value in codes.values() if value.dtype == torch.int8)
    assert sum(value.dtype == torch.int32 for value in codes.values()) == 2


def test_weights_of_several_layers_and_masks(batches: list[tuple[Tensor, Tensor]]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 3, 3, padding=1), nn.ReLU())
    model[2].weight = model[0].weight
    model = nn.Sequential(*model, nn.Conv2d(3, 8, 3), nn.ReLU()).eval()
    module = quantized(model, batches, "prune_weights(ignore=('0', '2'))", Quantize(mode="qat")).module
    program = fxopt.optimize(module, (batches[0][0][:2],), ["freeze_quantization"])
    held: Any = [item for item in program.nodes if program.op(item) == "quantized_tensor"]
    assert [len(item.users) for item in held] == [2, 1]
    with torch.no_grad():
        torch.testing.assert_close(program.module(batches[0][0]), module(batches[0][0]), rtol=0, atol=1e-5)
    pruned: Any = program.module_of(held[1])
    assert float((pruned.codes == 0).float().mean()) >= 0.5


def test_a_program_without_fake_quantization_is_left_alone(batches: list[tuple[Tensor, Tensor]]) -> None:
    with pytest.warns(NoMatchWarning, match="freeze_quantization changed nothing"):
        program = fxopt.optimize(network(), (batches[0][0],), ["freeze_quantization"])
    assert not any(program.op(node) == "quantize" for node in program.nodes)


def test_integers_that_the_target_does_not_multiply_are_refused(batches: list[tuple[Tensor, Tensor]]) -> None:
    def target(instructions: str) -> fxopt.Target:
        return fxopt.Target(device="cpu", instruction_set=instructions)

    vnni = quantized(network(), batches, Quantize(mode="qat"), target=target("AVX512 VNNI")).module
    example = (batches[0][0][:2],)
    with pytest.raises(
        InputError,
        match=r"^0 was trained for weights of 8 bits, and the kernels of this target multiply those of 7: "
        "pass target= to quantize as to compile, and train for it$",
    ):
        fxopt.optimize(vnni, example, ["freeze_quantization"], target=target("AVX2"))
    assert (
        fxopt.optimize(vnni, example, ["freeze_quantization"], target=target("AVX512 VNNI")).report.passes[0].rewrites
    )
    cuda = fxopt.Target(device="cuda", instruction_set="SM 9.0")
    with pytest.raises(InputError, match="was trained for uint8, and the kernels of this target multiply int8"):
        fxopt.optimize(vnni, example, ["freeze_quantization"], target=cuda)


def test_it_has_no_options() -> None:
    assert str(FreezeQuantization()) == "freeze_quantization"
