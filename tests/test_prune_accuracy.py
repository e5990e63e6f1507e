"""The benchmark `prune_accuracy`: what it measures, on noise, and how it judges."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.__main__ import main
from benchmarks.fashion_mnist import Images, resnet14
from benchmarks.prune_accuracy.study import FXOPT, PEER, Accuracy, Network, Row, Setting, Study
from benchmarks.prune_accuracy.table import accuracy_table, best, verdicts


def write_images(folder: Path, split: str, count: int) -> None:
    """Fashion-MNIST's files with noise."""
    draw = torch.Generator().manual_seed(count)
    pixels = torch.randint(0, 256, (count * 784,), dtype=torch.uint8, generator=draw)
    labels = torch.randint(0, 10, (count,), dtype=torch.uint8, generator=draw)
    for kind, header, values in (("images-idx3", 16, pixels), ("labels-idx1", 8, labels)):
        content = bytes(header) + values.numpy().tobytes()
        (folder / f"{split}-{kind}-ubyte.gz").write_bytes(gzip.compress(content, compresslevel=1))


@pytest.mark.slow
def test_pruning_is_compared_at_equal_macs_raw_reestimated_and_fine_tuned(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    write_images(tmp_path, "train", 160)
    write_images(tmp_path, "t10k", 48)
    torch.manual_seed(0)
    save_file(resnet14().state_dict(), tmp_path / "weights.safetensors")
    places = ["--checkpoint", str(tmp_path / "weights.safetensors"), "--data", str(tmp_path)]
    settings = [
        "fxopt: default*",
        "fxopt: l2, global",
        "*Pruning: l2, [li]*",
        "*obdc, global",
        "*(reduction max), local",
    ]
    sizes = ["--calibration", "32", "--images", "48", "--race", "16", "--budgets", "0.5", "--trained", "2"]
    out = tmp_path / "out.json"
    code = main(["prune_accuracy", *places, "--out", str(out), *sizes, "--settings", *settings])
    data = json.loads(out.read_text())
    rows = {row["setting"]: row for row in data["rows"]}
    assert code == int(not all(bar["met"] for bar in data["bars"]))
    assert len(data["bars"]) == 2
    assert {"default, data", "l2, global", "l2, local", "l2, isomorphic", "obdc, global"} < set(rows)
    assert [row["setting"] for row in data["variants"]] == ["l1 (reduction max), local", "l2 (reduction max), local"]
    assert all(abs(row["macs"] - 0.5) < 0.05 for row in data["rows"])
    assert {row["reestimated"]["images"] for row in data["rows"]} == {48}
    assert {row["setting"] for row in data["rows"] if row["side"] == FXOPT and row["finetuned"]} == set(rows) & {
        "default, data",
        "l2, global",
    }
    assert rows["l2, local"]["finetuned"]["images"] == 48
    assert "| fxopt | default, data |" in out.with_suffix(".md").read_text()
    assert out.with_suffix(".png").stat().st_size > 10_000


def test_accuracy_takes_a_trained_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nowhere = str(tmp_path / "none.safetensors")
    assert main(["prune_accuracy", "--checkpoint", nowhere]) == 2
    assert "python -m benchmarks.fashion_mnist --network resnet14 trains it" in capsys.readouterr().err


def measured_row(side: str, name: str, reestimated: float, finetuned: float | None = None, images: int = 10) -> Row:
    model = nn.Identity()
    tuned = [] if finetuned is None else [Accuracy(finetuned - 0.01, images), Accuracy(finetuned + 0.01, images)]
    network = Network(0.5, model, model, Accuracy(0.1, images), Accuracy(reestimated, images), tuned)
    return Row(Setting(side, name, lambda _: model), 0.5, network)


def test_the_bars_compare_the_best_of_what_was_measured_on_all_images() -> None:
    images = Images(torch.randn(10, 1, 28, 28), torch.zeros(10, dtype=torch.int64))
    study = Study(resnet14().eval(), images, images, calibration=4, race=4)
    study.accuracy = 0.9
    rows = [
        measured_row(FXOPT, "a", 0.87, 0.89),
        measured_row(FXOPT, "b", 0.80, 0.88),
        measured_row(PEER, "c", 0.85, 0.88),
        measured_row(PEER, "d", 0.89, images=4),
    ]
    loss, tuned = verdicts(rows, study)
    assert not loss.met
    assert "fxopt (a) loses 3.00 points, Torch-Pruning (c) 5.00" in loss.text
    assert tuned.met
    study.race_accuracy = 0.95  # on images that are easier
    assert study.comparable(Accuracy(0.8, 4)) == pytest.approx(0.75)
    assert study.comparable(Accuracy(0.8, 10)) == 0.8
    assert [verdict.met for verdict in verdicts([measured_row(FXOPT, "e", 0.876), *rows], study)] == [True, True]
    assert verdicts(rows[:2], study) == []
    large = measured_row(PEER, "f", 0.9, 0.95)
    assert large.network is not None
    large.network.macs = 0.53
    assert verdicts([large, *rows], study) == verdicts(rows, study)
    notes = "\n".join(accuracy_table([large, *rows], study).notes)
    assert "50%, re-estimated, over the budget: Torch-Pruning: f 90.00 % with 53.0% of the MACs" in notes
    assert "50%, fine-tuned, over the budget: Torch-Pruning: f 95.00 % with 53.0% of the MACs" in notes


def test_settings_that_keep_the_same_channels_count_once_among_the_best() -> None:
    first, second, third = measured_row(PEER, "a", 0.9), measured_row(PEER, "b", 0.8), measured_row(FXOPT, "c", 0.7)
    twin = replace(second, setting=first.setting, network=first.network)
    failed = replace(second, network=None, failure="no")
    assert best([second, twin, failed, third, first], PEER, 3) == [twin, second]
