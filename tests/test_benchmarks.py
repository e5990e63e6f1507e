from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from benchmarks import coverage, prune_channels, time_gate
from benchmarks.__main__ import discover, main
from benchmarks.batch_norms import foldable
from benchmarks.comparison import CONV_OPS, NORM_OPS, compare
from benchmarks.coverage.row import STAGES, problems, verdict
from benchmarks.coverage.table import coverage_table, summary
from benchmarks.errors import BenchmarkError
from benchmarks.networks import TRICKY, load_network
from benchmarks.numerics import Float64, OutputMismatchError, randomise, relative_error
from benchmarks.prune_channels.row import has_fallen, outcome, peer_outcome
from benchmarks.prune_channels.row import problems as pruning_problems
from benchmarks.prune_channels.table import prune_table
from benchmarks.results import Table, write_json
from benchmarks.suites import Case, Entry, Suite, load_suite
from benchmarks.sweep import Part
from benchmarks.sweep.pool import Job, run_jobs
from benchmarks.timing import Spread, interleave
from tests.conftest import ROOT, NewProcess

THIS = f"{__name__}:FakeSuite"


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.bn(self.conv(x)).relu().mean((2, 3)))
        return y


class Hangs(Small):
    def forward(self, x: Tensor) -> Tensor:
        time.sleep(600)
        return super().forward(x)


class Raises(Small):
    def forward(self, x: Tensor) -> Tensor:
        raise ArithmeticError("nothing to see")


class Crashes(Small):
    def forward(self, x: Tensor) -> Tensor:
        import os

        os.abort()


class Mixes(Small):
    """The channels are sorted: none can be removed, by fxopt; Torch-Pruning does not see it."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.conv(x).mean((2, 3)).sort(dim=1).values)
        return y


class FakeSuite(Suite):
    models: ClassVar[dict[str, type[Small]]] = {
        "small": Small,
        "hangs": Hangs,
        "raises": Raises,
        "crashes": Crashes,
        "mixes": Mixes,
    }

    def entries(self) -> Sequence[Entry]:
        return [Entry(name, "fake", 100) for name in self.models]

    def build(self, name: str) -> Case:
        return Case(self.models[name](), ((3, 8, 8),))


def run_benchmark(
    benchmark: ModuleType, out: Path, *models: str, timeout: float = 120.0, **options: Any
) -> tuple[int, dict[str, dict[str, Any]]]:
    parser = argparse.ArgumentParser()
    benchmark.add_arguments(parser)
    arguments = ["--suite", THIS, "--models", *models, "--out", str(out), "--timeout", str(timeout), "--no-engine"]
    code = benchmark.run(parser.parse_args([*arguments, *(f"--{key.replace('_', '-')}" for key in options)]))
    rows = json.loads(out.read_text())["rows"]
    return code, {row["model"]: row for row in rows}


def run_coverage(out: Path, *models: str, **options: Any) -> tuple[int, dict[str, dict[str, Any]]]:
    return run_benchmark(coverage, out, *models, **options)


def test_a_model_goes_through_all_stages_and_a_rerun_does_not_repeat_it(tmp_path: Path) -> None:
    out = tmp_path / "coverage.json"
    code, rows = run_coverage(out, "small")
    row = rows["small"]
    assert (code, problems(row)) == (0, [])
    assert row["stages"]["fold_batch_norm"]["before"] == 1
    assert row["stages"]["fold_batch_norm"]["left"] == 0
    assert row["stages"]["capture"]["errors"] == {"1": 0.0, "2": 0.0}
    assert row["shapes"] == [[3, 8, 8]]
    assert row["peak_rss"] > 0
    assert "| small | fake | 3x8x8 |" in out.with_suffix(".md").read_text()

    row["revision"] = "of the first run"
    write_json(out, {"rows": [row]})
    assert run_coverage(out, "small")[1]["small"]["revision"] == "of the first run"
    assert run_coverage(out, "small", fresh=True)[1]["small"]["revision"] != "of the first run"


def test_a_hang_an_error_and_a_crash_cost_one_row_each(tmp_path: Path) -> None:
    out = tmp_path / "coverage.json"
    code, rows = run_coverage(out, "hangs", "raises", "crashes", timeout=12)
    assert code == 1
    assert problems(rows["hangs"]) == ["build: still running after 12 s, killed"]
    assert problems(rows["raises"]) == ["build: ArithmeticError: nothing to see"]
    assert problems(rows["crashes"])[0].startswith("build: killed by signal 6")


def test_a_failed_row_is_kept_until_retry_failed(tmp_path: Path) -> None:
    out = tmp_path / "coverage.json"
    stages = {"build": {"ok": False, "reason": "of the first run"}}
    row = {"model": "raises", "kind": "fake", "params": 1, "shapes": [], "seconds": 0.0, "peak_rss": None}
    write_json(out, {"rows": [{**row, "stages": stages}]})
    assert problems(run_coverage(out, "raises")[1]["raises"]) == ["build: of the first run"]
    assert "ArithmeticError" in problems(run_coverage(out, "raises", retry_failed=True)[1]["raises"])[0]


def test_a_job_alone_runs_after_the_others() -> None:
    jobs = [Job("large", ["true"], 30, alone=True), Job("a", ["true"], 30), Job("b", ["false"], 30)]
    started: list[str] = []
    outcomes = list(run_jobs(jobs, parallel=2, environment=lambda _: {}, on_start=lambda job: started.append(job.key)))
    assert started == ["a", "b", "large"]
    assert {outcome.job.key: outcome.returncode for outcome in outcomes} == {"a": 0, "b": 1, "large": 0}


def stage(**values: Any) -> dict[str, Any]:
    return {"ok": True, "reason": None, **values}


def test_an_error_over_the_bar_is_a_problem_unless_float64_says_rounding() -> None:
    judgement = {"own_noise": 1e-6, "error_float64": 0.5, "reason": None, "rounding": False}
    row = {"stages": {"capture": stage(errors={"1": 1e-7, "2": 2e-3}, judgement=judgement)}}
    text = "capture: relative error 2.0e-03 over 1e-05 (the model's own float32 noise 1.0e-06, float64 error 5.0e-01)"
    assert problems(row) == [text]
    judgement["rounding"] = True
    assert problems(row) == []
    assert problems({"stages": {"capture": stage(errors={"1": None})}})[0].startswith("capture: relative error inf")
    assert problems({"stages": {"fold_batch_norm": stage(errors={"1": 0.0}, foldable_left=["bn1"])}}) == [
        "fold_batch_norm: foldable batch norms left: bn1"
    ]


def test_a_row_without_the_engine_is_complete_only_where_none_is_asked_for() -> None:
    names = STAGES[:-1]
    part = Part("", "", STAGES, 1.0, problems, verdict)
    row = {"stages": {name: stage() for name in names}}
    assert replace(part, names=names).is_complete(row)
    assert not part.is_complete(row)
    row["stages"]["default"]["ok"] = False
    assert part.is_complete(row)


def test_pruning_puts_fxopt_and_its_peer_into_one_row_and_a_rerun_adds_what_is_missing(tmp_path: Path) -> None:
    out = tmp_path / "prune.json"
    code, rows = run_benchmark(prune_channels, out, "small", no_peer=True)
    row = rows["small"]
    # 1 of 4 channels, the whole share that rounding allows
    assert (code, outcome(row)) == (0, ("ok", "MACs fall by 25%: 1 x an output of the model"))
    assert not has_fallen(row)
    assert peer_outcome(row.get("torch_pruning", {})) == ("", "")
    assert row["stages"]["prune"]["rewrites"] == 1
    assert row["stages"]["prune"]["left_alone"] == {"an output of the model": 1}
    assert max(row["stages"]["exactness"]["errors"].values()) < 1e-12
    row["revision"] = "of the first run"
    write_json(out, {"rows": [row]})

    code, rows = run_benchmark(prune_channels, out, "small")
    row = rows["small"]
    assert row["revision"] == "of the first run"
    assert peer_outcome(row["torch_pruning"]) == ("ok", "")
    assert "Torch-Pruning: 1 of 1 pruned" in out.with_suffix(".md").read_text()


def test_what_cannot_be_pruned_is_refused_with_the_reasons(tmp_path: Path) -> None:
    code, rows = run_benchmark(prune_channels, tmp_path / "prune.json", "mixes", no_peer=True)
    kind, why = outcome(rows["mixes"])
    assert (code, kind) == (0, "refused")
    assert "sort has no rule" in why


def pruned(**changes: Any) -> dict[str, Any]:
    prune = stage(rewrites=1, macs=50, rolled_back=[], left_alone={"an output of the model": 1}, errors={"1": 0.3})
    measured = {"exactness": stage(errors={"1": 0.0}), "engine": stage(errors={"1": 0.0})}
    stages = {"build": stage(), "capture": stage(macs=100), "analysis": stage(), "prune": prune, **measured}
    for name, values in changes.items():
        stages[name] = {**stages[name], **values}
    return {"model": "m", "kind": "k", "params": 1, "shapes": [], "stages": stages}


def test_a_pruned_row_is_wrong_failed_refused_or_ok() -> None:
    assert outcome(pruned()) == ("ok", "")
    assert outcome(pruned(prune={"macs": 90})) == ("ok", "MACs fall by 10%: 1 x an output of the model")
    assert outcome(pruned(exactness={"errors": {"1": 0.0, "2": 1e-3}}))[0] == "wrong"
    assert outcome(pruned(engine={"errors": {"1": None}}))[0] == "wrong"
    assert outcome(pruned(prune={"failures": {"2": "shapes"}})) == ("wrong", "prune: batch 2: shapes")
    assert outcome(pruned(prune={"rolled_back": ["conv: rolled back"]})) == ("failed", "conv: rolled back")
    failed = {"ok": False, "reason": "CaptureError: no"}
    assert outcome({"stages": {"build": stage(), "capture": failed}}) == ("refused", "capture: CaptureError: no")
    failed = {"ok": False, "reason": "KeyError: 'x'"}
    assert outcome(pruned(exactness=failed)) == ("failed", "exactness: KeyError: 'x'")
    assert pruning_problems(pruned(exactness=failed)) == ["failed: exactness: KeyError: 'x'"]
    assert pruning_problems({"stages": {"capture": {"ok": False, "reason": "CaptureError: no"}}}) == []


def test_the_peers_failures_are_counted_by_their_class() -> None:
    def row(**values: Any) -> dict[str, Any]:
        peer = {"ok": True, "reason": None, "macs": 1, "macs_before": 2, "seconds": 3.0, **values}
        return {**pruned(), "torch_pruning": {"stages": {"torch_pruning": peer}}}

    rows = [row(), row(ok=False, reason="IndexError: 5\nmore"), row(failures={"2": "no"}), row(macs=2), pruned()]
    assert [peer_outcome(each.get("torch_pruning", {})) for each in rows] == [
        ("ok", ""),
        ("failed", "IndexError: 5"),
        ("failed", "batch 2: no"),
        ("failed", "removed nothing"),
        ("", ""),
    ]
    text = prune_table("s", rows).markdown()
    assert "Torch-Pruning: 1 of 4 pruned, 1 IndexError, 1 with a batch that does not run, 1 removed nothing" in text


def test_the_peer_is_stopped_at_its_time_limit(new_process: NewProcess) -> None:
    # the alarm may reach a thread of a library that others loaded here, and end the process
    source = """
import time
from benchmarks.prune_channels.peer import time_limit
try:
    with time_limit(0.05):
        time.sleep(5)
except TimeoutError as error:
    print(error)
"""
    assert new_process.code(source, path=[ROOT]) == "more than 0.05 s\n"


def test_the_table_escapes_and_counts() -> None:
    row = {"model": "m", "kind": "k", "params": 1, "shapes": [[3, 8]], "seconds": 1.0, "peak_rss": None}
    failed = {**row, "stages": {"build": {"ok": False, "reason": "a | b\nc"}}}
    text = coverage_table("s", [failed]).markdown()
    assert "build: a \\| b c |" in text
    assert summary([failed])["ok"] == 0
    assert len({line.replace("\\|", "").count("|") for line in text.splitlines() if line.startswith("|")}) == 1
    assert Table("t", ("a",), [["1"]], ["n"]).markdown() == "# t\n\n| a |\n| --- |\n| 1 |\n\n- n\n"


def test_the_relative_error_is_the_worst_over_nested_outputs() -> None:
    a = {"x": torch.tensor([1.0, 2.0]), "y": [torch.tensor([10.0])]}
    b = {"x": torch.tensor([1.0, 2.0]), "y": [torch.tensor([8.0])]}
    assert relative_error(a, b) == pytest.approx(0.25)
    assert relative_error(torch.tensor([float("nan")]), torch.tensor([1.0])) == float("inf")
    with pytest.raises(OutputMismatchError, match="a list instead of a dict"):
        relative_error([a["x"]], a)
    with pytest.raises(OutputMismatchError, match=r"output has shape \(2,\) instead of \(1,\)"):
        relative_error(a["x"], torch.zeros(1))


def test_a_model_that_casts_can_run_in_float64() -> None:
    layer = nn.Linear(3, 2).double()
    with Float64():
        assert layer(torch.ones(1, 3, dtype=torch.float64).float()).dtype == torch.float64


def test_randomised_models_have_no_constant_parameter() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.LayerNorm(4))
    model.register_parameter("scale", nn.Parameter(torch.full((4,), 1e-6)))
    randomise(model, torch.Generator().manual_seed(0))
    assert all(tensor.unique().numel() > 1 for tensor in (*model.parameters(), *model.buffers()) if tensor.ndim)


def test_what_counts_as_foldable() -> None:
    import fxopt

    def left(name: str) -> list[str]:
        network = load_network(name)
        return foldable(fxopt.capture(network.model, network.inputs))

    assert left("shared-convolution") == left("shared-norm") == left("second-user") == []
    assert left("norm-first") == ["bn1"]  # bn2 is before a padded convolution


@pytest.mark.parametrize("name", [*TRICKY])
def test_a_comparison_counts_operators_and_errors(name: str) -> None:
    network = load_network(name)
    versions = compare(network, {"half": lambda: Scaled(network.model), "broken": Raises}, rounds=2).versions
    assert versions["model"].count(NORM_OPS) == {"second-user": 1}.get(name, 2)
    assert versions["model"].count(CONV_OPS) == {"second-user": 1}.get(name, 2)
    assert versions["model"].error == 0.0
    assert versions["half"].error == pytest.approx(0.5, rel=1e-4)
    assert versions["broken"].failure == "ArithmeticError: nothing to see"


class Scaled(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.model(x) / 2
        return y


def test_interleaved_timing_pairs_the_rounds() -> None:
    timings = interleave({"short": lambda: time.sleep(0.002), "long": lambda: time.sleep(0.006)}, rounds=5)
    assert timings.ratio("long", "short").median > 1.5
    assert timings.difference("long", "short").median > 0.001
    assert Spread(1.0, 0.5, 2.0).text(1) == "1.0 [0.5, 2.0]"


def test_every_benchmark_file_is_found() -> None:
    assert list(discover()) == [
        "backends",
        "cluster_weights",
        "coverage",
        "factorize_low_rank",
        "fold_batch_norm",
        "merge_branches",
        "overhead",
        "prune_accuracy",
        "prune_channels",
        "prune_speed",
        "prune_weights",
        "quantize",
        "simplify",
        "substitute_depthwise_separable",
        "substitute_inverted_residual",
        "time_gate",
    ]


def test_unknown_names_say_what_there_is(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["fold_batchnorm"])
    assert exit_.value.code == 2
    assert "fold_batch_norm" in capsys.readouterr().err
    assert main(["coverage", "--suite", "torchvison"]) == 2
    assert "there are timm, torchvision" in capsys.readouterr().err
    with pytest.raises(BenchmarkError, match=r"no model of .*FakeSuite matches nosuch; it has small, hangs"):
        run_coverage(tmp_path / "out.json", "nosuch")


def test_torchvision_suite_has_the_three_kinds_at_their_sizes() -> None:
    suite = load_suite("torchvision")
    entries = {entry.name: entry for entry in suite.entries()}
    assert {entry.kind for entry in entries.values()} == {"classification", "segmentation", "video"}
    assert not [name for name in entries if "quantized" in name or "raft" in name or "rcnn" in name]
    assert suite.build("mobilenet_v3_small").shapes == ((3, 224, 224),)
    assert suite.build("lraspp_mobilenet_v3_large").shapes == ((3, 128, 128),)


def test_time_gate_has_a_row_for_each_gate_and_times_what_was_rewritten(tmp_path: Path) -> None:
    out = tmp_path / "gate.json"
    passes = ["--passes", "factorize_low_rank", "prune_weights"]
    code = main(["time_gate", "--networks", "second-user", *passes, "--rounds", "2", "--out", str(out)])
    data = json.loads(out.read_text())
    assert [row["gate"] for row in data["rows"]] == ["macs", "time", "none"]
    # whether the form that saves a third of the MACs is faster, is for the clock to say
    assert [row["rewrites"] > 0 for row in data["rows"]][::2] == [True, True]
    assert all((row["ratio"] is None) == (row["rewrites"] == 0) for row in data["rows"])
    assert code == int(not data["met"])
    assert "second-user" in out.with_suffix(".md").read_text()
    with pytest.raises(BenchmarkError, match=r"no setting for fold_batch_norm; there are factorize_low_rank, "):
        time_gate.run(argparse.Namespace(passes=["fold_batch_norm"]))
