"""The backend `auto`: what it keeps, what it leaves out and why, and that what it keeps is saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt import Program
from fxopt.backend import Backend, Engine
from fxopt.errors import ArtifactError, BackendError, BackendUnavailable, RegistryError
from fxopt.integer_scheme import Scheme
from fxopt.lowering import AutoBackend, EagerBackend
from fxopt.parity import Expected
from fxopt.registry import make_backend
from tests.slow_backend import SlowBackend

PAIR = "auto(candidates=('eager', 'slow'), rounds=3)"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.layers(x)}


class Altered(Engine):
    """Answers as another engine does, but for what a function makes of it."""

    def __init__(self, engine: Engine, change: Callable[[Tensor], Tensor]) -> None:
        self.inputs = engine.inputs
        self._engine, self._change = engine, change

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(self._change(output) for output in self._engine(*inputs))

    def save(self, directory: Path) -> None:
        self._engine.save(directory)

    def info(self) -> Mapping[str, Any]:
        return self._engine.info()


@dataclass(frozen=True, kw_only=True)
class Wrong(EagerBackend):
    name: ClassVar[str] = "wrong"

    def lower(self, program: Program, *, dynamic_batch: bool) -> Engine:
        return Altered(super().lower(program, dynamic_batch=dynamic_batch), lambda output: output + 1)


@dataclass(frozen=True, kw_only=True)
class Failing(EagerBackend):
    name: ClassVar[str] = "failing"

    def lower(self, program: Program, *, dynamic_batch: bool) -> Engine:
        raise BackendError("no kernel for relu")


@dataclass(frozen=True, kw_only=True)
class Pairs(EagerBackend):
    name: ClassVar[str] = "pairs"

    def scheme(self, target: fxopt.Target) -> Scheme:
        return super().scheme(target).adding("within_places")


@dataclass(frozen=True, kw_only=True)
class Absent(Pairs):
    name: ClassVar[str] = "absent"

    def unavailable(self) -> str | None:
        return "pip install it"


@dataclass(frozen=True, kw_only=True)
class Fixed(EagerBackend):
    name: ClassVar[str] = "fixed"

    def lower(self, program: Program, *, dynamic_batch: bool) -> Engine:
        return super().lower(program, dynamic_batch=False)


KINDS: dict[str, type[Backend]] = {
    kind.name: kind for kind in (EagerBackend, SlowBackend, Wrong, Failing, Pairs, Absent, Fixed)
}


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backends of this file, as if plugins had brought them."""
    import fxopt.registry

    found = fxopt.registry.find_backend
    monkeypatch.setattr(fxopt.registry, "find_backend", lambda name: KINDS.get(name) or found(name))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def compiled(x: Tensor, backend: Any, **options: Any) -> fxopt.Compiled:
    return fxopt.compile(Net().eval(), (x,), passes=[], backend=backend, **options)


def test_the_fastest_is_kept(x: Tensor) -> None:
    found = compiled(x, PAIR)
    info = found.engine.info()
    assert info["kept"] == "eager"
    assert info["backend"] == "eager"
    assert torch.equal(found(x)["logits"], Net()(x)["logits"])
    rows = {row["backend"]: row["milliseconds"] for row in info["candidates"]}
    assert rows["slow"]["median"] > rows["eager"]["median"]
    assert rows["slow"]["calls"] == 3


def test_the_report_has_the_table(x: Tensor) -> None:
    text = str(compiled(x, AutoBackend(candidates=("eager", "slow", "wrong", "failing", "absent"), rounds=1)).report)
    assert "auto keeps eager" in text
    assert "auto: slow takes " in text
    assert "auto: wrong is out: it answers wrongly: " in text
    assert "auto: failing is out: no kernel for relu" in text
    assert "auto: absent is out: pip install it" in text


def test_a_fixed_batch_is_no_match_for_a_free_one(x: Tensor) -> None:
    info = compiled(x, AutoBackend(candidates=("slow", "fixed"), rounds=1)).engine.info()
    assert info["kept"] == "slow"
    assert [row["reason"] for row in info["candidates"]] == [None, "its batch is fixed"]
    assert compiled(x, AutoBackend(candidates=("fixed",), rounds=1)).engine.info()["kept"] == "fixed"


def test_nothing_is_left(x: Tensor) -> None:
    with pytest.raises(BackendError, match=r"no backend gives an engine\. failing: no kernel for relu; wrong: it answ"):
        compiled(x, AutoBackend(candidates=("failing", "wrong")))
    with pytest.raises(BackendUnavailable, match="none of its backends can be used: absent: pip install it"):
        compiled(x, AutoBackend(candidates=("absent",)))


def test_what_engines_are_held_to_is_found_once(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Program] = []
    known = Expected.of

    def counted(program: Program) -> Expected:
        found.append(program)
        return known(program)

    monkeypatch.setattr(Expected, "of", counted)
    compiled(x, PAIR)
    assert len(found) == 1


def test_engines_that_answer_otherwise_are_kept_if_that_is_wanted(x: Tensor) -> None:
    backend = AutoBackend(candidates=("wrong",), rounds=1)
    with pytest.raises(BackendError, match='verify="structure" takes engines that answer otherwise'):
        compiled(x, backend)
    found = compiled(x, backend, verify="structure")
    assert found.engine.info()["kept"] == "wrong"


def test_saved_and_loaded(x: Tensor, tmp_path: Path) -> None:
    found = compiled(x, 'auto(candidates=("onnx", "slow"), rounds=2)')
    assert found.engine.info()["kept"] == "onnx"
    assert [layer["precision"] for layer in found.engine.layers()]
    found.save(tmp_path / "engine")
    loaded = fxopt.load(tmp_path / "engine")
    assert torch.equal(loaded(x)["logits"], found(x)["logits"])
    assert loaded.engine.info()["candidates"] == found.engine.info()["candidates"]
    again = loaded.engine.info()["notes"]
    assert again == found.engine.info()["notes"]
    loaded.save(tmp_path / "again")
    assert torch.equal(fxopt.load(tmp_path / "again")(x)["logits"], found(x)["logits"])


def test_a_folder_that_does_not_say_what_was_kept(x: Tensor, tmp_path: Path) -> None:
    import json
    from dataclasses import replace

    from fxopt import artifact

    compiled(x, PAIR).save(tmp_path / "engine")
    manifest = artifact.read(tmp_path / "engine")
    with pytest.raises(ArtifactError, match="does not say which backend made its engine"):
        make_backend(PAIR).load(tmp_path / "engine", replace(manifest, info=json.loads("{}")))
    with pytest.raises(BackendUnavailable, match="needs the backend absent: pip install it"):
        make_backend(PAIR).load(tmp_path / "engine", replace(manifest, info={"kept": "absent"}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"candidates": "onnx"}, "a tuple of specs"),
        ({"candidates": (1,)}, "a tuple of specs"),
        ({"candidates": ()}, "at least one"),
        ({"candidates": ("auto",)}, "candidate of its own"),
        ({"rounds": 0}, "rounds"),
        ({"verify": 1}, "verify"),
    ],
)
def test_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AutoBackend(**options)


def test_unknown_candidates() -> None:
    with pytest.raises(RegistryError, match="nothing"):
        AutoBackend(candidates=("nothing",))


def test_weights_fit_all() -> None:
    target, wide = fxopt.Target(instruction_set="AVX2"), fxopt.Target(instruction_set="AVX512 VNNI")
    assert AutoBackend(candidates=("eager", "slow")).scheme(target).pairs == "across_places"
    assert AutoBackend(candidates=("pairs", "absent")).scheme(target).pairs == "within_places"
    assert AutoBackend(candidates=("eager", "pairs")).scheme(target).pairs == "either"
    assert AutoBackend(candidates=("eager", "absent")).scheme(target).pairs == "across_places"
    assert AutoBackend(candidates=("eager", "pairs")).scheme(wide).pairs is None
    # what all want is had, whatever most engines want
    assert AutoBackend(candidates=("openvino",)).scheme(target) == make_backend("openvino").scheme(target)


def test_all_that_are_installed_by_default() -> None:
    names = {backend.name for backend in AutoBackend()._backends()}
    assert {"eager", "onnx"} <= names
    assert "auto" not in names
