"""Capturing real calls and real models: the program answers like the model, and the model stays untouched."""

from __future__ import annotations

import collections
import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import fxopt
from fxopt.compare import rounding_tolerance
from fxopt.errors import CaptureError, InputError
from fxopt.frontends.capture import StateWarning, capture
from fxopt.program import Program
from fxopt.testing import assert_equivalent, assert_untouched, model_state

GENERATOR = torch.Generator().manual_seed(0)
IMAGE = torch.randn(2, 3, 8, 8, generator=GENERATOR)
ROW = torch.randn(4, 6, generator=GENERATOR)


def check(model: nn.Module, inputs: Any, *, expect: str | None = None, frontend: Any = "auto") -> Program:
    """Captures, compares in the model's own output structure, and looks whether the model is untouched."""
    state = model_state(model)
    program = capture(model, inputs, frontend=frontend)
    assert_equivalent(model, program, inputs)
    assert_untouched(model, state)
    assert program.frontend == (expect or program.frontend), program.report.notes
    return program


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()


# --------------------------------------------------------------------------------------------------------------- inputs


class Many(nn.Module):
    def forward(
        self, x: torch.Tensor, other: Any = None, *rest: Any, scale: float = 1.0, flag: bool = False, **named: Any
    ) -> torch.Tensor:
        if flag:
            x = -x
        for item in (other, *rest, *named.values()):
            if isinstance(item, dict):
                x = x * item["a"] + item["b"][0]
            elif item is not None:
                x = x + item
        return x * scale


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
@pytest.mark.parametrize(
    "inputs",
    [
        ROW,
        (ROW,),
        [ROW],
        {"x": ROW},
        (ROW, ROW * 2),
        (ROW, ROW * 2, ROW * 3),
        (ROW, None),
        {"x": ROW, "flag": True, "scale": 3.0},
        {"x": ROW, "other": {"a": ROW, "b": [ROW]}},
        {"scale": 2.0, "extra": ROW * 5, "x": ROW},
        (ROW, {"a": ROW, "b": (ROW, 3)}),
    ],
)
def test_inputs_of_all_kinds(inputs: Any, frontend: str) -> None:
    program = check(Many(), inputs, frontend=frontend)
    assert program.batch is not None


def test_a_constant_of_the_call_is_checked_at_the_next_call() -> None:
    program = capture(Many(), {"x": ROW, "flag": True})
    with pytest.raises(InputError, match="flag: was True when the model was captured"):
        program.module(ROW)
    assert torch.equal(program.module(ROW, flag=True), -ROW)


def test_inputs_that_require_gradients_are_only_read() -> None:
    x = ROW.clone().requires_grad_(True)
    program = capture(nn.Linear(6, 2), x)
    assert not program.example_inputs[0].requires_grad
    assert x.requires_grad
    assert x.grad is None


def test_integer_inputs() -> None:
    ids = torch.tensor([[1, 2, 3], [3, 0, 9]])
    model = nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), nn.Linear(12, 2))
    for frontend in ("symbolic", "export"):
        program = check(model, ids, frontend=frontend)
        assert program.module(ids[:1]).shape == (1, 2)


def test_a_bool_mask_and_an_index() -> None:
    class Masked(nn.Module):
        def forward(self, x: torch.Tensor, mask: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
            return x.masked_fill(mask, 0.0)[:, index]

    check(Masked(), (ROW, ROW > 0, torch.tensor([1, 0, 5])))


def test_scalars_and_empty_axes() -> None:
    class Scaled(nn.Module):
        def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            return x * scale

    program = check(Scaled(), (ROW, torch.tensor(2.0)))
    assert program.batch is not None
    assert program.batch.inputs == (0,)
    assert check(Scaled(), (torch.tensor(3.0), torch.tensor(2.0))).batch is None


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((), "do not fit forward"),
        ((IMAGE, IMAGE), "do not fit forward"),
        ({"image": IMAGE}, "do not fit forward"),
        ((torch.zeros(2, 5, 8, 8),), r"the model fails on the example inputs: RuntimeError: .*channels"),
        (("text",), "hold no tensor"),
        (7, "must be a tuple of positional arguments"),
        ((IMAGE.double(),), "the model fails on the example inputs: RuntimeError"),
    ],
)
def test_wrong_inputs_are_input_errors(inputs: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        capture(small(), inputs)


def test_what_is_no_module_is_an_input_error() -> None:
    for subject in (lambda x: x, small, "resnet18", None):
        with pytest.raises(InputError, match=r"model must be an nn\.Module, not"):
            capture(subject, IMAGE)  # type: ignore[arg-type]


def test_frontends_are_checked() -> None:
    with pytest.raises(InputError, match='frontend must be "auto", "symbolic" or "export", not \'dynamo\''):
        capture(small(), IMAGE, frontend="dynamo")  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------------------------- outputs


class Pair(NamedTuple):
    left: Any
    right: Any


@dataclass
class Detections:
    boxes: Any
    scores: Any = None
    note: str = "none"


class ModelOutput(collections.OrderedDict[str, Any]):
    """As transformers' outputs are."""


OUTPUTS: dict[str, Callable[[torch.Tensor], Any]] = {
    "tensor": lambda x: x * 2,
    "tuple": lambda x: (x, x * 2),
    "tuple of one": lambda x: (x * 2,),
    "list": lambda x: [x * 2, [x * 3]],
    "dict": lambda x: {"out": x * 2, "aux": {"deep": x * 3}},
    "OrderedDict": lambda x: collections.OrderedDict(out=x * 2, aux=x * 3),
    "mapping of a class of its own": lambda x: ModelOutput(out=x * 2),
    "namedtuple": lambda x: Pair(x * 2, (x * 3,)),
    "dataclass": lambda x: Detections(x * 2, scores=[x * 3]),
    "None and constants": lambda x: (x * 2, None, {"n": 3, "text": "yes"}),
    "the input itself": lambda x: x,
    "the same tensor twice": lambda x: (y := x * 2, y),
    "the input and a result": lambda x: {"x": x, "y": x + 1},
}


class Nested(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: torch.Tensor) -> Any:
        return OUTPUTS[self.kind](x)


@pytest.mark.parametrize("frontend", ["symbolic", "auto"])
@pytest.mark.parametrize("kind", OUTPUTS)
def test_outputs_of_all_kinds(kind: str, frontend: str) -> None:
    model = Nested(kind)
    program = capture(model, ROW, frontend=frontend)  # type: ignore[arg-type]
    assert type(program.module(ROW)) is type(model(ROW))
    assert_equivalent(model, program, ROW)


@pytest.mark.parametrize(
    "kind", ["tuple", "list", "dict", "OrderedDict", "namedtuple", "None and constants", "tuple of one"]
)
def test_outputs_of_all_kinds_by_export(kind: str) -> None:
    program = capture(Nested(kind), ROW, frontend="export")
    assert_equivalent(Nested(kind), program, ROW)


def test_an_output_that_is_no_tensor_of_the_graph() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.anchors = nn.Parameter(torch.ones(3))

        def forward(self, x: torch.Tensor) -> Any:
            return x * 2, self.anchors

    model = Constant()
    program = capture(model, ROW)
    assert_equivalent(model, program, ROW)


def test_outputs_that_are_not_finite() -> None:
    class Log(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.log(x)

    assert check(Log(), ROW).frontend == "symbolic"
    assert torch.isnan(capture(Log(), ROW).run(ROW)[0]).any()


def test_complex_values() -> None:
    class Spectrum(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.fft.rfft(x, dim=1)

    assert capture(Spectrum(), ROW).run(ROW)[0].is_complex()
    check(Spectrum(), ROW)


# ------------------------------------------------------------------------------------------------------- mode and dtype


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("frontend", ["symbolic", "export"])
def test_dtypes_stay(dtype: torch.dtype, frontend: str) -> None:
    model = small().to(dtype)
    program = check(model, IMAGE.to(dtype), frontend=frontend)
    assert {item.dtype for item in program.module.parameters()} == {dtype}
    assert program.run(IMAGE.to(dtype))[0].dtype == dtype
    assert rounding_tolerance(program.module.parameters()) == rounding_tolerance([torch.zeros(1, dtype=dtype)])


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
def test_training_mode_stays(frontend: str) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 3)
    ).train()
    state = model_state(model)
    program = capture(model, IMAGE, frontend=frontend)  # type: ignore[arg-type]
    assert_untouched(model, state)
    assert program.training
    assert all(module.training for module in program.module.modules())
    before = {name: value.clone() for name, value in program.module.named_buffers()}
    program.module(IMAGE)
    after = dict(program.module.named_buffers())
    assert any(not torch.equal(before[name], after[name]) for name in before if name.endswith("running_mean"))
    assert_untouched(model, state)
    evaluated = copy.deepcopy(model).eval()
    evaluated.load_state_dict(program.module.state_dict())
    torch.testing.assert_close(program.module.eval()(IMAGE), evaluated(IMAGE))


def test_a_frozen_norm_in_a_model_that_trains_stays_frozen() -> None:
    model = small().train()
    model[1].eval()
    program = check(model, IMAGE)
    assert [name for name, module in program.module.named_modules() if name and not module.training] == ["1"]


def test_requires_grad_stays() -> None:
    model = small()
    model[0].weight.requires_grad_(False)
    program = capture(model, IMAGE)
    assert {name: item.requires_grad for name, item in program.module.named_parameters()} == {
        name: item.requires_grad for name, item in model.named_parameters()
    }


def test_parameters_keep_their_names_by_both_frontends() -> None:
    for frontend in ("symbolic", "export"):
        program = capture(small(), IMAGE, frontend=frontend)  # type: ignore[arg-type]
        assert set(program.module.state_dict()) == set(small().state_dict())


def test_the_global_random_state_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5)).train()
    state = torch.get_rng_state()
    capture(model, ROW)
    assert torch.equal(torch.get_rng_state(), state)


# ---------------------------------------------------------------------------------------------------------------- hooks


def test_hooks_take_part_and_stay_the_callers_own() -> None:
    calls: list[str] = []

    def double(_module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
        calls.append("called")
        return output * 2

    def shift(_module: nn.Module, args: Any) -> Any:
        return (args[0] + 1,)

    model = small()
    model[0].register_forward_hook(double)  # a leaf
    model[2].register_forward_pre_hook(shift)
    model.register_forward_hook(double)  # the root
    model.register_forward_pre_hook(shift)
    program = check(model, IMAGE)
    plain = small()
    assert not torch.allclose(plain(IMAGE), program.module(IMAGE))
    count = len(calls)
    program.module(IMAGE)
    assert len(calls) in (count, count + 2)  # traced into the graph, or called with it


def test_removing_a_hook_later_does_not_change_the_program() -> None:
    model = small()
    handle = model[0].register_forward_hook(lambda module, args, output: output * 2)
    program = capture(model, IMAGE)
    before = program.run(IMAGE)[0]
    handle.remove()
    assert torch.equal(program.run(IMAGE)[0], before)


# ---------------------------------------------------------------------------------------------- weights computed in use


NORMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight norm": torch.nn.utils.parametrizations.weight_norm,
    "spectral norm": torch.nn.utils.parametrizations.spectral_norm,
    "orthogonal": torch.nn.utils.parametrizations.orthogonal,
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("training", [False, True])
def test_parametrized_weights(norm: str, training: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(NORMS[norm](nn.Linear(6, 6)), nn.ReLU()).train(training)
    program = check(model, ROW)
    assert program.training == training


def test_the_older_norms() -> None:
    with pytest.warns(FutureWarning):
        model = nn.Sequential(nn.utils.weight_norm(nn.Linear(6, 6)), nn.ReLU()).eval()
    with torch.no_grad():
        model(ROW)  # its weight, a result of the last call, is then no longer tied to a gradient
    program = check(model, ROW)
    assert {"0.weight", "0.bias"} == set(program.module.state_dict())
    check(nn.Sequential(nn.utils.spectral_norm(nn.Linear(6, 6))).eval(), ROW)


def test_the_older_weight_norm_before_its_first_call() -> None:
    with pytest.warns(FutureWarning):
        model = nn.Sequential(nn.utils.weight_norm(nn.Linear(6, 6)), nn.ReLU()).eval()
    check(model, ROW)


# ----------------------------------------------------------------------------------------------------- kinds of modules


def test_tied_weights_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(10, 4)
            self.head = nn.Linear(4, 10, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.embedding(x))

    ids = torch.tensor([[1, 2], [3, 4]])
    for frontend in ("symbolic", "export"):
        program = check(Tied(), ids, frontend=frontend)
        assert program.cost().params == 40
        assert len(list(program.module.parameters())) == 1


def test_a_module_called_twice_stays_one_module() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(torch.relu(self.linear(x)))

    for frontend in ("symbolic", "export"):
        program = check(Twice(), ROW, frontend=frontend)
        calls = [node for node in program.nodes if program.op(node) == "linear"]
        assert len(calls) == 2
        assert program.callers(calls[0]) == calls


def test_a_compiled_model_is_captured_as_the_model_it_was_made_from() -> None:
    program = capture(torch.compile(small()), IMAGE)
    assert_equivalent(small(), program, IMAGE)
    assert set(program.module.state_dict()) == set(small().state_dict())


def test_a_data_parallel_model_is_captured_as_the_model_in_it() -> None:
    program = capture(nn.DataParallel(small()), IMAGE)
    assert set(program.module.state_dict()) == set(small().state_dict())


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning")
def test_a_torchscript_module_is_refused() -> None:
    scripted = torch.jit.trace(small(), IMAGE)
    with pytest.raises(CaptureError, match=r"capture the nn\.Module it was made from"):
        capture(scripted, IMAGE)


@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
def test_a_lazy_module_must_have_been_called() -> None:
    model = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(InputError, match=r"0\.weight is not initialised yet: call the model once"):
        capture(model, ROW)
    model(ROW)
    check(model, ROW)


def test_a_model_that_is_a_single_layer_or_function() -> None:
    for model in (nn.Conv2d(3, 2, 1), nn.ReLU(), nn.Identity(), nn.Softmax(1)):
        program = check(model, IMAGE)
        assert program.run(IMAGE)[0].shape[0] == 2


def test_a_recurrent_layer() -> None:
    model = nn.LSTM(6, 5, batch_first=True)
    check(model, torch.randn(2, 3, 6))


def test_a_model_without_parameters() -> None:
    class Plain(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)

    assert check(Plain(), ROW).cost().params == 0


# ------------------------------------------------------------------------------------------------------------- mutation


def test_a_model_that_writes_into_its_input() -> None:
    class Writes(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x += 1
            return x * 2

    x = ROW.clone()
    program = capture(Writes(), x)
    assert torch.equal(x, ROW)
    assert torch.equal(program.run(x)[0], (ROW + 1) * 2)
    assert torch.equal(program.module(x), (ROW + 1) * 2)
    assert_equivalent(Writes(), program, ROW)


class Counts(nn.Module):
    """A buffer that is written in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count.add_(1)
        return x + self.count * 0.0


def test_a_buffer_written_in_evaluation_mode_is_private_to_the_program() -> None:
    model = Counts().eval()
    state = model_state(model)
    with pytest.warns(
        StateWarning, match="the model keeps state in count: an engine answers every call like the first"
    ):
        program = capture(model, ROW)
    torch.testing.assert_close(program.module(ROW), ROW)
    assert any("keeps state in count" in note for note in program.report.notes)
    assert_untouched(model, state)


class RunningMean(nn.Module):
    """Answers depend on what it has seen so far."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.add_(x.mean())
        return x - self.seen


def test_a_model_whose_answers_depend_on_its_past_is_captured_as_of_its_first_call() -> None:
    with pytest.warns(StateWarning, match="keeps state in seen"):
        program = capture(RunningMean().eval(), ROW)
    torch.testing.assert_close(program.module(ROW), RunningMean()(ROW))


# ---------------------------------------------------------------------------------------------------------------- batch


def test_a_model_tied_to_its_batch_size_is_captured_with_a_note() -> None:
    class Fixed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(2, 192).sum(1)

    program = check(Fixed(), IMAGE)
    assert program.batch is None
    assert program.fixed_batch is not None
    assert program.fixed_batch.startswith("the model takes a batch of 2 and fails on 3")
    assert program.fixed_batch in program.report.notes


def test_a_batch_size_that_the_code_burns_in_is_fixed_and_noted() -> None:
    class Burnt(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(int(x.shape[0]), -1).sum(1)

    program = check(Burnt(), IMAGE)
    assert program.batch is None
    assert any("batch" in note for note in program.report.notes), program.report.notes


def test_a_batch_size_that_the_code_reads_stays_free() -> None:
    class Reads(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(x.shape[0], -1).sum(1)

    for frontend in ("symbolic", "export"):
        assert check(Reads(), IMAGE, frontend=frontend).module(torch.ones(5, 3, 8, 8)).shape == (5,)


def test_the_batch_is_found_in_all_inputs_that_have_it() -> None:
    class Attend(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
            return x @ table.T + y

    program = check(Attend(), (ROW, torch.zeros(4, 3), torch.ones(3, 6)))
    assert program.batch is not None
    assert program.batch == ((0, 1), 4)


# -------------------------------------------------------------------------------------------------- choosing a frontend


class Branches(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.shape[-1] % 2 == 0 and len(x.shape) == 2 else x * 3


class ByValue(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.sum() > 0 else x * 3


def test_control_flow_over_shapes_goes_to_export() -> None:
    class Lengths(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return sum((row for row in x.unbind(1)), start=torch.zeros(len(x))) if len(x) > 0 else x.sum(1)

    program = check(Branches(), ROW, expect="export")
    assert program.frontend == "export"
    assert program.report.notes[0].startswith("captured by export: symbolic: ")
    check(Lengths(), ROW)


def test_control_flow_over_values_is_refused_with_both_reasons() -> None:
    with pytest.raises(CaptureError) as caught:
        capture(ByValue(), ROW)
    message = str(caught.value)
    assert message.startswith("the model could not be captured. symbolic: TraceError")
    assert "; export: " in message


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
def test_a_frontend_asked_for_is_the_only_one_tried(frontend: str) -> None:
    with pytest.raises(CaptureError) as caught:
        capture(ByValue(), ROW, frontend=frontend)  # type: ignore[arg-type]
    other = "export" if frontend == "symbolic" else "symbolic"
    assert f"{frontend}: " in str(caught.value)
    assert f"{other}: " not in str(caught.value)


def test_a_model_that_cannot_be_copied_is_refused() -> None:
    import threading

    model = small()
    model.lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(CaptureError, match="the model cannot be copied, and fxopt never works on yours"):
        capture(model, IMAGE)


def test_opaque_functions_send_auto_to_export() -> None:
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model = torchvision.models.SwinTransformer(
        patch_size=[4, 4], embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=[2, 2], num_classes=3
    ).eval()
    image = torch.randn(1, 3, 32, 32)
    program = check(model, image, expect="export")
    assert program.frontend == "export"
    assert any("shifted_window_attention" in note and "opaque" in note for note in program.report.notes)
    symbolic = capture(model, image, frontend="symbolic")
    assert_equivalent(model, symbolic, image)


def test_a_real_network_answers_alike_at_other_batch_sizes() -> None:
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model = torchvision.models.shufflenet_v2_x0_5(num_classes=5).eval()
    image = torch.randn(1, 3, 32, 32)
    program = check(model, image, expect="symbolic")
    batch = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(program.module(batch), model(batch))


def test_calibration_and_target_are_kept() -> None:
    batches = [(IMAGE, torch.tensor([0, 1]))]
    target = fxopt.Target(device="cpu", instruction_set="AVX2")
    program = capture(small(), IMAGE, calibration=batches, target=target)
    assert program.calibration is batches
    assert program.target is target


# ------------------------------------------------------------------------------------------- what is the caller's stays


class Calling(nn.Module):
    """Calls a function of itself and its input."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, x)


@pytest.mark.parametrize("size", [2, 32])
def test_code_that_branches_on_the_batch_size_fixes_it(size: int) -> None:
    def branch(module: Calling, x: torch.Tensor) -> Any:
        return module.layer(x) * 2 if x.shape[0] > 16 else module.layer(x)

    program = capture(Calling(branch).eval(), torch.randn(size, 6))
    assert program.batch is None
    assert program.fixed_batch is not None
    assert "branches on the batch size" in program.fixed_batch


def test_a_size_among_the_outputs_fixes_the_batch() -> None:
    program = capture(Calling(lambda module, x: {"y": module.layer(x), "n": x.shape[0]}).eval(), torch.randn(4, 6))
    assert program.batch is None
    assert program.module(torch.randn(4, 6))["n"] == 4


def test_a_value_among_the_outputs_is_a_capture_error() -> None:
    with pytest.raises(CaptureError, match="among the outputs is a number that depends on the sizes or values"):
        capture(Calling(lambda module, x: (module.layer(x), x.sum().item())).eval(), torch.randn(4, 6))


def test_random_numbers_of_the_caller_go_on_as_if_nothing_had_been() -> None:
    model, x = Calling(lambda module, x: module.layer(x) + 0 * torch.rand(6)).eval(), torch.ones(4, 6)
    state = torch.get_rng_state()
    capture(model, x)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_hook_that_writes_into_the_callers_model_leaves_no_trace() -> None:
    model = nn.Sequential(nn.Linear(6, 6))
    model.register_buffer("seen", torch.zeros(()))

    def count(*_: Any) -> None:
        model.seen.add_(1)

    model[0].register_forward_hook(count)
    capture(model.eval(), torch.randn(4, 6))
    assert model.seen == 0


def test_a_replaced_forward_that_runs_the_callers_model_is_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))
    forward = model.forward
    model.forward = lambda x: forward(x) * 2  # type: ignore[method-assign]
    with pytest.raises(CaptureError, match="your model's own tensor"):
        capture(model, torch.randn(4, 6))
    assert model[1].num_batches_tracked == 0


def test_a_part_in_training_mode_keeps_its_statistics() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)).eval()
    model[1].train()
    program = capture(model, torch.randn(4, 6))
    assert program.module.state_dict()["1.num_batches_tracked"] == 0
    assert torch.equal(program.module.state_dict()["1.running_mean"], torch.zeros(6))


def test_a_model_made_in_inference_mode_is_captured() -> None:
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)).eval()
        x = torch.randn(4, 6)
        assert torch.equal(capture(model, x).module(x), model(x))


def test_inputs_of_inference_mode_are_exported_too() -> None:
    with torch.inference_mode():
        x = torch.randn(4, 6)
    program = capture(nn.Linear(6, 2).eval(), x, frontend="export")
    assert program.run(x.clone())[0].shape == (4, 2)


def test_example_inputs_without_a_sample_are_refused() -> None:
    with pytest.raises(InputError, match="the example inputs hold no sample, so nothing could be checked"):
        capture(nn.Linear(6, 2), torch.randn(0, 6))


def test_a_model_without_values_is_refused() -> None:
    with pytest.raises(
        InputError, match="weight is on the meta device, where it has no values: load the model's weights"
    ):
        capture(nn.Linear(6, 2, device="meta"), torch.randn(4, 6))


@pytest.mark.parametrize("batch_first", [True, False])
def test_a_transformer_in_training_draws_the_zeros_that_the_model_draws(batch_first: bool) -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first).train()
    program = check(model, torch.randn(3, 5, 8))
    assert any("dropout" in program.op(node) for node in program.nodes)
