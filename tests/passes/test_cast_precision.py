from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxopt
from fxopt import BackendError, Program, Rewrite, Skip, edit
from fxopt.compare import compare
from fxopt.errors import PipelineError
from fxopt.frontends.capture import capture
from fxopt.manager import NoMatchWarning, PassManager
from fxopt.passes import CastPrecision
from fxopt.passes_base import Plan
from fxopt.testing import assert_equivalent, assert_pass, assert_skips
from fxopt.verify import Reference, in_double

HALF = 2e-2
"""Relative error that float16 is allowed, as in `fxopt.compare`."""


class Calls(nn.Module):
    """A function as a model, with its modules as attributes."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


def convolutional() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, groups=2),
        nn.Hardswish(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
        nn.Softmax(-1),
    ).eval()


def transformer() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, activation="gelu", batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


def recurrent() -> nn.Module:
    torch.manual_seed(0)
    parts = {
        "embedding": nn.Embedding(10, 8),
        "lstm": nn.LSTM(8, 6, batch_first=True),
        "gru": nn.GRU(6, 6, batch_first=True),
        "head": nn.Linear(6, 4),
    }

    def forward(self: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
        values, (state, _) = self.lstm(self.embedding(tokens))
        return self.head(self.gru(values)[0]), state

    return Calls(forward, **parts).eval()


def cast(model: nn.Module, inputs: Any, spec: str = "cast_precision", **options: Any) -> Program:
    return fxopt.optimize(model, inputs, [spec], **options)


def kinds(program: Program) -> dict[str, str]:
    """The last word of each line, by node: "f16[2, 3]"."""
    lines = [line.strip() for line in program.text().splitlines() if " : " in line]
    return {line.split(" = ")[0].removeprefix("%"): line.rpartition(" : ")[2] for line in lines}


def casts(program: Program) -> list[str]:
    return [node.name for node in program.nodes if program.op(node) == "to"]


def test_a_chain_is_cast_where_the_precision_changes_and_nowhere_else() -> None:
    x = torch.randn(2, 3, 8, 8)
    program = assert_pass(
        CastPrecision(),
        convolutional(),
        x,
        rewrites=3,
        skips=[],
        tolerance=HALF,
        after="""
            %input_1 = input : f32[2, 3, 8, 8]
            %input_1_cast = to(%input_1, float16) : f16[2, 3, 8, 8]
            %_0 = conv2d[0](%input_1_cast) {3, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1)} : f16[2, 8, 8, 8]
            %_1 = relu[1](%_0) : f16[2, 8, 8, 8]
            %_2 = max_pool2d[2](%_1) {kernel_size=2, stride=2, padding=0, dilation=1, ceil_mode=False} : f16[2, 8, 4, 4]
            %_3 = conv2d[3](%_2) {8, 8, kernel_size=(3, 3), stride=(1, 1), groups=2} : f16[2, 8, 2, 2]
            %_4 = hardswish[4](%_3) : f16[2, 8, 2, 2]
            %_4_cast = to(%_4, float32) : f32[2, 8, 2, 2]
            %_5 = adaptive_avg_pool2d[5](%_4_cast) {output_size=1} : f32[2, 8, 1, 1]
            %_6 = flatten[6](%_5) {start_dim=1, end_dim=-1} : f32[2, 8]
            %_6_cast = to(%_6, float16) : f16[2, 8]
            %_7 = linear[7](%_6_cast) {in_features=8, out_features=4, bias=True} : f16[2, 4]
            %_7_cast = to(%_7, float32) : f32[2, 4]
            %_8 = softmax[8](%_7_cast) {dim=-1} : f32[2, 4]
            return (%_8,)
        """,
    )
    (report,) = cast(convolutional(), x).report.passes
    assert report.after.bytes * 2 == report.before.bytes
    assert report.after.params == report.before.params
    assert all(parameter.dtype is torch.float16 for parameter in program.module.parameters())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("build", [convolutional, transformer])
def test_the_rewrites_may_come_in_any_order(build: Callable[[], nn.Module], dtype: Any) -> None:
    x = torch.randn(2, 3, 8, 8) if build is convolutional else torch.randn(2, 5, 16)
    program = capture(build(), (x,))
    pass_ = CastPrecision(dtype=dtype)
    plan = Plan.of(pass_, program)
    texts = []
    for rewrites in (plan.rewrites, plan.rewrites[::-1]):
        rewritten = program.copy()
        for rewrite in rewrites:
            pass_.apply(rewritten, rewrite)
            assert_equivalent(program, rewritten, (x,), tolerance=6e-2, flat=True)
        edit.clean(rewritten)
        texts.append(rewritten.text())
    assert texts[0].count(" to(") == texts[1].count(" to(")
    assert sorted(line.rpartition(" : ")[2] for line in texts[0].splitlines()) == sorted(
        line.rpartition(" : ")[2] for line in texts[1].splitlines()
    )


@pytest.mark.parametrize("backend", ["eager", "onnx"])
@pytest.mark.parametrize("keep_io", [True, False])
@pytest.mark.parametrize("build", [convolutional, transformer, recurrent])
def test_engines_answer_like_the_model(
    build: Callable[[], nn.Module], keep_io: bool, backend: str, tmp_path: Path
) -> None:
    model = build()
    given: dict[Any, Tensor] = {
        convolutional: torch.randn(2, 3, 8, 8),
        transformer: torch.randn(2, 5, 16),
        recurrent: torch.randint(0, 10, (2, 5)),
    }
    x = given[build]
    compiled = fxopt.compile(model, (x,), passes=["default", CastPrecision(keep_io=keep_io)], backend=backend)
    expected = model(x) if isinstance(model(x), tuple) else (model(x),)
    low = x if keep_io or not x.is_floating_point() else x.half()
    compiled.save(tmp_path / "engine")
    for engine in (compiled, fxopt.load(tmp_path / "engine")):
        answers = engine(low)
        for answer, wanted in zip(answers if isinstance(answers, tuple) else (answers,), expected, strict=True):
            assert answer.dtype is (torch.float32 if keep_io else torch.float16)
            assert compare([wanted], [answer.float()]).within(HALF)


def test_bfloat16_runs_in_torch_and_onnx_runtime_says_what_to_do() -> None:
    model, x = transformer(), torch.randn(2, 5, 16)
    compiled = fxopt.compile(model, (x,), passes=["cast_precision(dtype='bfloat16')"], backend="eager")
    assert compare([model(x)], [compiled(x)]).within(6e-2)
    with pytest.raises(BackendError, match=r"no kernels for bfloat16.* use cast_precision\(dtype=\"float16\"\)"):
        fxopt.compile(model, (x,), passes=["cast_precision(dtype='bfloat16')"], backend="onnx")


def test_low_inputs_and_outputs_hold_through_later_passes_and_calibration() -> None:
    model, x = convolutional(), torch.randn(2, 3, 8, 8)
    batches = [(torch.randn(4, 3, 8, 8),)]
    passes = ["cast_precision(keep_io=False)", "simplify", "reestimate_batch_norm", "prune_weights(criterion='wanda')"]
    program = fxopt.optimize(model, (x,), passes, calibration=batches, on_no_match="ignore", on_failure="raise")
    assert program.io_dtype is torch.float16
    assert program.example_inputs[0].dtype is torch.float16
    assert kinds(program)["input_1"] == "f16[2, 3, 8, 8]"
    assert program.run(x.half())[0].dtype is torch.float16
    assert [len(report.rewrites) for report in program.report.passes] == [4, 0, 0, 3]
    structure = fxopt.optimize(model, (x,), ["cast_precision(keep_io=False)"], verify="structure", on_failure="raise")
    assert structure.text().splitlines()[-2].endswith(": f16[2, 4]")


def test_what_is_low_on_both_sides_is_added_low_and_what_is_not_in_float32() -> None:
    parts = {"one": nn.Linear(4, 4), "two": nn.Linear(4, 4), "norm": nn.LayerNorm(4)}

    def forward(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        low = torch.relu(self.one(x) + self.two(x))
        return self.one(low), self.norm(x) + self.two(low)

    program = cast(Calls(forward, **parts).eval(), torch.randn(2, 4))
    found = kinds(program)
    assert found["add"] == found["relu"] == "f16[2, 4]"
    assert found["add_1"] == "f32[2, 4]"
    # the input once, and three results that float32 reads
    assert len([name for name in casts(program) if found[name].startswith("f16")]) == 1
    assert len(casts(program)) == 3


def test_a_layer_called_twice_keeps_one_weight_and_tied_weights_stay_tied() -> None:
    embedding, head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
    head.weight = embedding.weight
    parts = {"embedding": embedding, "head": head, "twice": nn.Linear(4, 4)}
    model = Calls(lambda self, i: self.head(self.twice(self.twice(self.embedding(i)))), **parts).eval()
    program = assert_pass(CastPrecision(), model, torch.randint(0, 10, (2, 3)), rewrites=2, tolerance=HALF)
    assert [
        str(rewrite)
        for rewrite in PassManager(["cast_precision"]).explain(capture(model, (torch.zeros(2, 3).long(),)))[0].rewrites
    ] == [
        "embedding: run embedding and 1 that share its weights in float16",
        "twice: run twice and 1 that share its weights in float16",
    ]
    assert program.cost().bytes == 2 * (40 + 20)
    modules: Any = program.module
    assert modules.embedding.weight is modules.head.weight


def test_weights_tied_to_what_stays_keep_all_in_float32() -> None:
    embedding, head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
    head.weight = embedding.weight
    model = Calls(lambda self, i: self.head(self.embedding(i)), embedding=embedding, head=head).eval()
    tokens = torch.randint(0, 10, (2, 3))
    assert_skips(
        CastPrecision(ignore=("head",)),
        model,
        tokens,
        [Skip("embedding", "it shares weights with head, which stays as it is"), Skip("head", "ignored")],
    )
    reads = Calls(lambda self, i: self.embedding(i) * self.embedding.weight.sum(), embedding=embedding).eval()
    assert_skips(CastPrecision(), reads, tokens, ["its weight is also read by sum_1"])


def test_weights_that_do_not_fit() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        model[0].weight[0, 0] = 1e5
        model[1].weight[:, :2] = 1e-9
        model[2].weight[0, 0] = 1e-9
    assert_pass(
        CastPrecision(),
        model.eval(),
        torch.zeros(2, 4),
        rewrites=1,
        skips=[
            Skip("_0", "a weight of it is 1e+05, and the largest float16 is 65504"),
            Skip("_1", "50% of its weights would vanish in float16"),
        ],
        tolerance=HALF,
    )
    assert_pass(CastPrecision(dtype="bfloat16"), model, torch.zeros(2, 4), rewrites=3, skips=[])


def test_values_that_do_not_fit_are_found_on_the_calibration_data() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(4) * 100)
        model[2].weight.copy_(torch.eye(4) / 100)
    x = torch.ones(2, 4)
    assert len(cast(model, x).report.passes[0].rewrites) == 2
    reason = "its {} reaches 1e+05, and the largest float16 is 65504"
    assert_skips_with(model, x, [torch.ones(2, 4) * 1000], [reason.format("output"), reason.format("input")])


def assert_skips_with(model: nn.Module, x: Tensor, calibration: list[Tensor], whys: list[str]) -> None:
    assert_pass(CastPrecision(), model, x, rewrites=0, skips=whys, calibration=calibration)


def test_values_that_are_too_small_are_found_on_the_calibration_data() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.LayerNorm(8, eps=1e-30), nn.Linear(8, 4)).eval()
    x = 1e-9 * torch.randn(4, 8)
    program = fxopt.optimize(model, (x,), [CastPrecision()], calibration=[x])
    (skip,) = (skip for skip in program.report.passes[0].skips if skip.node == "_0")
    assert re.fullmatch(r"its input never exceeds \S+e-09, where float16 has fewer than 8 bits", skip.why)
    with torch.no_grad():
        assert compare((model(x),), (program.module(x),)).sqnr_db > 50


def test_an_activation_whose_bounds_are_too_large_stays_in_float32() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Hardtanh(0, 1e6), nn.Conv2d(8, 4, 1)).eval()
    program = fxopt.optimize(model, (torch.randn(2, 3, 8, 8),), [CastPrecision()])
    assert [item.node for item in program.report.passes[0].rewrites] == ["_0", "_2"]


def test_an_operator_whose_result_is_too_large_stays_in_float32() -> None:
    model = Calls(lambda self, x: self.one(x) * self.one(x), one=nn.Linear(4, 4)).eval()
    with torch.no_grad():
        model.one.weight.copy_(torch.eye(4) * 400)  # type: ignore[operator,union-attr]
    program = cast(model, torch.ones(2, 4))
    assert kinds(program)["mul"] == "f32[2, 4]"
    assert len(program.report.passes[0].rewrites) == 1


@pytest.mark.parametrize(
    ("function", "low"),
    [
        (lambda x: x + 1e-8, False),
        (lambda x: x + 1e-2, True),
        (lambda x: x.masked_fill(x > 0, float("-inf")), True),
        (lambda x: x.masked_fill(x > 0, -1e9), False),
        (lambda x: torch.where(x > 0, x, torch.finfo(torch.float32).min), False),
        (lambda x: x.clamp(-1, 1), True),
        (lambda x: F.pad(x, (1, 1), value=-1e9), False),
        (lambda x: F.pad(x, (1, 1)), True),
        (lambda x: x.exp(), False),
        (lambda x: x**2, False),
        (lambda x: x.cumsum(1), False),
        (lambda x: x.mean(1), False),
        (lambda x: F.leaky_relu(x, 0.1), True),
        (lambda x: torch.cat([x, x], 1), True),
        (lambda x: x.reshape(-1, 2), True),
        (lambda x: F.gelu(x), True),
        (lambda x: x.chunk(2, 1)[1], True),
    ],
)  # fmt: skip
def test_which_operators_follow_their_operands(function: Callable[[Tensor], Tensor], low: bool) -> None:
    model = Calls(lambda self, x: function(self.one(x)), one=nn.Linear(4, 4)).eval()
    program = cast(model, torch.randn(2, 4), on_failure="raise")
    value: Any = program.nodes[-1].args[0]
    assert (value[0].target is fxopt.ops.cast) is low
    assert kinds(program)[value[0].name].startswith("f32")


def test_casts_of_the_model_are_kept() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return torch.relu(self.two(self.one(x).to(torch.float32) + 1.0)).float()

    program = cast(Calls(forward, one=nn.Linear(4, 4), two=nn.Linear(4, 4)).eval(), torch.randn(2, 4))
    found = kinds(program)
    assert found["to"] == found["add"] == "f32[2, 4]"
    assert program.node("to").args[0] is program.node("one")
    assert found["relu"] == "f16[2, 4]"
    assert program.node("float_1").args[0] is program.node("relu")
    assert len(casts(program)) == 4 - 1  # the input, what the model casts, and what follows it


def test_buffers_and_parameters_that_meet_low_values_are_cast_ahead() -> None:
    parts = {"one": nn.Linear(4, 4), "shift": torch.ones(4), "scale": nn.Parameter(torch.ones(4) * 0.5)}
    model = Calls(lambda self, x: (self.one(x) + self.shift) * self.scale, **parts).eval()
    program = cast(model, torch.randn(2, 4), on_failure="raise")
    assert {name: item.dtype for name, item in program.module.state_dict().items()} == dict.fromkeys(
        model.state_dict(), torch.float16
    )
    assert len(casts(program)) == 2
    twice = Calls(lambda self, x: (self.one(x) + self.shift, x + self.shift), **parts).eval()
    state = cast(twice, torch.randn(2, 4), on_failure="raise").module.state_dict()
    assert (state["shift"].dtype, state["shift_float16"].dtype) == (torch.float32, torch.float16)


def test_numbers_that_stand_for_minus_infinity_in_an_attention_mask() -> None:
    mask = torch.zeros(5, 5)
    mask[:, 3:] = torch.finfo(torch.float32).min
    mask[2] = torch.finfo(torch.float32).min
    model = Calls(lambda self, x: F.scaled_dot_product_attention(x, x, x, attn_mask=self.mask), mask=mask).eval()
    x = torch.randn(2, 2, 5, 4)
    for dtype in ("float16", "bfloat16"):
        program = assert_pass(CastPrecision(dtype=dtype), model, x, rewrites=1, skips=[])  # type: ignore[arg-type]
        (answer,), expected = program.run(x), model(x)
        assert answer.isfinite().all()
        rows = [0, 1, 3, 4]  # the other attends to nothing, and what it answers depends on rounding
        assert compare([expected[:, :, rows]], [answer[:, :, rows]]).within(6e-2)
    infinite = Calls(model.function, mask=mask.clamp(min=-1).masked_fill(mask < -1, float("-inf"))).eval()  # type: ignore[arg-type]
    infinite.mask[2] = 0.0  # type: ignore[operator]
    assert_pass(CastPrecision(), infinite, x, rewrites=1, skips=[], tolerance=HALF)


def test_what_has_another_type_already() -> None:
    x = torch.randn(2, 4)
    linear = nn.Linear(4, 4).eval()
    assert_skips(CastPrecision(), linear.half(), x.half(), ["it computes in float16 already"])
    assert_skips(CastPrecision(), linear.double(), x.double(), ["it computes in float64, not float32"])
    product = Calls(lambda self, a: a @ a.mT).eval()
    assert_skips(CastPrecision(), product, x.to(torch.complex64), ["it computes in complex64, not float32"])
    assert_skips(CastPrecision(), product, torch.ones(2, 4).long(), ["it computes in int64, not float32"])
    with pytest.warns(NoMatchWarning, match="changed nothing: .*: it computes in float16 already"):
        cast(nn.Linear(4, 4).half().eval(), x.half(), "cast_precision(keep_io=False)")
    with pytest.raises(PipelineError, match="the program has no node it applies to"):
        cast(nn.ReLU(), x, on_no_match="error")


def test_a_second_run_has_nothing_to_do() -> None:
    program = cast(transformer(), torch.randn(2, 5, 16))
    plan = Plan.of(CastPrecision(), program)
    assert not plan.rewrites
    assert {skip.why for skip in plan.skips} == {"it computes in float16 already"}


def test_training_goes_through_the_casts_and_dropout_stays_random() -> None:
    model = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.ReLU(), nn.Linear(64, 3)).train()
    program = assert_pass(CastPrecision(), model, torch.randn(8, 4), rewrites=2, tolerance=HALF)
    assert kinds(program)["_1"] == "f16[8, 64]"
    module = program.module
    x = torch.randn(8, 4)
    assert not torch.equal(module(x), module(x))
    module(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_exact_passes_behind_it_are_proven_in_float64() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Identity(), nn.Linear(4, 4)).eval()
    program = fxopt.optimize(model, torch.randn(2, 4), ["cast_precision", "simplify"], on_failure="raise")
    assert len(program.report.passes[1].rewrites) == 1
    scaled = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(64, 4)).eval()
    low = cast(scaled, torch.randn(2, 3, 4, 4))
    double = in_double(low)
    assert Reference.of(double).outputs[0][0].dtype is torch.float64
    assert not any(value.startswith("f16") for value in kinds(double).values())


def test_a_plan_replays_on_another_checkpoint() -> None:
    x = torch.randn(2, 3, 8, 8)
    plan = Plan.of(CastPrecision(), capture(convolutional(), (x,)))
    other = convolutional()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    program = capture(other, (x,))
    for rewrite in plan.rewrites:
        CastPrecision().apply(program, Rewrite(rewrite.node, rewrite.what, dict(rewrite.params)))
    assert compare([other(x)], list(program.run(x))).within(HALF)


def test_ignored_layers_and_operators() -> None:
    program = assert_pass(CastPrecision(ignore=("3", "1")), convolutional(), torch.randn(2, 3, 8, 8), skips=["ignored"])
    assert kinds(program)["_1"].startswith("f32")
    assert kinds(program)["_3"].startswith("f32")
    assert kinds(program)["_0"].startswith("f16")


def test_options() -> None:
    with pytest.raises(ValueError, match="dtype must be one of 'float16', 'bfloat16', not 'half'"):
        CastPrecision(dtype="half")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="keep_io must be True or False, not 1"):
        CastPrecision(keep_io=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ignore must be a tuple"):
        CastPrecision(ignore="head")  # type: ignore[arg-type]
    assert str(CastPrecision(dtype="bfloat16")) == "cast_precision(dtype='bfloat16')"
