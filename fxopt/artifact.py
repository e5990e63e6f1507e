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

import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any, cast

from fxopt.backend import Backend, Engine, TensorSpec
from fxopt.errors import ArtifactError, first_line
from fxopt.packing import SUFFIX, pack, unpack
from fxopt.report import Report
from fxopt.signature import Signature
from fxopt.target import Target

__all__ = ["FORMAT", "FORMAT_VERSION", "MANIFEST_FILE", "REPORT_FILE", "Manifest", "read", "unpacked", "write"]

FORMAT = "fxopt"
FORMAT_VERSION = 2
MANIFEST_FILE = "manifest.json"
REPORT_FILE = "report.json"

_PLAIN_VERSION = 1  # without compressed files
_RECORDED_PACKAGES = ("fxopt", "torch", "onnx", "onnxruntime")
_CHUNK = 1 << 20
_AGAIN = "save the engine again"
_DIGEST = "sha256"
_SPARE = re.compile(r"\.fxopt-[0-9a-f]{8}\.(saving|old)")


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
    place = _resolved(Path(directory))
    with _explained(f"cannot save to {place}", "give write access or make room there, or choose another place"):
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
    place = Path(directory)
    with _explained(f"cannot read {place}", "check that you may read the folder and all in it"):
        data = _read_manifest(place)
        _check_digest(place, data)
        files = _files(place, data, "files")
        packed = _files(place, data, "packed") if "packed" in data else {}
        missing = next((name for name in packed if name + SUFFIX not in files), None)
        if missing is not None:
            raise ArtifactError(f"{place / MANIFEST_FILE} does not list {missing}{SUFFIX}: {_AGAIN}")
        for name, (size, digest) in files.items():
            _verify(place, name, size, digest)
        if REPORT_FILE not in files:
            raise ArtifactError(
                f"{place / MANIFEST_FILE} does not list {REPORT_FILE}: the folder is incomplete; {_AGAIN}"
            )
        report = _read_json(place / REPORT_FILE)
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
            files=files,
            packed=packed,
        )
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ArtifactError(
            f"{place}: {MANIFEST_FILE} or {REPORT_FILE} lacks an entry or has a wrong one "
            f"({type(error).__name__}: {first_line(error)}); {_AGAIN}"
        ) from error


@contextmanager
def unpacked(directory: str | os.PathLike[str], manifest: Manifest) -> Iterator[Path]:
    """A folder with the engine's files as `Engine.save` wrote them: the saved one, or a temporary one if compressed.

    Raises:
        ArtifactError: if a compressed file does not hold what the manifest says.
    """
    place = Path(directory)
    if not manifest.packed:
        yield place
        return
    with tempfile.TemporaryDirectory(prefix="fxopt-") as folder:
        with _explained(f"cannot unpack {place}", "make room in the folder for temporary files, or set TMPDIR"):
            for name, (size, digest) in manifest.packed.items():
                unpack(place / f"{name}{SUFFIX}", Path(folder) / name, size, digest)
        yield Path(folder)


@contextmanager
def _explained(what: str, advice: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ArtifactError(f"{what}: {first_line(error)}; {advice}") from error


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # no working folder, links in a circle, a name with a NUL
        raise ArtifactError(
            f"{path} leads nowhere ({first_line(error)}): pass the full path of a folder that can exist"
        ) from error


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
    spares = _spares(place)
    if len(spares) == sum(1 for _ in place.iterdir()):
        return
    listed: set[str] = set()
    known = False
    for folder in (place, *spares):  # a save that was killed has left the manifest in a spare folder
        with suppress(ArtifactError):
            files = _read_manifest(folder, any_version=True).get("files")
            listed.update(files if isinstance(files, dict) else ())
            known = True
    if not known:
        raise ArtifactError(
            f"{place} is not empty and was not written by fxopt: nothing was changed; choose another place"
        )
    ours = {MANIFEST_FILE, REPORT_FILE, *listed}
    found = sorted(path.relative_to(place) for path in place.rglob("*") if path.is_symlink() or not path.is_dir())
    others = [path.as_posix() for path in found if path.as_posix() not in ours and not _SPARE.fullmatch(path.parts[0])]
    if others:
        raise ArtifactError(
            f"{place} also holds {', '.join(others[:3])}, which fxopt did not write: "
            "nothing was changed; move what is yours, or choose another place"
        )


def _spare_name(use: str) -> str:
    return f".fxopt-{secrets.token_hex(4)}.{use}"


def _spares(place: Path) -> list[Path]:
    """The folders of saves that are under way or were killed."""
    return [path for path in place.iterdir() if _SPARE.fullmatch(path.name)]


def _exchange(draft: Path, place: Path) -> None:
    """Exchanges what is in a folder for what is in the draft. Whatever interrupts it, the old contents come back."""
    aside = place / _spare_name("old")
    moves = [(path, aside / path.name) for path in place.iterdir() if not _SPARE.fullmatch(path.name)]
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
    for spare in _spares(place):
        shutil.rmtree(spare, ignore_errors=True)


def _read_manifest(place: Path, *, any_version: bool = False) -> dict[str, Any]:
    if not place.is_dir():
        raise ArtifactError(f"{place} is not a folder: pass the folder that save() wrote")
    path = place / MANIFEST_FILE
    if not path.is_file():
        for spare in _spares(place):
            if spare.suffix == ".old" and (spare / MANIFEST_FILE).is_file():
                raise ArtifactError(
                    f"{place} was being saved to when it was interrupted; what was there before is in {spare.name}: "
                    f"load that, or {_AGAIN}"
                )
        raise ArtifactError(f"{place} has no {MANIFEST_FILE}: it is incomplete, or was not written by fxopt")
    data = _read_json(path)
    if data.get("format") != FORMAT:
        raise ArtifactError(
            f"{path} is of format {data.get('format')!r}, not {FORMAT!r}: pass the folder that save() wrote"
        )
    version = data.get("format_version")
    if type(version) is not int:
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


def _signed(body: Mapping[str, Any]) -> dict[str, Any]:
    return {**body, _DIGEST: _body_digest(body)}


def _body_digest(body: Mapping[str, Any]) -> str:
    # Through JSON once, as reading does: it turns tuples into lists and all keys into text.
    plain = json.loads(json.dumps(body))
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode("ascii")).hexdigest()


def _check_digest(place: Path, data: Mapping[str, Any]) -> None:
    body = {key: value for key, value in data.items() if key != _DIGEST}
    if data.get(_DIGEST) != _body_digest(body):
        raise ArtifactError(
            f"{place / MANIFEST_FILE} was altered since it was saved (its own SHA-256 differs); "
            f"copy it again, or {_AGAIN}"
        )


def _listing(folder: Path) -> dict[str, Any]:
    return {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _files(place: Path, data: Mapping[str, Any], entry_name: str) -> dict[str, tuple[int, str]]:
    listed = data.get(entry_name)
    if not isinstance(listed, dict):
        raise ArtifactError(f"{place / MANIFEST_FILE} lists no {entry_name}: the folder is damaged; {_AGAIN}")
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
    if not _resolved(path).is_relative_to(_resolved(place)):
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
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _versions() -> dict[str, str]:
    versions = {name: _version(name) for name in _RECORDED_PACKAGES}
    return {name: version for name, version in versions.items() if version is not None}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
