"""The benchmark `backends`: what it lowers answers like eager, and its bars tell good results from bad ones."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.backends import latency, parity, pipelines
from benchmarks.backends.subjects import SUBJECTS
from fxopt.registry import make_backend, passes


def row(**values: Any) -> dict[str, Any]:
    plain = {"network": "net", "precision": "fp32", "backend": "onnx", "relative": 1e-6, "reloaded": 0.0, "bytes": 1}
    return {**plain, "cost": 0.0, "reason": None, "unavailable": None, **values}


def test_parity_of_a_small_network(tmp_path: Path) -> None:
    backends = ["eager", "onnx", "openvino", "tensorrt_rtx", "tensorrt"]
    older = row(network="older", backend="other", sqnr_db=100.0, layers=None)
    (tmp_path / "parity.json").write_text(json.dumps({"rows": [row(network="lstm"), older]}), encoding="utf-8")
    arguments = argparse.Namespace(
        networks=["lstm"], backends=backends, precisions=["fp32", "int8"], keep=True, out=tmp_path
    )
    assert parity.run(arguments)
    first, *rows = json.loads((tmp_path / "parity.json").read_text(encoding="utf-8"))["rows"]
    assert first == older
    assert [(item["precision"], item["backend"]) for item in rows] == [
        (precision, backend) for precision in ("fp32", "int8") for backend in backends
    ]
    for item in rows:
        reason = make_backend(item["backend"]).unavailable()
        if reason is not None:
            assert (item["reason"], item["relative"], item["bytes"]) == (reason, None, None)
        else:
            assert item["reloaded"] == 0.0
            assert item["bytes"] > 0
            assert (item["relative"] is None) == str(item["reason"]).startswith("built, not run: ")
    text = (tmp_path / "parity.md").read_text(encoding="utf-8")
    assert "met: onnx: 2 engines answer like eager; not so: none" in text


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"relative": 1e-2}, "1 engines answer like eager; not so: ['net-fp32-onnx']"),
        ({"reloaded": 1e-3}, "the same in a new process; not so: ['net-fp32-onnx']"),
        ({"reloaded": "OSError: gone"}, "the same in a new process; not so: ['net-fp32-onnx']"),
        ({"relative": None, "bytes": None, "reason": "no kernel"}, "refused in 16 bits alone: net-fp32-onnx"),
        ({"relative": None, "reloaded": "OSError: gone"}, "where none can run; not so: ['net-fp32-onnx']"),
    ],
)
def test_parity_is_missed(wrong: dict[str, Any], text: str) -> None:
    assert all(met for _, met in parity.verdicts([row()]))
    assert [text in said for said, met in parity.verdicts([row(**wrong)]) if not met] == [True]


def test_what_is_not_there_or_not_in_16_bits_misses_nothing() -> None:
    gone = row(bytes=None, relative=None, reason="no package", unavailable="no package")
    assert parity.verdicts([gone]) == []
    rounds = row(precision="bf16", relative=0.07, cost=0.04)
    assert all(met for _, met in parity.verdicts([rounds]))
    assert not all(met for _, met in parity.verdicts([rounds | {"cost": 0.03}]))
    assert not all(met for _, met in parity.verdicts([rounds | {"precision": "fp32"}]))
    integers = row(precision="int8", relative=0.1, allowed=True)
    assert all(met for _, met in parity.verdicts([integers]))
    assert not all(met for _, met in parity.verdicts([integers | {"allowed": False}]))
    refused = row(bytes=None, relative=None, reason="no kernel", precision="bf16")
    assert parity.verdicts([refused]) == [("onnx: refused in 16 bits alone: net-bf16-onnx", True)]


def result(to_bare: float, to_best: float, gain: float) -> dict[str, Any]:
    rows = [
        {"engine": "onnx", "to_bare": [to_bare, to_bare - 0.01, to_bare + 0.01]},
        {"engine": "auto", "to_best": [to_best, to_best - 0.01, to_best + 0.01]},
        {"engine": "openvino", "reason": "not installed"},
    ]
    return {"network": "net", "batch": 1, "gain": gain, "rows": rows}


@pytest.mark.parametrize(
    ("numbers", "met"),
    [
        ((1.0, 1.0, 2.0), [True, True, True]),
        ((1.1, 1.0, 2.0), [False, True, True]),
        ((1.0, 1.2, 2.0), [True, False, True]),
        ((1.0, 1.0, 1.2), [True, True, False]),
    ],
)
def test_bars_of_latency(numbers: tuple[float, float, float], met: list[bool]) -> None:
    assert [good for _, good in latency.verdicts([result(*numbers)])] == met


def test_latency_of_a_small_network(tmp_path: Path) -> None:
    arguments = argparse.Namespace(
        networks=["lstm"], backends=["onnx", "openvino"], batches=[1], rounds=2, threads=1, keep=False, out=tmp_path
    )
    latency.run(arguments)
    (found,) = json.loads((tmp_path / "latency.json").read_text(encoding="utf-8"))["results"]
    assert [item["reason"] for item in found["rows"]] == [None] * len(found["rows"])
    assert {item["engine"] for item in found["rows"]} == {
        *("bare ONNX Runtime", "bare OpenVINO", "onnx", "openvino", "auto"),
        *("onnx int8", "openvino int8", "auto int8"),
    }
    assert found["gain"] > 0


def test_pipelines_hold_every_pass() -> None:
    held = {spec.partition("(")[0] for specs in pipelines.PIPELINES.values() for spec in specs}
    assert held == set(passes())


def test_subjects_are_the_seven() -> None:
    assert list(SUBJECTS) == [
        *("resnet18", "mobilenet_v3_small", "vit_tiny", "efficientnet_lite0", "shufflenet", "encoder", "lstm")
    ]
