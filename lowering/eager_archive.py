"""Reading a `torch.export` archive from a folder that somebody else may have written.

`torch.export.load` unpickles where the archive tells it to, resolves any name below `torch` as an operator, evaluates
the text of symbolic sizes and compiles that of guards. `EagerBackend` saves tensors, operators and plain sizes, so an
archive with anything else in these places is refused before torch sees it, and guards are left out.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from fxopt.errors import ArtifactError

__all__ = ["load_archive", "runnable", "save_archive"]

_TENSOR_FILE = re.compile(r"(weight|tensor)_\d+$")
_OPERATOR = re.compile(r"torch\.ops\.\w+\.\w+(\.\w+)?$|(_operator|math)\.[a-z]\w*$")
_EXPRESSION = re.compile(r"(?!.*__)(?:[\w\s+\-*/(),<>=&|~]|'\w+'|\d\.\d)*$")


def save_archive(exported: ExportedProgram, path: Path) -> None:
    """Writes operators and tensors, without the example inputs."""
    exported.example_inputs = None
    torch.export.save(exported, path)


def runnable(exported: ExportedProgram) -> fx.GraphModule:
    """The archive's graph as a module. Its guards are left out: the engine checks its inputs, and guards are code."""
    return exported.module(check_guards=False)


def load_archive(path: Path) -> ExportedProgram:
    """Reads what `save_archive` wrote.

    Raises:
        ArtifactError: if it is no such archive, or holds what `save_archive` never writes.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                _inspect(archive, name, path)
        return torch.export.load(path)
    except ArtifactError:
        raise
    except Exception as error:
        raise ArtifactError(
            f"{path} is not a readable torch.export archive ({error}): save the engine again"
        ) from error


def _inspect(archive: zipfile.ZipFile, name: str, path: Path) -> None:
    folder, _, base = name.rpartition("/")
    section = folder.rpartition("/")[2]
    if section == "sample_inputs":
        # read with the safe unpickler only: torch would fall back to the other one
        data = archive.read(name)
        if data:
            _refuse_unsafe_sample(data, path)
    elif section in ("weights", "constants"):
        if base.endswith(".json"):
            config = json.loads(archive.read(name))["config"]
            if any(entry.get("use_pickle") for entry in config.values()):
                raise ArtifactError(f"{path} holds pickled data in {name}: fxopt does not write that; do not trust it")
        elif not _TENSOR_FILE.match(base):
            raise ArtifactError(
                f"{path} holds {name}, which is not a tensor: fxopt does not write that; do not trust it"
            )
    elif section == "models":
        for key, value in _strings(json.loads(archive.read(name))):
            allowed = {"target": _OPERATOR, "expr_str": _EXPRESSION}.get(key)
            if allowed is not None and not allowed.match(value):
                raise ArtifactError(f"{path} holds the {key} {value!r}: fxopt does not write that; do not trust it")


def _refuse_unsafe_sample(data: bytes, path: Path) -> None:
    try:
        torch.load(io.BytesIO(data), weights_only=True)
    except pickle.UnpicklingError as error:
        raise ArtifactError(f"{path} holds pickled objects as sample inputs; do not trust it") from error


def _strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, entry in value.items():
            yield from _strings(entry, name)
    elif isinstance(value, list):
        for entry in value:
            yield from _strings(entry, key)
