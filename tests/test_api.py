"""The whole flow: compile, optimize, capture, explain, save and load."""

from __future__ import annotations

import copy
import pickle
import threading
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from torch import nn

import fxopt
from fxopt import BackendError, BackendUnavailable, InputError, NoMatchWarning, PipelineError, RegistryError
from fxopt.backend import FixedBatchWarning
from fxopt.lowering import EagerBackend
from fxopt.passes import FoldBatchNorm
from fxopt.testing import assert_untouched, model_state
from tests.conftest import NewProcess

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Output(NamedTuple):
    logits: torch.Tensor
    features: dict[str, torch.Tensor]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Linear(4, 5)

    def forward(self, image: torch.Tensor, scale: float = 1.0) -> Output:
        features = self.body(image) * scale
        return Output(self.head(features.mean((2, 3))), {"last": features})


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    net = Net().eval()
    nn.init.uniform_(net.body[1].running_mean, -1, 1)
    return net


def check(compiled: Any, model: nn.Module, image: torch.Tensor) -> None:
    answer, expected = compiled(image), model(image)
    assert type(answer).__name__ == "Output"
    torch.testing.assert_close(answer.logits, expected.logits, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(answer.features["last"], expected.features["last"], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("backend", ["onnx", "eager"])
def test_compile_answers_like_the_model_and_leaves_it_alone(model: nn.Module, backend: str) -> None:
    state = model_state(model)
    compiled = fxopt.compile(model, IMAGE, backend=backend)
    for size in (2, 1, 7):
        check(compiled, model, torch.randn(size, 3, 8, 8))
    assert_untouched(model, state)
    assert [item.name for item in compiled.report.passes] == ["simplify", "fold_batch_norm", "merge_branches"]
    assert compiled.report.passes[1].rewrites
    assert "image" in repr(compiled)


def test_without_inputs_the_first_call_compiles(model: nn.Module) -> None:
    compiled = fxopt.compile(model, backend="eager", passes=["fold_batch_norm"])
    assert repr(compiled) == "<Compiled: captured at the first call>"
    for attempt in (lambda: compiled.report, lambda: compiled.engine, lambda: compiled.save("nowhere")):
        with pytest.raises(InputError, match="not compiled yet: call it once"):
            attempt()
    check(compiled, model, IMAGE)
    engine = compiled.engine
    check(compiled, model, IMAGE[:1])
    assert compiled.engine is engine
    assert len(compiled.report.passes[0].rewrites) == 1


def test_first_calls_at_the_same_time_compile_once(model: nn.Module) -> None:
    compiled = fxopt.compile(model, backend="eager")
    engines: list[Any] = []

    def call() -> None:
        compiled(IMAGE)
        engines.append(compiled.engine)

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(engines) == 4
    assert len({id(engine) for engine in engines}) == 1


def test_save_and_load(model: nn.Module, tmp_path: Path, new_process: NewProcess) -> None:
    compiled = fxopt.compile(model, IMAGE)
    compiled.save(tmp_path / "out")
    loaded = fxopt.load(tmp_path / "out")
    check(loaded, model, IMAGE)
    assert loaded.report.to_json() == compiled.report.to_json()
    torch.save(IMAGE, tmp_path / "image.pt")
    text = new_process.code(
        "import torch, fxopt, sys\n"
        f"answer = fxopt.load({str(tmp_path / 'out')!r})(torch.load({str(tmp_path / 'image.pt')!r}))\n"
        "print(type(answer).__name__, tuple(answer.logits.shape), float(answer.features['last'].sum()))\n"
    )
    name, rest = text.split(" ", 1)
    assert name == "Output"
    assert rest.startswith("(2, 5)")
    assert float(rest.split(") ")[1]) == pytest.approx(model(IMAGE).features["last"].sum().item(), rel=1e-3)


def test_wrong_calls_of_an_engine_are_input_errors(model: nn.Module) -> None:
    compiled = fxopt.compile(model, IMAGE)
    for args in [(), (IMAGE, IMAGE), ("image",), (IMAGE.double(),), (IMAGE[:, :2],), (IMAGE, 2.0)]:
        with pytest.raises(InputError):
            compiled(*args)
    check(compiled, model, IMAGE)


def test_a_fixed_batch_if_asked(model: nn.Module) -> None:
    compiled = fxopt.compile(model, IMAGE, dynamic_batch=False)
    check(compiled, model, IMAGE)
    with pytest.raises(InputError):
        compiled(IMAGE[:1])


def test_optimize_gives_a_module_that_trains(model: nn.Module) -> None:
    program = fxopt.optimize(model, IMAGE, ["fold_batch_norm"])
    assert len(program.report.passes[0].rewrites) == 1
    module = program.module.train()
    module(IMAGE).logits.sum().backward()
    assert all(item.grad is not None for item in module.parameters())
    assert all(item.grad is None for item in model.parameters())


def test_one_program_is_lowered_to_several_engines(model: nn.Module, tmp_path: Path) -> None:
    program = fxopt.optimize(model, IMAGE, ["fold_batch_norm"])
    before = str(program)
    for backend in ("eager", "onnx"):
        compiled = fxopt.lower(program, backend=backend)
        check(compiled, model, IMAGE)
        check(compiled, model, IMAGE[:1])
        assert [item.name for item in compiled.report.passes] == ["fold_batch_norm"]
        compiled.save(tmp_path / backend)
        check(fxopt.load(tmp_path / backend), model, IMAGE)
    assert str(program) == before
    with pytest.raises(InputError, match="shape"):
        fxopt.lower(program, backend="eager", dynamic_batch=False)(IMAGE[:1])
    trains = fxopt.capture(model.train(), IMAGE)
    with pytest.raises(BackendError, match=r"body\.1 is in training mode"):
        fxopt.lower(trains)


class OfTwo(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(2, 3, 64).sum(-1)


def test_a_fixed_batch_is_told_where_it_was_asked_for() -> None:
    told = "takes the batch size of the example inputs only: .*fails on 3"
    with pytest.warns(FixedBatchWarning, match=told) as compiling:
        fxopt.compile(OfTwo(), IMAGE, backend="eager")
    program = fxopt.capture(OfTwo(), IMAGE)
    with pytest.warns(FixedBatchWarning, match=told) as lowering:
        fxopt.lower(program, backend="eager")
    assert [warning.filename for warning in (*compiling, *lowering)] == [__file__, __file__]


def test_capture_does_nothing_to_the_model(model: nn.Module) -> None:
    program = fxopt.capture(model, {"image": IMAGE, "scale": 2.0})
    assert program.report.passes == []
    assert torch.equal(program.module(IMAGE, scale=2.0).logits, model(IMAGE, 2.0).logits)
    assert program.text().startswith("%image = input : f32[2, 3, 8, 8]")


def test_explain_takes_models_and_programs_and_applies_nothing(model: nn.Module) -> None:
    state = model_state(model)
    plans = fxopt.explain(model, IMAGE)
    assert [plan.name for plan in plans] == ["simplify", "fold_batch_norm", "merge_branches"]
    assert [rewrite.node for rewrite in plans[1].rewrites] == ["body_1"]
    assert_untouched(model, state)
    program = fxopt.capture(model, IMAGE)
    text = program.text()
    (plan,) = fxopt.explain(program, passes=[FoldBatchNorm()])
    assert plan == fxopt.explain(program, passes="fold_batch_norm")[0]
    with pytest.raises(InputError, match=r"a program has its example inputs: write explain\(program, passes=\.\.\.\)"):
        fxopt.explain(program, ["fold_batch_norm"])
    assert program.text() == text


def test_a_model_in_training_mode_is_not_compiled_for_inference(model: nn.Module) -> None:
    with pytest.raises(
        BackendError, match=r"body\.1 is in training mode, and onnx runs inference: call model\.eval\(\)"
    ):
        fxopt.compile(model.train(), IMAGE)


def test_training_mode_without_layers_that_depend_on_it_is_fine() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    compiled = fxopt.compile(model, torch.ones(2, 3), backend="onnx")
    torch.testing.assert_close(compiled(torch.ones(2, 3)), model(torch.ones(2, 3)).detach())


def test_wrong_options_are_refused_before_any_work(model: nn.Module) -> None:
    with pytest.raises(RegistryError, match="no backend named 'tensorflow'"):
        fxopt.compile(model, IMAGE, backend="tensorflow")
    with pytest.raises(RegistryError, match="no pass named 'nothing'"):
        fxopt.compile(model, IMAGE, passes=["nothing"])
    for option in ("verify", "on_no_match", "on_failure", "frontend"):
        with pytest.raises(InputError, match=f"{option} must be"):
            fxopt.compile(model, IMAGE, **{option: "perhaps"})  # type: ignore[arg-type]


def test_a_backend_that_cannot_be_used_says_what_is_missing(model: nn.Module) -> None:
    class Missing(EagerBackend):
        name: ClassVar[str] = "missing"

        def unavailable(self) -> str | None:
            return "install the package that is not here"

    with pytest.raises(BackendUnavailable, match="missing: install the package that is not here"):
        fxopt.compile(model, IMAGE, backend=Missing())


def test_an_engine_that_answers_differently_is_refused(model: nn.Module) -> None:
    class Wrong(EagerBackend):
        name: ClassVar[str] = "wrong"

        def lower(self, program: fxopt.Program, *, dynamic_batch: bool) -> fxopt.Engine:
            other = fxopt.capture(Net().eval(), IMAGE)
            return super().lower(other, dynamic_batch=dynamic_batch)

    torch.manual_seed(1)
    with pytest.raises(BackendError, match="the wrong engine answers differently from the program"):
        fxopt.compile(model, IMAGE, backend=Wrong())
    fxopt.compile(model, IMAGE, backend=Wrong(), verify="structure")


def test_no_match_is_warned_raised_or_ignored() -> None:
    plain, x = nn.Linear(3, 2), torch.ones(2, 3)
    with pytest.warns(NoMatchWarning, match="fold_batch_norm changed nothing"):
        fxopt.compile(plain, x, passes="fold_batch_norm", backend="eager")
    with pytest.raises(PipelineError, match="fold_batch_norm changed nothing"):
        fxopt.optimize(plain, x, "fold_batch_norm", on_no_match="error")
    fxopt.optimize(plain, x, "fold_batch_norm", on_no_match="ignore")
    fxopt.compile(plain, x, backend="eager")


def test_an_eager_engine_that_trains_starts_where_the_model_is() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Dropout())
    compiled = fxopt.compile(model, torch.randn(4, 3), passes=[], backend="eager")
    expected = copy.deepcopy(model)
    x = torch.randn(4, 3)
    torch.manual_seed(0)
    y = expected(x)
    torch.manual_seed(0)
    assert torch.equal(compiled(x), y)


def test_a_dropout_that_is_never_switched_off_is_refused_by_engines_for_inference() -> None:
    class Noisy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.dropout(x)

    with pytest.raises(BackendError, match="never switches off"):
        fxopt.compile(Noisy().eval(), torch.randn(4, 3), passes=[])


def test_a_target_must_be_a_target() -> None:
    with pytest.raises(InputError, match=r"target must be a fxopt\.Target"):
        fxopt.compile(nn.Linear(3, 3), torch.randn(4, 3), target="cpu")  # type: ignore[arg-type]


def test_a_compiled_model_is_not_pickled(model: nn.Module) -> None:
    with pytest.raises(TypeError, match=r"save it with compiled\.save\(folder\)"):
        pickle.dumps(fxopt.compile(model, IMAGE, backend="eager"))
