"""The benchmark prune_speed, on networks of a few channels."""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.networks import Network
from benchmarks.prune_channels.peer import classifiers
from benchmarks.prune_speed import add_arguments, analysis, budget, memory, run, speed
from benchmarks.prune_speed.child import in_child
from benchmarks.prune_speed.part import Size
from benchmarks.timing import Spread

linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads /proc")
peer = pytest.mark.skipif(importlib.util.find_spec("torch_pruning") is None, reason="needs torch-pruning")


def small() -> Network:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 16, 10)
    )
    return Network("small", model.eval(), (torch.randn(1, 3, 8, 8),))


def arguments(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(given)


def test_torch_counts_what_a_model_costs() -> None:
    network = small()
    macs = 64 * 3 * 9 * 36 + 64 * 64 * 9 * 16 + 64 * 16 * 10
    assert Size.of(network.model, network) == (macs, 64 * 3 * 9 + 64 + 64 * 64 * 9 + 64 + 64 * 16 * 10 + 10)
    assert Size(1, 3).over(Size(2, 4)) == (0.5, 0.75)
    assert classifiers(network.model, network.model(*network.inputs)) == [network.model[5]]


def test_every_budget_is_measured() -> None:
    results = budget.measure(small())
    assert [result["budget"] for result in results] == list(budget.BUDGETS)
    for result in results:
        assert abs(result["off_by"]) <= budget.BAR
        assert result["smallest_group"] >= budget.LEAST_GROUP
    assert results[0]["macs"] == pytest.approx(0.7, abs=budget.BAR)
    assert results[3]["params"] == pytest.approx(0.7, abs=budget.BAR)


def test_a_budget_that_is_missed_or_out_of_reach_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(budget, "load_network", lambda name, size: small())
    monkeypatch.setattr(budget, "BUDGETS", ({"macs": 0.7, "round_to": 32}, {"params": 0.01}))
    assert run(arguments("--part", "budget", "--networks", "small", "--out", str(tmp_path))) == 1
    data = json.loads((tmp_path / "budget.json").read_text())
    assert len(data["missed"]) == 2
    assert "off by" in data["missed"][0]
    assert "cannot be reached" in data["missed"][1]
    assert "missed: small, params=0.01" in (tmp_path / "budget.md").read_text()


@peer
def test_three_engines_take_turns() -> None:
    result = speed.measure(small(), rounds=2)
    assert list(result) == ["whole", "fxopt", "Torch-Pruning"]
    assert (result["whole"]["macs"], result["whole"]["speedup"]) == (1.0, Spread(1.0, 1.0, 1.0))
    assert result["fxopt"]["macs"] == pytest.approx(0.5, abs=0.1)
    assert result["Torch-Pruning"]["macs"] == pytest.approx(0.5, abs=0.15)


def test_a_peer_that_fails_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: Network) -> nn.Module:
        raise IndexError("5\nmore")

    monkeypatch.setattr(speed, "prune_by_peer", fails)
    monkeypatch.setattr(speed, "load_network", lambda name, size: small())
    found = speed.measure_all(["small"], arguments("--rounds", "1"))
    assert found.data["networks"][0]["Torch-Pruning"] == {"failure": "IndexError: 5"}
    assert [row[1] for row in found.table.rows] == ["whole", "fxopt", "Torch-Pruning"]


@linux
def test_the_peak_is_what_a_piece_of_work_takes() -> None:
    # in a process of its own, as in the benchmark: here the allocator may still hold what other tests have freed
    code = (
        "import torch; from benchmarks.prune_speed import memory; print(memory.peak_beyond(lambda: torch.ones(2**23)))"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert 0.9 < int(found.stdout) / 2**25 < 1.5  # 32 MiB


@linux
def test_memory_is_judged_by_the_default_verification(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = {"capture": 1, "structure": 2, "numerics": 3}
    monkeypatch.setattr(
        memory,
        "in_child",
        lambda function, name, size, what: (
            {"failure": "exit code -9: no output"}
            if name == "killed"
            else {"bytes": 2**20, "peak": peaks[what] * 2**20, "forward": 2**19, "seconds": 1.0}
        ),
    )
    found = memory.measure_all(["n", "killed"], arguments())
    assert found.missed[0] == "n: 3.00 times the model's bytes, bar 2.5"
    assert found.missed[1] == "killed, capture: exit code -9: no output"
    assert list(found.table.rows[0]) == ["n", "1.0", "x 1.00", "x 2.00", "x 3.00", "x 0.50", "x 2.5", "no", "1.00"]


def test_the_analysis_has_a_bar_for_each_network(monkeypatch: pytest.MonkeyPatch) -> None:
    result = {
        "nodes": 5,
        "groups": 2,
        "find_channels": [2.0, 1.0, 3.0],
        "capture_and_plan": [9.0, 9.0, 9.0],
        "torch_pruning": "IndexError: 5",
    }
    monkeypatch.setattr(analysis, "in_child", lambda function, name, size: dict(result))
    found = analysis.measure_all(["torchvision:resnet50", "torchvision:swin_t"], arguments())
    assert found.missed == ["torchvision:resnet50: 2.00 s, bar 1 s"]
    assert [row[-1] for row in found.table.rows] == ["no", "yes"]


@peer
def test_the_analysis_is_measured_in_a_child() -> None:
    function = "benchmarks.prune_speed.analysis:measure"
    result = in_child(function, name="torchvision:squeezenet1_1", size=64)
    assert result["groups"] > 10
    assert all(seconds > 0 for key in ("find_channels", "capture_and_plan", "torch_pruning") for seconds in result[key])


def test_a_child_says_why_it_fails() -> None:
    assert in_child("json:nosuch") == {
        "failure": "exit code 1: AttributeError: module 'json' has no attribute 'nosuch'"
    }
