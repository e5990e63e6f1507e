"""Rows of an earlier run that a run keeps."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.kept import kept

ROWS = [{"network": network, "batch": batch} for network in ("one", "two") for batch in (1, 8)]


def test_what_is_measured_anew_goes(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    assert kept(path, {"network": ["one"]}, wanted=True) == []
    path.write_text(json.dumps({"rows": ROWS}), encoding="utf-8")
    assert kept(path, {"network": ["one"]}, wanted=True, key="rows") == ROWS[2:]
    assert kept(path, {"network": ["one"], "batch": [8]}, wanted=True, key="rows") == [ROWS[0], *ROWS[2:]]
    assert kept(path, {"network": ["three"]}, wanted=True, key="rows") == ROWS
    assert kept(path, {"network": ["one"]}, wanted=False, key="rows") == []
