"""The report: plain JSON and back, and a table that says everything."""

from __future__ import annotations

import io
import json
import math

import pytest
import torch
from rich.console import Console
from torch import nn

import fxopt
from fxopt import Cost, PassReport, Report, Rewrite, Skip
from fxopt.passes import FoldBatchNorm


def report() -> Report:
    lossy = PassReport(
        name="prune",
        config="prune(ratio=0.5, ignore=['[red]head[/red]'])",
        rewrites=[Rewrite("conv1", "prune 8 of 16", {"keep": [0, 1]})],
        skips=[
            Skip("conv2", "output has 2 users"),
            Skip("conv3", "output has 2 users"),
            Skip("fc", "ignored [by name]"),
        ],
        seconds=1.234,
        before=Cost(2_000_000, 30_000_000, 8_000_000),
        after=Cost(1_000_000, 20_000_000, 4_000_000),
        max_abs_error=0.0123,
        sqnr_db=31.4,
        notes=["took a guess"],
    )
    exact = PassReport("fold", "fold", [], [], 0.1, Cost(1, 2, 3), Cost(1, 2, 3), 0.0, math.inf)
    unmeasured = PassReport("idle", "idle", [], [], 0.1, Cost(1, 2, 3), Cost(1, 2, 3))
    broken = PassReport("odd", "odd", [], [], 0.1, Cost(1, 2, 3), Cost(1, 2, 3), math.inf, -math.inf)
    return Report([lossy, exact, unmeasured, broken], ["captured by export: symbolic failed"])


def test_json_and_back() -> None:
    original = report()
    text = json.dumps(original.to_json(), allow_nan=False)
    again = Report.from_json(json.loads(text))
    assert again.to_json() == original.to_json()
    assert again == original
    assert again.passes[1].sqnr_db == math.inf
    assert again.passes[2].sqnr_db is None


def test_nan_errors_survive_json() -> None:
    item = PassReport("odd", "odd", [], [], 0.1, Cost(1, 2, 3), Cost(1, 2, 3), math.nan, math.nan)
    data = json.loads(json.dumps(item.to_json(), allow_nan=False))
    assert math.isnan(PassReport.from_json(data).max_abs_error or 0.0)


def test_the_table_says_what_was_done_refused_cost_and_gained() -> None:
    text = str(report())
    row = next(line for line in text.splitlines() if "prune(" in line)
    for part in ("2.00 -> 1.00M", "30.00 -> 20.00M", "8.00 -> 4.00M", "1.2e-02", "31"):
        assert part in row, part
    assert "- prune left alone conv2 and 1 more: output has 2 users" in text
    assert "- prune left alone fc: ignored [by name]" in text
    assert "- prune: took a guess" in text
    assert "- captured by export: symbolic failed" in text
    assert "[red]head[/red]" in text.replace("\n", "").replace(" ", "")
    assert "inf" in next(line for line in text.splitlines() if "fold" in line)
    assert repr(report()) == text
    assert "\x1b" not in text


def test_an_empty_report_prints() -> None:
    assert "fxopt report" in str(Report())


def test_a_copy_is_independent() -> None:
    original = report()
    copy = original.copy()
    copy.notes.append("more")
    copy.passes.clear()
    assert len(original.passes) == 4
    assert original.notes == ["captured by export: symbolic failed"]


def test_a_real_run_gives_a_real_report() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.BatchNorm2d(8)).eval()
    program = fxopt.optimize(model, torch.randn(2, 3, 6, 6), [FoldBatchNorm()])
    (item,) = program.report.passes
    assert item.config == "fold_batch_norm"
    assert [str(rewrite) for rewrite in item.rewrites] == ["_1: fold into 0 before it"]
    assert [skip.node for skip in item.skips] == ["_3"]
    assert item.before.params - item.after.params == 8  # gamma and beta go, a bias comes
    assert item.max_abs_error is not None
    assert item.max_abs_error < 1e-5
    assert item.sqnr_db is not None
    assert item.sqnr_db > 100
    assert Report.from_json(json.loads(json.dumps(program.report.to_json()))) == program.report
    assert "fold_batch_norm left alone _3: " in str(program.report)


@pytest.mark.parametrize("width", [80, 120, 200])
def test_the_table_prints_at_usual_widths(width: int) -> None:
    stream = io.StringIO()
    Console(file=stream, width=width, no_color=True).print(report())
    assert max(map(len, stream.getvalue().splitlines())) <= width
    first = {line.split(maxsplit=1)[0] for line in stream.getvalue().splitlines() if line.strip()}
    assert {"fold", "idle", "odd"} <= first
