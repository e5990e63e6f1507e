"""Results that an earlier run measured, for a run that measures others."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

__all__ = ["kept"]


def kept(
    path: Path, measured: Mapping[str, Collection[Any]], *, wanted: bool, key: str = "networks"
) -> list[dict[str, Any]]:
    """What a file holds under a key and a run does not measure; nothing if that is not wanted, or there is no file.

    The revision that the file names is that of its last run: older rows may be of another.

    Args:
        path: the file.
        measured: by the name of a field what the run measures: a row goes if that holds for all of its fields.
        wanted: whether anything is kept.
        key: of the rows in the file.
    """
    if not wanted or not path.exists():
        return []
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))[key]
    return [row for row in found if any(row[field] not in values for field, values in measured.items())]
