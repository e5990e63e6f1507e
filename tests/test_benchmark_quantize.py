from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import quantize
from benchmarks.errors import BenchmarkError
from benchmarks.fashion_mnist import Images, mobilenet
from benchmarks.networks import load_network
from benchmarks.quantize import aware, engines, equalize, rounding
from benchmarks.quantize.engines import FLOAT, ORT, Engine, Files, Maker, Missing, methods
from benchmarks.quantize.measure import fastest, fidelity
from benchmarks.quantize.subjects import SUBJECTS, Subject
from benchmarks.quantize.table import instruction_set, quantize_table, verdicts
from benchmarks.timing import Timings

MIN_MAX, REDUCED = list(ORT)[:2]


def spread(value: float, quarter: float = 0.0) -> dict[str, float]:
    return {"median": value, "low": value - quarter, "high": value + quarter}


def row(method: str, **changed: Any) -> dict[str, Any]:
    fields = {"sqnr_db": 20.0, "agreement": 0.9, "accuracy": None, "megabytes": 1.0, "seconds": 1.0, "failure": None}
    return {"method": method, **fields, **changed}


def result(*rows: dict[str, Any], network: str = "net", accuracy: float | None = None) -> dict[str, Any]:
    return {"network": network, "accuracy": accuracy, "classes": 3, "rows": list(rows)}


def met(*rows: dict[str, Any], **fields: Any) -> list[bool]:
    return [good for _, good in verdicts([result(*rows, **fields)])]


def small(_: argparse.Namespace | None = None) -> Subject:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    return Subject("small", model.eval(), torch.randn(32, 3, 8, 8), torch.randn(40, 3, 8, 8), torch.arange(40) % 5)


def test_fidelity_bars_hold_the_first_variant_against_the_best_peer_of_each_measure() -> None:
    peers = row(MIN_MAX, sqnr_db=21.0, agreement=0.8), row("NNCF", sqnr_db=10.0, agreement=0.9)
    assert met(row("fxopt", sqnr_db=21.0, agreement=0.9), *peers) == [True, True]
    assert met(row("fxopt", sqnr_db=20.9, agreement=0.95), *peers) == [False, True]
    assert met(row("fxopt", sqnr_db=30.0, agreement=0.89), *peers) == [True, False]
    # neither the float network nor a peer that failed is a peer
    others = row(FLOAT, sqnr_db=None, agreement=1.0), row("torchao", failure="no", sqnr_db=99.0)
    assert met(row("fxopt"), row(MIN_MAX), *others) == [True, True]
    assert met(row("fxopt"), row(MIN_MAX, sqnr_db=None)) == [False, True]


def test_another_variant_of_fxopt_is_neither_held_to_the_bars_nor_a_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    variants = {"first": ("quantize",), "second": ("quantize(observer='mse')",)}
    monkeypatch.setattr("benchmarks.quantize.table.FXOPT", variants)
    assert met(row("second", sqnr_db=50.0), row("first"), row(MIN_MAX)) == [True, True]
    assert met(row("second", sqnr_db=50.0), row("first", sqnr_db=1.0), row(MIN_MAX)) == [False, True]


def test_a_failure_of_fxopt_misses_with_its_reason() -> None:
    assert verdicts([result(row("fxopt", failure="no pass"), row(MIN_MAX))]) == [("net: fxopt failed: no pass", False)]
    assert verdicts([result(row(MIN_MAX))]) == [("net: fxopt failed: not asked for", False)]


def test_accuracy_bar_is_two_in_a_thousand() -> None:
    assert met(row("fxopt", accuracy=0.9341), accuracy=0.9361) == [True]
    assert met(row("fxopt", accuracy=0.9340), accuracy=0.9361) == [False]


def test_latency_bar_gives_the_noise_of_the_rounds_and_the_speedup_is_of_resnet50() -> None:
    assert met(row("fxopt", to_fastest_ort=spread(1.05, 0.02))) == [True]
    assert met(row("fxopt", to_fastest_ort=spread(1.05, 0.01))) == [False]
    assert met(row("fxopt", latency=spread(0.6))) == []
    assert met(row("fxopt", latency=spread(0.6)), network="resnet50") == [False]
    assert met(row("fxopt", latency=spread(0.5)), network="resnet50") == [True]


def test_the_fastest_scheme_is_one_of_onnx_runtime_that_ran() -> None:
    timings = Timings({FLOAT: [1.0, 1.0], MIN_MAX: [3.0, 3.0], REDUCED: [2.0, 2.0], "fxopt": [0.5, 0.5]})
    assert fastest([row(FLOAT), row(MIN_MAX), row(REDUCED), row("fxopt")], timings) == REDUCED
    assert fastest([row(FLOAT), row("fxopt")], timings) is None


def test_fidelity_of_equal_and_of_other_logits() -> None:
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert fidelity(logits, logits.clone()) == {"sqnr_db": None, "agreement": 1.0, "differs": []}
    found = fidelity(logits, torch.tensor([[1.0, 0.0], [0.1, 0.0]]))
    assert found["agreement"] == 0.5
    assert found["differs"] == [1]
    assert found["sqnr_db"] == pytest.approx(10 * torch.log10(torch.tensor(2 / 1.01)).item())
    with pytest.raises(ValueError, match="shape"):
        fidelity(logits, logits[:, :1])


def test_agreements_that_chance_explains() -> None:
    ours, theirs = row("fxopt", agreement=0.5, differs=[1, 2, 3]), row(MIN_MAX, agreement=0.7, differs=[3])
    (text,) = (text for text, _ in verdicts([result(ours, theirs)]) if "agreement" in text)
    assert text.endswith("; p 0.50")  # two images against none
    ours["differs"] = list(range(10))
    theirs["differs"] = []
    (text,) = (text for text, _ in verdicts([result(ours, theirs)]) if "agreement" in text)
    assert text.endswith("; p 0.00")  # 2 / 1024


def test_instruction_set_is_read_from_the_flags(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("model name : x\nflags : sse avx2 avx512_vnni amx_int8\n")
    assert instruction_set(cpuinfo).endswith(", avx512_vnni amx_int8")
    cpuinfo.write_text("flags : sse avx2\n")
    assert instruction_set(cpuinfo).endswith(", no VNNI")
    assert instruction_set(tmp_path / "none").endswith(", no VNNI")


def test_a_pass_that_is_not_registered_is_a_row_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(Missing, match="no pass nosuch is registered"):
        engines._fxopt(("default", "nosuch(bits=8)"), small(), Files(tmp_path, tmp_path))


def test_a_package_that_is_not_installed_is_a_row_with_the_reason() -> None:
    with pytest.raises(Missing, match=r"No module named 'nosuch_package': pip install nosuch_package"):
        engines._package("nosuch_package")


def test_the_schemes_of_onnx_runtime_differ_in_the_file(tmp_path: Path) -> None:
    import onnx

    subject, types = small(), {}
    _, float_onnx = engines.float_engine(subject, tmp_path)
    for name in (MIN_MAX, "ORT S8S8 min-max", "ORT U8U8 min-max"):
        folder = tmp_path / name.replace(" ", "_")
        folder.mkdir()
        engine = methods(inductor=False)[name](subject, Files(float_onnx, folder))
        assert fidelity(subject.model(subject.test).detach(), engine.run(subject.test))["sqnr_db"] > 15
        model = onnx.load(folder / "model.onnx")
        zeros = {node.input[2] for node in model.graph.node if node.op_type == "QuantizeLinear"}
        codes = {node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
        held = {item.name: (item.data_type, len(item.dims)) for item in model.graph.initializer}
        types[name] = (
            {held[zero][0] for zero in zeros},
            {held[code][0] for code in codes if held.get(code, (0, 0))[1] > 1},
        )
    signed, unsigned = onnx.TensorProto.INT8, onnx.TensorProto.UINT8
    assert list(types.values()) == [({unsigned}, {signed}), ({signed}, {signed}), ({unsigned}, {unsigned})]


def test_the_command_writes_a_row_for_each_method_and_goes_on_after_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: Subject, __: Files) -> Engine:
        raise ArithmeticError("nothing to see\nmore")

    def rounds_off(subject: Subject, _: Files) -> Engine:
        run: Callable[[Tensor], Tensor] = lambda x: subject.model(x).mul(64).round().div(64)  # noqa: E731
        return Engine(run, None, timed=False)

    makers: dict[str, Maker] = {
        MIN_MAX: methods(inductor=False)[MIN_MAX],
        "fails": fails,
        "fxopt": rounds_off,
    }
    monkeypatch.setattr(quantize, "SUBJECTS", {"small": small})
    monkeypatch.setattr(quantize, "methods", lambda *, inductor: makers)
    out = tmp_path / "peers.json"
    parser = argparse.ArgumentParser()
    quantize.add_arguments(parser)
    code = quantize.run(parser.parse_args(["--part", "peers", "--rounds", "2", "--out", str(tmp_path)]))
    data = json.loads(out.read_text())
    (found,) = data["networks"]
    rows = {each["method"]: each for each in found["rows"]}
    assert list(rows) == [FLOAT, *makers]
    assert rows["fails"] == {"method": "fails", "failure": "ArithmeticError: nothing to see"}
    assert rows[FLOAT]["agreement"] == 1.0
    assert rows[FLOAT]["latency"] == spread(1.0)
    assert rows[MIN_MAX]["to_fastest_ort"] == spread(1.0)
    assert "latency" not in rows["fxopt"]
    assert data["bars"][0]["met"] == (rows["fxopt"]["sqnr_db"] >= rows[MIN_MAX]["sqnr_db"])
    assert code == int(not all(bar["met"] for bar in data["bars"]))
    text = out.with_suffix(".md").read_text()
    assert "| small | fails | failed: ArithmeticError: nothing to see |" in text
    with pytest.raises(BenchmarkError, match="no method nosuch; there are "):
        quantize.run(parser.parse_args(["--part", "peers", "--methods", "nosuch"]))


def test_the_table_has_a_cell_for_each_column() -> None:
    table = quantize_table([result(row("fxopt", latency=spread(0.5), milliseconds=1.0), row("peer", failure="x"))])
    assert [len(cells) for cells in table.rows] == [len(table.columns)] * 2


def test_a_network_with_random_weights_stays_torchvisions_and_has_statistics_of_photographs() -> None:
    subject = SUBJECTS["mobilenet_v2"](argparse.Namespace(crops=2, test_crops=3))
    other = load_network("torchvision:mobilenet_v2").model
    assert type(subject.model) is type(other)
    assert not subject.model.training
    moved = [name for name, tensor in subject.model.state_dict().items() if not tensor.equal(other.state_dict()[name])]
    assert {name.rpartition(".")[2] for name in moved} <= {"running_mean", "running_var", "num_batches_tracked"}
    assert "features.0.1.running_mean" in moved
    assert [len(images) for images in (subject.calibration, subject.test)] == [2, 3]


def few_images(_: str, __: Path) -> Images:
    generator = torch.Generator().manual_seed(0)
    return Images(torch.randn(256, 1, 28, 28, generator=generator), torch.arange(256) % 10)


def untrained() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3, 4), nn.ReLU(), nn.Flatten(), nn.Linear(196, 10)).eval()


def arguments_of(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    quantize.add_arguments(parser)
    return parser.parse_args(given)


def test_the_part_aware_quantizes_trains_and_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aware, "images", few_images)
    monkeypatch.setattr(aware, "TRAINED", {"resnet14": untrained})
    given = "--part aware --trained resnet14 --images 100 --calibration 64 --training 256".split()
    code = quantize.run(arguments_of(*given, "--out", str(tmp_path)))
    data = json.loads((tmp_path / "aware.json").read_text())
    subjects = [(found["network"], found["bits"], found["scales"]) for found in data["results"]]
    assert subjects == [("resnet14", 4, "channel"), ("resnet14", 4, "tensor")]
    for found in data["results"]:
        assert list(found["rows"]) == [aware.FLOAT, aware.NEAREST, aware.GPTQ, aware.TRAINING, aware.ENGINE]
        assert all(row["divergence"] >= 0 and row["accuracy"] <= 1 for row in found["rows"].values())
    assert code == int(not all(bar["met"] for bar in data["bars"]))
    text = (tmp_path / "aware.md").read_text()
    assert "| resnet14 | 4 | tensor | qat, onnx engine |" in text
    assert "qat of resnet14, 4 bits, a scale for each channel: 1 epoch of 256 images, at a rate of 0.002" in text


def test_the_part_aware_keeps_what_it_does_not_measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aware, "images", few_images)
    monkeypatch.setattr(aware, "TRAINED", {"resnet14": untrained})
    given = "--part aware --keep --trained resnet14 --images 100 --calibration 64 --training 256 --out".split()
    for scales in ("tensor", "channel"):
        quantize.run(arguments_of(*given, str(tmp_path), "--scales", scales))
    data = json.loads((tmp_path / "aware.json").read_text())
    assert [found["scales"] for found in data["results"]] == ["tensor", "channel"]


def test_bars_of_the_part_aware() -> None:
    def bars(accuracy: tuple[float, ...], divergence: tuple[float, ...] = (0.2, 0.1, 0.01, 0.01)) -> list[bool]:
        names = (aware.FLOAT, aware.NEAREST, aware.GPTQ, aware.TRAINING, aware.ENGINE)
        found = zip(names, (0.9, *accuracy), (0.0, *divergence), strict=True)
        rows = {name: {"accuracy": right, "divergence": apart, "lost": 3, "won": 1} for name, right, apart in found}
        result = {"network": "net", "bits": 4, "scales": "channel", "rows": rows}
        return [met for _, met in aware.verdicts([result])]

    assert bars((0.7, 0.8, 0.85, 0.85)) == [True, True, True]
    assert bars((0.7, 0.8, 0.85, 0.849)) == [False, True, True]
    assert bars((0.7, 0.8, 0.9, 0.8989)) == [True, True, False]
    assert bars((0.8, 0.9, 0.899, 0.899)) == [False, True, True]
    assert bars((0.8, 0.9, 0.9, 0.9)) == [True, True, True]
    assert bars((0.8, 0.9, 0.9, 0.9), (0.2, 0.1, 0.05, 0.1)) == [True, False, True]
    assert bars((0.8, 0.9, 0.9, 0.9), (0.1, 0.2, 0.05, 0.1)) == [True, False, True]


def test_unequal_channels_change_no_answer() -> None:
    torch.manual_seed(0)
    model = mobilenet().eval()
    scaled = equalize.unequal(model)
    x = torch.randn(4, 1, 28, 28)
    with torch.no_grad():
        torch.testing.assert_close(scaled(x), model(x), rtol=1e-4, atol=1e-5)
    block: Any = scaled[3]
    sizes = block.depthwise_norm.weight.detach().abs()
    assert sizes.max() > 20 * sizes.min()


def test_bars_of_the_part_equalize() -> None:
    rows: dict[str, float | str] = {"float": 0.9, equalize.UNEQUAL: 0.9, equalize.PLAIN: 0.6, equalize.OURS: 0.895}
    assert [met for _, met in equalize.verdicts(rows)] == [True, True, True]
    rows |= {equalize.UNEQUAL: 0.89, equalize.PLAIN: 0.8, equalize.OURS: "TypeError: no equalize"}
    assert [met for _, met in equalize.verdicts(rows)] == [False, False, False]


def test_the_part_rounding_measures_every_way_and_keeps_other_networks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounding, "SUBJECTS", {"small": small, "other": lambda _: replace(small(), name="other")})
    rounding.run(argparse.Namespace(networks=["small"], keep=False, out=tmp_path))
    rounding.run(argparse.Namespace(networks=["other"], keep=True, out=tmp_path))
    data = json.loads((tmp_path / "rounding.json").read_text())
    assert [item["network"] for item in data["networks"]] == ["small", "other"]
    for item in data["networks"]:
        ways = [(row["scheme"], row["round"]) for row in item["rows"]]
        assert ways == [(scheme, name) for scheme in ("W8A8", "W4") for name in ("nearest", "adaround", "gptq")]
        assert all(row["sqnr_db"] > 5 for row in item["rows"])
    assert "| other | W4 | gptq |" in (tmp_path / "rounding.md").read_text()


def test_bars_of_the_part_rounding() -> None:
    rows = [
        {"scheme": scheme, "round": name, "sqnr_db": value}
        for scheme in ("W8A8", "W4")
        for name, value in (("nearest", 9.0), ("adaround", 8.5), ("gptq", 10.0))
    ]
    assert [met for _, met in rounding.verdicts([{"network": "net", "rows": rows}])] == [False, True, False, True]
