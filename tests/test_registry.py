"""Names are found by entry points: built-in ones, plugins on the path, broken ones, and ones that two claim."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from fxopt import registry
from fxopt.analysis.channel_rules import builtin_rules
from fxopt.analysis.channels import find_channels
from fxopt.errors import RegistryError
from fxopt.lowering import OnnxBackend
from fxopt.passes import DEFAULT, FoldBatchNorm
from fxopt.registry import BrokenPluginWarning, make_backend, make_pass, make_steps

Install = Callable[[str, str, str], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Puts a distribution on the path, as pip would: metadata with entry points, and one module."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def add(name: str, entry_points: str, source: str) -> None:
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(entry_points)
        (tmp_path / f"{name}.py").write_text(source)
        monkeypatch.delitem(sys.modules, name, raising=False)

    return add


PLUGIN = """
from dataclasses import dataclass
from typing import ClassVar
from fxopt import Pass

@dataclass(frozen=True, kw_only=True)
class Idle(Pass):
    name: ClassVar[str] = "idle"
    often: int = 1
    def plan(self, program):
        return []
    def apply(self, program, rewrite):
        raise AssertionError
"""


def test_the_built_in_passes_backends_and_pipelines_are_registered() -> None:
    assert registry.passes()["fold_batch_norm"] is FoldBatchNorm
    exact, lossy = (
        {"fold_batch_norm", "merge_branches", "simplify"},
        {
            "cluster_weights",
            "factorize_low_rank",
            "prune_channels",
            "prune_weights",
            "reestimate_batch_norm",
            "substitute_depthwise_separable",
        },
    )
    assert exact | lossy <= registry.passes().keys()
    assert {"eager", "onnx"} <= registry.backends().keys()
    assert registry.pipelines()["default"] == DEFAULT


def test_names_of_classes_are_those_they_are_registered_by() -> None:
    for found in (registry.passes(), registry.backends()):
        for name, kind in found.items():
            assert kind.name == name


def test_a_plugin_is_found_by_name(install: Install) -> None:
    install("fxopt_idle", "[fxopt.passes]\nidle = fxopt_idle:Idle\n", PLUGIN)
    made = make_pass("idle(often=3)")
    assert str(made) == "idle(often=3)"
    assert "idle" in registry.passes()


def test_a_plugin_may_bring_a_pipeline(install: Install) -> None:
    entries = "[fxopt.passes]\nidle = fxopt_idle:Idle\n[fxopt.pipelines]\ntwice = fxopt_idle:TWICE\n"
    install("fxopt_idle", entries, PLUGIN + "TWICE = ('idle', 'idle(often=2)')\n")
    steps = make_steps(["twice", "idle"])
    assert [str(step.pass_) for step in steps] == ["idle", "idle(often=2)", "idle"]
    assert [step.explicit for step in steps] == [False, False, True]


def test_a_broken_plugin_is_named_and_skipped_and_the_rest_works(install: Install) -> None:
    install("fxopt_broken", "[fxopt.passes]\nbroken = fxopt_broken:Pass\n", "import no_such_package\n")
    with pytest.warns(
        BrokenPluginWarning, match=r"skipped 'broken' of the distribution fxopt_broken .*no_such_package"
    ):
        found = registry.passes()
    assert "broken" not in found
    assert "fold_batch_norm" in found
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_pass("fold_batch_norm")
    with pytest.raises(RegistryError, match="reinstall or remove that package") as caught:
        make_pass("broken")
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_a_name_that_two_distributions_claim_is_an_error_naming_both(install: Install) -> None:
    install("fxopt_one", "[fxopt.passes]\nidle = fxopt_one:Idle\n", PLUGIN)
    install("fxopt_two", "[fxopt.passes]\nidle = fxopt_two:Idle\n", PLUGIN)
    message = "the name 'idle' is registered by fxopt_one and fxopt_two: uninstall one of them"
    with pytest.raises(RegistryError, match=message):
        make_pass("idle")
    with pytest.warns(BrokenPluginWarning, match=message):
        assert "idle" not in registry.passes()


def test_a_plugin_cannot_take_a_built_in_name(install: Install) -> None:
    install("fxopt_thief", "[fxopt.passes]\nfold_batch_norm = fxopt_thief:Idle\n", PLUGIN)
    with pytest.raises(RegistryError, match="is registered by fxopt and fxopt_thief"):
        make_pass("fold_batch_norm")
    make_pass("simplify")


RULES = """
calls = []
def gate(scope, node):
    calls.append(node.name)
    return scope.input(node)
broken = 3
"""


def test_a_plugin_may_bring_a_channel_rule(install: Install) -> None:
    install("fxopt_gate", "[fxopt.channel_rules]\nmylib.gate.default = fxopt_gate:gate\nsort = no_such:rule\n", RULES)
    found = registry.channel_rules(["relu", "unknown:mylib.gate.default"], {"relu"})
    assert list(found) == ["unknown:mylib.gate.default"]
    assert registry.channel_rules(["relu"], {"relu"}) == {}


def sorting() -> fxopt.Program:
    class Sorts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.first(x).sort(0)[0])  # type: ignore[no-any-return]

    return fxopt.capture(Sorts().eval(), torch.randn(4, 3), frontend="symbolic")


def test_channels_are_followed_by_the_rule_of_a_plugin(install: Install) -> None:
    source = "def sort(scope, node):\n    return (scope.input(node),) * 2\n"
    assert find_channels(sorting()).groups[0].locked == "sort at sort has no rule"
    install("fxopt_sort", "[fxopt.channel_rules]\nsort = fxopt_sort:sort\n", source)
    assert find_channels(sorting()).groups[0].locked is None
    assert find_channels(sorting(), rules=builtin_rules()).groups[0].locked == "sort at sort has no rule"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("sort = fxopt_gate:none", "'sort' of the distribution fxopt_gate cannot be imported .*'none'.*; reinstall"),
        ("sort = fxopt_gate:broken", "the channel rule 'unknown:sort' of fxopt_gate is no function, but 3"),
        ("linear = fxopt_gate:gate", "fxopt_gate registers a channel rule for 'linear', which has a built-in one"),
    ],
)
def test_channel_rules_that_are_refused_once_they_are_needed(install: Install, entry: str, message: str) -> None:
    install("fxopt_gate", f"[fxopt.channel_rules]\n{entry}\nrelu = fxopt_gate:gate\n", RULES)
    with pytest.raises(RegistryError, match=message):
        find_channels(sorting())


def test_a_channel_rule_that_two_distributions_claim_is_an_error_naming_both(install: Install) -> None:
    install("fxopt_one", "[fxopt.channel_rules]\nsort = fxopt_one:gate\n", RULES)
    install("fxopt_two", "[fxopt.channel_rules]\nsort = fxopt_two:gate\n", RULES)
    with pytest.raises(RegistryError, match="the name 'sort' is registered by fxopt_one and fxopt_two"):
        find_channels(sorting())


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(RegistryError, match=r"no pass named 'fold'; known passes: .*fold_batch_norm.*default"):
        make_pass("fold")
    with pytest.raises(RegistryError, match=r"no backend named 'onx'; known backends: .*eager.*onnx"):
        make_backend("onx")


def test_steps_take_passes_specs_pipelines_and_sequences() -> None:
    pass_ = FoldBatchNorm(clone_shared=True)
    assert [step.pass_ for step in make_steps(pass_)] == [pass_]
    assert [str(step.pass_) for step in make_steps("default")] == list(DEFAULT)
    steps = make_steps(["default", pass_, "fold_batch_norm(clone_shared=True)"])
    assert [step.explicit for step in steps] == [False] * len(DEFAULT) + [True, True]
    assert steps[-1].pass_ == steps[-2].pass_
    assert make_steps([]) == []


def test_a_backend_passes_through_or_is_made_from_its_spec() -> None:
    made = make_backend("onnx(num_threads=2)")
    assert made.name == "onnx"
    assert make_backend(made) is made
    assert make_backend(str(made)) == made
    with pytest.raises(RegistryError, match="onnx has no option 'threads'"):
        make_backend("onnx(threads=2)")


@pytest.mark.parametrize("wanted", [FoldBatchNorm, ["simplify", FoldBatchNorm]])
def test_the_class_of_a_pass_is_refused(wanted: Any) -> None:
    with pytest.raises(
        RegistryError, match=r"FoldBatchNorm is a class: pass an instance, FoldBatchNorm\(\), or a spec"
    ):
        make_steps(wanted)


@pytest.mark.parametrize("wanted", [None, 3, [None]])
def test_what_is_no_pass_is_refused(wanted: Any) -> None:
    with pytest.raises(
        RegistryError, match="a pass must be an instance of Pass or a spec string such as 'simplify', not"
    ):
        make_steps(wanted)


def test_what_is_no_backend_is_refused() -> None:
    backend: Any = OnnxBackend
    with pytest.raises(RegistryError, match=r"OnnxBackend is a class: pass an instance, OnnxBackend\(\), or a spec"):
        make_backend(backend)
    nothing: Any = None
    with pytest.raises(
        RegistryError, match="a backend must be an instance of Backend or a spec string such as 'onnx', not None"
    ):
        make_backend(nothing)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("onnx(num_threads=0)", "num_threads must be an integer of at least 1, or None, not 0"),
        ("onnx(num_threads=2.0)", "num_threads must be an integer of at least 1, or None, not 2.0"),
        ("onnx(num_threads=True)", "num_threads must be an integer of at least 1, or None, not True"),
        ("onnx(num_threads='2')", "num_threads must be an integer of at least 1, or None, not '2'"),
        ("onnx(providers='CPU')", r"providers must be a tuple of names: write \('CPU',\) for this one alone"),
        ("onnx(providers=['CPU', 1])", "a provider is a name, or a pair of a name and its options, not 1"),
        ("onnx(providers=3)", "providers must be a tuple of names, or None, not 3"),
    ],
)
def test_values_that_the_onnx_backend_refuses(spec: str, message: str) -> None:
    with pytest.raises(RegistryError, match=f"onnx: {message}"):
        make_backend(spec)
