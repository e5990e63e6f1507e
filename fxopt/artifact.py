"""A saved engine: a folder with its files, `report.json`, and `manifest.json` that says what must be in it.

The manifest holds the versions, how the model is called, and size and SHA-256 of every file. All of it is checked
before anything is loaded, and nothing is unpickled. A folder is written beside its place first and then renamed, so an
interrupted save leaves what was there.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any, cast

from fxopt.backend import Backend, Engine, TensorSpec
from fxopt.errors import ArtifactError
from fxopt.report import Report
from fxopt.signature import Signature
from fxopt.target import Target

__all__ = ["FORMAT", "FORMAT_VERSION", "MANIFEST_FILE", "REPORT_FILE", "Manifest", "read", "write"]

FORMAT = "fxopt"
FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
REPORT_FILE = "report.json"

_RECORDED_PACKAGES = ("fxopt", "torch", "onnx", "onnxruntime")
_CHUNK = 1 << 20
_AGAIN = "save the engine again"


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
) -> None:
    """Saves an engine. A folder that holds what fxopt wrote earlier, and nothing else, is replaced as a whole.

    Raises:
        ArtifactError: if the place is taken by something else, or cannot be written.
    """
    place = Path(directory).resolve()
    _refuse_foreign(place)
    draft = place.with_name(f".{place.name}.{secrets.token_hex(4)}.saving")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        draft.mkdir()
    except OSError as error:
        raise ArtifactError(f"cannot save to {place}: {error}") from error
    try:
        engine.save(draft)
        _write_json(draft / REPORT_FILE, report.to_json())
        manifest = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "versions": _versions(),
            "backend": str(backend),
            "target": target.to_json(),
            "passes": [item.config for item in report.passes],
            "signature": signature.to_json(),
            "inputs": [spec.to_json() for spec in engine.inputs],
            "engine": dict(engine.info()),
            "files": {
                path.relative_to(draft).as_posix(): {"size": path.stat().st_size, "sha256": _sha256(path)}
                for path in sorted(draft.rglob("*"))
                if path.is_file()
            },
        }
        _write_json(draft / MANIFEST_FILE, manifest)
        _replace(draft, place)
    except OSError as error:
        raise ArtifactError(f"cannot save to {place}: {error}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def read(directory: str | os.PathLike[str]) -> Manifest:
    """Reads a saved folder's manifest and report, after checking every file against them.

    Raises:
        ArtifactError: saying what is missing, altered or foreign, and what to do.
    """
    place = Path(directory)
    data = _read_manifest(place)
    files = _files(place, data)
    for name, (size, digest) in files.items():
        _verify(place, name, size, digest)
    if REPORT_FILE not in files:
        raise ArtifactError(f"{place / MANIFEST_FILE} does not list {REPORT_FILE}: the folder is incomplete; {_AGAIN}")
    report = _read_json(place / REPORT_FILE)
    try:
        return Manifest(
            backend=str(data["backend"]),
            signature=Signature.from_json(data["signature"]),
            inputs=tuple(TensorSpec.from_json(item) for item in data["inputs"]),
            target=Target.from_json(data["target"]),
            report=Report.from_json(report),
            passes=tuple(data["passes"]),
            versions=dict(data["versions"]),
            info=dict(data["engine"]),
            created=str(data["created"]),
            files=files,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(
            f"{place}: {MANIFEST_FILE} or {REPORT_FILE} lacks an entry or has a wrong one ({error!r}); {_AGAIN}"
        ) from error


def _refuse_foreign(place: Path) -> None:
    if place.exists() and not place.is_dir():
        raise ArtifactError(f"{place} exists and is not a folder: choose another place")
    if not place.exists() or not any(place.iterdir()):
        return
    try:
        listed = _read_manifest(place, any_version=True).get("files")
    except ArtifactError as error:
        raise ArtifactError(
            f"{place} is not empty and was not written by fxopt: nothing was changed; choose another place"
        ) from error
    ours = {MANIFEST_FILE, REPORT_FILE, *(listed if isinstance(listed, dict) else ())}
    found = sorted(path.relative_to(place).as_posix() for path in place.rglob("*") if not path.is_dir())
    others = [name for name in found if name not in ours]
    if others:
        raise ArtifactError(
            f"{place} also holds {', '.join(others[:3])}, which fxopt did not write: "
            "nothing was changed; move what is yours, or choose another place"
        )


def _replace(draft: Path, place: Path) -> None:
    """Puts the draft in its place. What was there is moved aside first and back again if that fails."""
    if not place.exists():
        draft.rename(place)
        return
    old = place.with_name(f".{place.name}.{secrets.token_hex(4)}.old")
    place.rename(old)
    try:
        draft.rename(place)
    except OSError:
        old.rename(place)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _read_manifest(place: Path, *, any_version: bool = False) -> dict[str, Any]:
    if not place.is_dir():
        raise ArtifactError(f"{place} is not a folder: pass the folder that save() wrote")
    path = place / MANIFEST_FILE
    if not path.is_file():
        raise ArtifactError(f"{place} has no {MANIFEST_FILE}: it is incomplete, or was not written by fxopt")
    data = _read_json(path)
    if data.get("format") != FORMAT:
        raise ArtifactError(
            f"{path} is of format {data.get('format')!r}, not {FORMAT!r}: pass the folder that save() wrote"
        )
    version = data.get("format_version")
    if not isinstance(version, int):
        raise ArtifactError(f"{path} has the format version {version!r}, which is not a number; {_AGAIN}")
    if version > FORMAT_VERSION and not any_version:
        raise ArtifactError(
            f"{path} has format version {version}, this fxopt reads up to {FORMAT_VERSION}: upgrade fxopt, or {_AGAIN}"
        )
    return data


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is not readable JSON ({error}): it is damaged; {_AGAIN}") from error
    if not isinstance(data, dict):
        raise ArtifactError(f"{path} holds a {type(data).__name__}, not an object: it is damaged; {_AGAIN}")
    return cast("dict[str, Any]", data)


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _files(place: Path, data: Mapping[str, Any]) -> dict[str, tuple[int, str]]:
    listed = data.get("files")
    if not isinstance(listed, dict):
        raise ArtifactError(f"{place / MANIFEST_FILE} lists no files: the folder is damaged; {_AGAIN}")
    files: dict[str, tuple[int, str]] = {}
    for name, entry in listed.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name or not path.parts:
            raise ArtifactError(f"{place / MANIFEST_FILE} lists {name!r}, outside the folder: do not trust it")
        size, digest = (entry.get("size"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
        if not isinstance(size, int) or not isinstance(digest, str):
            raise ArtifactError(f"{place / MANIFEST_FILE} has no size and SHA-256 for {name}: {_AGAIN}")
        files[name] = (size, digest)
    return files


def _verify(place: Path, name: str, size: int, digest: str) -> None:
    path = place / name
    if not path.resolve().is_relative_to(place.resolve()):
        raise ArtifactError(f"{path} leads outside the folder: do not trust it")
    if not path.is_file():
        raise ArtifactError(f"{place} lacks the file {name}: copy the whole folder, or save the engine again")
    actual = path.stat().st_size
    if actual != size:
        raise ArtifactError(f"{path} has {actual} bytes instead of {size}: it was cut or altered; copy it again")
    if _sha256(path) != digest:
        raise ArtifactError(f"{path} was altered since it was saved (its SHA-256 differs); copy it again, or {_AGAIN}")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error
    return digest.hexdigest()


def _versions() -> dict[str, str]:
    versions = {name: _version(name) for name in _RECORDED_PACKAGES}
    return {name: version for name, version in versions.items() if version is not None}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
