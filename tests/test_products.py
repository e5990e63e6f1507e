"""Products of activations with integers: what becomes of attention, and of what stays as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxopt
from fxopt import Program
from fxopt.passes import Quantize
from fxopt.target import Target

ALONE = Quantize(ignore=("qkv", "out"))
"""Quantizes nothing but products, and the first layer, as a program needs one."""


class Attention(nn.Module):
    """Of four heads, in one of the forms in which models write it."""

    def __init__(self, form: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.form = form
        self.embed, self.qkv, self.out = nn.Linear(12, 32), nn.Linear(32, 96), nn.Linear(32, 5)
        self.register_buffer("allowed", torch.rand(9, 9) > 0.3)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        parts = self.qkv(self.embed(x)).view(batch, tokens, 3, 4, 8).permute(2, 0, 3, 1, 4)
        query, key, value = parts.unbind(0)
        if self.form == "matmul":
            shares = (query @ key.transpose(-2, -1) * 8**-0.5).softmax(-1)
            found = shares @ value
        else:
            options: dict[str, Any] = {
                "plain": {},
                "scale": {"scale": 0.5},
                "flags": {"attn_mask": self.allowed},
                "numbers": {"attn_mask": torch.where(self.allowed, 0.0, -3.0)},  # type: ignore[arg-type]
                "causal": {"is_causal": True},
                "dropout": {"dropout_p": 0.5},
            }[self.form]
            found = F.scaled_dot_product_attention(query, key, value, **options)
        out: Tensor = self.out(found.transpose(1, 2).reshape(batch, tokens, 32))
        return out


@pytest.fixture(scope="module")
def batches() -> list[Tensor]:
    return [torch.randn(8, 9, 12, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]


def quantized(model: nn.Module, batches: list[Tensor], pass_: Any) -> Program:
    """As for a target on which integers gain something; weights fit this one."""
    program = fxopt.optimize(model, (batches[0][:2],), ["fold_batch_norm"], calibration=batches, on_no_match="ignore")
    program.scheme = program.scheme._replace(products=True)
    return fxopt.PassManager([pass_]).run(program)


def sqnr(expected: Tensor, found: Tensor) -> float:
    return float(10 * torch.log10(expected.square().sum() / (expected - found).square().sum()))


@pytest.mark.parametrize("form", ["plain", "scale", "flags", "numbers", "causal", "matmul"])
def test_attention_with_integers(form: str, batches: list[Tensor], tmp_path: Path) -> None:
    model = Attention(form).eval()
    program = quantized(model, batches, ALONE)
    products = 1 if form == "matmul" else 2  # of attention, the first is written out in front of the node
    assert sum(program.op(node) == "matmul" for node in program.nodes) == 2
    assert not [node for node in program.nodes if program.op(node) == "scaled_dot_product_attention"]
    decisions = [item for item in program.report.passes[-1].rewrites if "attention" in item.params]
    assert [item.what for item in decisions] == ["uint8 in both products"] * (products - 1)
    fresh = torch.randn(8, 9, 12, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        assert sqnr(model(fresh), program.module(fresh)) > 30
    compiled = fxopt.lower(program, dynamic_batch=form != "flags")
    with torch.no_grad():
        assert sqnr(program.module(fresh[:2]), compiled(fresh[:2])) > 60
    compiled.save(tmp_path / "engine")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(tmp_path / "engine" / "model.onnx", options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert kinds.count("MatMulIntegerToFloat") >= 2
    assert kinds.count("MatMul") <= 2  # the two layers that are ignored


def test_shares_have_the_range_of_the_data() -> None:
    """Of many tokens that look alike, none has a share near 1."""

    class Averaging(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed = nn.Linear(12, 32)

        def forward(self, x: Tensor) -> Tensor:
            y = self.embed(x).unsqueeze(1)
            return F.scaled_dot_product_attention(y, y, y + 1)

    batches = [torch.randn(4, 300, 12, generator=torch.Generator().manual_seed(seed)) / 4 for seed in range(2)]
    program = quantized(Averaging().eval(), batches, Quantize())
    (decision,) = [item for item in program.report.passes[-1].rewrites if "attention" in item.params]
    with torch.no_grad():
        y = Averaging().embed(batches[0])
        largest = float((y @ y.transpose(1, 2) / 32**0.5).softmax(-1).max())
        assert largest < 0.1
        assert decision.params["attention"]["shares"]["scale"] <= largest / 255
        assert sqnr(Averaging()(batches[1]), program.module(batches[1])) > 35


@pytest.mark.parametrize("flags", [True, False])
def test_a_query_for_which_nothing_is_left_gets_zeros(flags: bool) -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed = nn.Linear(12, 32)

        def forward(self, x: Tensor, seen: Tensor) -> Tensor:
            y = self.embed(x).unsqueeze(1)
            mask = (
                seen[:, None, None] if flags else torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)[:, None, None]
            )
            return F.scaled_dot_product_attention(y, y, y, attn_mask=mask)

    x, seen = torch.randn(4, 9, 12, generator=torch.Generator().manual_seed(0)), torch.rand(4, 9) > 0.3
    seen[1] = False
    model, target = Padded().eval(), Target(device="cpu", instruction_set="AVX512 VNNI")
    program = fxopt.optimize(model, (x, seen), ["default", Quantize()], calibration=[(x, seen)], target=target)
    assert any("attention" in item.params for item in program.report.passes[-1].rewrites)
    with torch.no_grad():
        found = program.module(x, seen)
        assert sqnr(model(x, seen), found) > 30
    assert not bool(found[1].any())


def test_golden(batches: list[Tensor]) -> None:
    program = quantized(Attention("causal").eval(), batches, ALONE)
    kinds = [program.op(node) for node in program.nodes]
    start = kinds.index("mul")
    assert kinds[start : kinds.index("transpose", kinds.index("softmax"))] == [
        *("mul", "transpose", "quantize", "dequantize", "quantize", "dequantize"),
        *("matmul", "get_attr", "masked_fill", "softmax", "quantize", "dequantize"),
        *("quantize", "dequantize", "matmul"),
    ]


@pytest.mark.parametrize(
    ("form", "options", "why"),
    [
        ("dropout", {}, "it has a dropout"),
        ("plain", {"ignore": ("scaled_dot_product*",)}, "ignored"),
        ("plain", {"mode": "qat"}, "products train in floating point"),
    ],
)
def test_what_is_left_alone(form: str, options: dict[str, Any], why: str, batches: list[Tensor]) -> None:
    program = fxopt.optimize(Attention(form).eval(), (batches[0],), ["fold_batch_norm"], on_no_match="ignore")
    program.calibration = batches
    program.scheme = program.scheme._replace(products=True)
    (plan,) = fxopt.explain(program, passes=[Quantize(**options)], calibration=batches)
    assert why in [skip.why for skip in plan.skips]


@pytest.mark.parametrize(("instructions", "gains"), [("AVX2", False), ("AVX512", False), ("AVX512 VNNI", True)])
def test_products_stay_where_integers_gain_nothing(instructions: str, gains: bool, batches: list[Tensor]) -> None:
    program = fxopt.optimize(
        Attention("plain").eval(),
        (batches[0],),
        ["fold_batch_norm", "quantize"],
        calibration=batches,
        on_no_match="ignore",
        target=fxopt.Target(instruction_set=instructions),
    )
    why = [skip.why for skip in program.report.passes[-1].skips]
    assert why == ([] if gains else ["it is no faster with integers on this target"])
    assert sum(program.op(node) == "quantize" for node in program.nodes) == (3 + 4 * gains)


def test_a_product_of_a_constant_is_left_alone(batches: list[Tensor]) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(12, 12)
            self.mix = nn.Parameter(torch.randn(9, 9))

        def forward(self, x: Tensor) -> Tensor:
            return self.mix @ self.first(x)

    program = quantized(Mixed().eval(), batches, Quantize())
    assert [skip.why for skip in program.report.passes[-1].skips] == ["its input is a constant"]


def test_products_are_ranked_with_the_layers(batches: list[Tensor]) -> None:
    program = fxopt.optimize(
        Attention("plain").eval(), (batches[0],), ["fold_batch_norm"], calibration=batches, on_no_match="ignore"
    )
    program.scheme = program.scheme._replace(products=True)
    paths = {item.path for item in Quantize().losses(program)}
    assert paths == {"embed", "qkv", "out", "scaled_dot_product_attention"}
