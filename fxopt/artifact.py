"""A saved engine: a folder with its files, `report.json`, and `manifest.json` that says what must be in it.

The manifest holds the versions, how the model is called, size and SHA-256 of every file, and the SHA-256 of itself. All
of it is checked before anything is loaded, and nothing is unpickled. A save writes a draft first. A new folder is the
draft, renamed; an existing folder stays the same folder, with its mode and whoever works in it, and only its contents
are exchanged: what was there is moved aside, moved back if anything fails, and deleted last.

Compressed, each of the engine's files is an `.xz` file, which any tool for these reads, and the manifest has the size
and SHA-256 of what is in it too (`packed`). Such a folder has format version 2; one without is version 1 still, which
earlier releases read.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from fxopt.backend import Backend, Engine, TensorSpec
from fxopt.errors import ArtifactError, first_line
from fxopt.packing import pack
from fxopt.report import Report
from fxopt.saved_folder import (
    AGAIN,
    DIGEST,
    FORMAT,
    FORMAT_VERSION,
    MANIFEST_FILE,
    REPORT_FILE,
    SPARE,
    body_digest,
    checked,
    engine_files,
    explained,
    read_json,
    read_manifest,
    resolved,
    sha256,
    spare_folders,
)
from fxopt.signature import Signature
from fxopt.target import Target

__all__ = ["FORMAT", "FORMAT_VERSION", "MANIFEST_FILE", "REPORT_FILE", "Manifest", "read", "unpacked", "write"]

_PLAIN_VERSION = 1  # without compressed files
_RECORDED_PACKAGES = ("fxopt", "torch", "onnx", "onnxruntime", "openvino", "torchao", "tensorrt", "tensorrt-rtx")


@dataclass(frozen=True)
class Manifest:
    """What a saved folder says about itself.

    Attributes:
        backend: spec string of the backend that made the engine.
        signature: how the model is called.
        inputs: name, data type and shape of each flat input.
        target: where the engine was made to run.
        report: what the passes did.
        passes: spec strings of the passes that were applied.
        versions: of the packages at the time, by name.
        info: what the engine said about itself (`Engine.info`).
        created: time of saving, ISO 8601, UTC.
        files: size in bytes and SHA-256 of every file but the manifest, by relative path.
        packed: those of what is in the engine's files where they are compressed, by the path without ".xz".
    """

    backend: str
    signature: Signature
    inputs: tuple[TensorSpec, ...]
    target: Target
    report: Report
    passes: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)
    created: str = ""
    files: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    packed: Mapping[str, tuple[int, str]] = field(default_factory=dict)

    @property
    def notes(self) -> list[str]:
        """The engine's notes, such as why its batch is fixed."""
        return [str(note) for note in self.info.get("notes", ())]


def write(
    directory: str | os.PathLike[str],
    *,
    engine: Engine,
    backend: Backend,
    signature: Signature,
    report: Report,
    target: Target,
    compress: bool = False,
) -> None:
    """Saves an engine. A folder that holds what fxopt wrote earlier, and nothing else, is replaced as a whole.

    Args:
        directory: the folder.
        engine: what is saved.
        backend: that made it.
        signature: how the model is called.
        report: what the passes did.
        target: where the engine runs.
        compress: whether the engine's files are compressed.

    Raises:
        ArtifactError: if the place is taken by something else, or cannot be written.
    """
    place = resolved(Path(directory))
    with explained(f"cannot save to {place}", "give write access or make room there, or choose another place"):
        _refuse_foreign(place)
        exists = place.exists()
        if not exists:
            place.parent.mkdir(parents=True, exist_ok=True)
        # A folder that exists may be a mount point, or in a folder that is not ours to write: the draft goes inside.
        draft = (place if exists else place.parent) / _spare_name("saving")
        draft.mkdir()
        try:
            engine.save(draft)
            packed = _listing(draft) if compress else {}
            pack(draft, packed)
            _write_json(draft / REPORT_FILE, report.to_json())
            _write_json(
                draft / MANIFEST_FILE,
                _signed(
                    {
                        "format": FORMAT,
                        "format_version": FORMAT_VERSION if compress else _PLAIN_VERSION,
                        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                        "versions": _versions(),
                        "backend": str(backend),
                        "target": target.to_json(),
                        "passes": [item.config for item in report.passes],
                        "signature": signature.to_json(),
                        "inputs": [spec.to_json() for spec in engine.inputs],
                        "engine": dict(engine.info()),
                        "files": _listing(draft),
                        **({"packed": packed} if compress else {}),
                    }
                ),
            )
            if exists:
                _exchange(draft, place)
            else:
                draft.rename(place)
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def read(directory: str | os.PathLike[str]) -> Manifest:
    """Reads a saved folder's manifest and report, after checking every file against them.

    Raises:
        ArtifactError: saying what is missing, altered or foreign, and what to do.
    """
    saved = checked(Path(directory))
    place, data = saved.place, saved.data
    with explained(f"cannot read {place}", "check that you may read the folder and all in it"):
        report = read_json(place / REPORT_FILE)
    try:
        signature = Signature.from_json(data["signature"])
        return Manifest(
            backend=_text(data["backend"]),
            signature=signature,
            inputs=_inputs(data["inputs"], signature.names),
            target=Target.from_json(data["target"]),
            report=Report.from_json(report),
            passes=_texts(data["passes"]),
            versions=_checked_versions(data["versions"]),
            info=_info(data["engine"]),
            created=_text(data["created"]),
            files=saved.files,
            packed=saved.packed,
        )
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ArtifactError(
            f"{place}: {MANIFEST_FILE} or {REPORT_FILE} lacks an entry or has a wrong one "
            f"({type(error).__name__}: {first_line(error)}); {AGAIN}"
        ) from error


@contextmanager
def unpacked(directory: str | os.PathLike[str], manifest: Manifest) -> Iterator[Path]:
    """A folder with the engine's files as `Engine.save` wrote them: the saved one, or a temporary one if compressed.

    Raises:
        ArtifactError: if a compressed file does not hold what the manifest says.
    """
    with engine_files(Path(directory), manifest.packed) as folder:
        yield folder


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _texts(values: Any) -> tuple[str, ...]:
    if not isinstance(values, list):
        raise TypeError(f"{values!r} is no list")
    return tuple(_text(value) for value in values)


def _checked_versions(data: Any) -> dict[str, str]:
    return {name: _text(version) for name, version in data.items()}


def _info(data: Any) -> dict[str, Any]:
    info = dict(data)
    _texts(info.get("notes", []))
    return info


def _inputs(data: Any, names: tuple[str, ...]) -> tuple[TensorSpec, ...]:
    specs = tuple(TensorSpec.from_json(item) for item in data)
    if tuple(spec.name for spec in specs) != names:
        raise ValueError(f"the inputs {[spec.name for spec in specs]} are not those of the signature, {list(names)}")
    for spec in specs:
        for axis, size in enumerate(spec.shape):
            free = size is None and (axis == 0 or bool(spec.axes and spec.axes[axis]))
            if type(size) is not int and not free:
                raise TypeError(f"{size!r} is no size, in the shape of {spec.name}")
    return specs


def _refuse_foreign(place: Path) -> None:
    if place.exists() and not place.is_dir():
        raise ArtifactError(f"{place} exists and is not a folder: choose another place")
    if not place.exists():
        return
    spares = spare_folders(place)
    if len(spares) == sum(1 for _ in place.iterdir()):
        return
    listed: set[str] = set()
    known = False
    for folder in (place, *spares):  # a save that was killed has left the manifest in a spare folder
        with suppress(ArtifactError):
            files = read_manifest(folder, any_version=True).get("files")
            listed.update(files if isinstance(files, dict) else ())
            known = True
    if not known:
        raise ArtifactError(
            f"{place} is not empty and was not written by fxopt: nothing was changed; choose another place"
        )
    ours = {MANIFEST_FILE, REPORT_FILE, *listed}
    found = sorted(path.relative_to(place) for path in place.rglob("*") if path.is_symlink() or not path.is_dir())
    others = [path.as_posix() for path in found if path.as_posix() not in ours and not SPARE.fullmatch(path.parts[0])]
    if others:
        raise ArtifactError(
            f"{place} also holds {', '.join(others[:3])}, which fxopt did not write: "
            "nothing was changed; move what is yours, or choose another place"
        )


def _spare_name(use: str) -> str:
    return f".fxopt-{secrets.token_hex(4)}.{use}"


def _exchange(draft: Path, place: Path) -> None:
    """Exchanges what is in a folder for what is in the draft. Whatever interrupts it, the old contents come back."""
    aside = place / _spare_name("old")
    moves = [(path, aside / path.name) for path in place.iterdir() if not SPARE.fullmatch(path.name)]
    # The manifest comes last: a folder that has one is complete.
    fresh = sorted(draft.iterdir(), key=lambda path: path.name == MANIFEST_FILE)
    moves += [(path, place / path.name) for path in fresh]
    aside.mkdir()
    begun: list[tuple[Path, Path]] = []
    try:
        for source, goal in moves:
            begun.append((source, goal))
            source.rename(goal)
    except BaseException:
        for source, goal in reversed(begun):
            if os.path.lexists(goal) and not os.path.lexists(source):
                goal.rename(source)
        with suppress(OSError):
            aside.rmdir()
        raise
    for spare in spare_folders(place):
        shutil.rmtree(spare, ignore_errors=True)


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _signed(body: Mapping[str, Any]) -> dict[str, Any]:
    return {**body, DIGEST: body_digest(body)}


def _listing(folder: Path) -> dict[str, Any]:
    return {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _versions() -> dict[str, str]:
    versions = {name: _version(name) for name in _RECORDED_PACKAGES}
    return {name: version for name, version in versions.items() if version is not None}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
