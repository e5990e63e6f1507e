"""Results of networks that an earlier run measured, for a run that measures others."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

__all__ = ["kept"]


def kept(path: Path, networks: Collection[str], *, wanted: bool, key: str = "networks") -> list[dict[str, Any]]:
    """What a file holds under a key of networks other than these; nothing if that is not wanted, or there is no file.

    The revision that the file names is that of its last run: older rows may be of another.
    """
    if not wanted or not path.exists():
        return []
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))[key]
    return [result for result in found if result["network"] not in networks]
