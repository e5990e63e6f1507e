"""A saved folder, read without torch: the manifest as plain JSON, and every file checked against it.

`fxopt/artifact.py` writes such folders and says what is in them. What runs a saved engine in a process without torch
begins here.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, cast

from fxopt.errors import ArtifactError, first_line
from fxopt.packing import SUFFIX, unpack

__all__ = [
    "AGAIN",
    "DIGEST",
    "FORMAT",
    "FORMAT_VERSION",
    "MANIFEST_FILE",
    "REPORT_FILE",
    "SPARE",
    "SavedFolder",
    "body_digest",
    "checked",
    "engine_files",
    "explained",
    "read_json",
    "read_manifest",
    "resolved",
    "sha256",
    "spare_folders",
]

FORMAT = "fxopt"
FORMAT_VERSION = 2
MANIFEST_FILE = "manifest.json"
REPORT_FILE = "report.json"
AGAIN = "save the engine again"
DIGEST = "sha256"
SPARE = re.compile(r"\.fxopt-[0-9a-f]{8}\.(saving|old)")

_CHUNK = 1 << 20


class SavedFolder(NamedTuple):
    """A folder whose files are all there and as they were saved.

    Attributes:
        place: the folder.
        data: the manifest.
        files: size in bytes and SHA-256 of every file but the manifest, by relative path.
        packed: those of what is in the engine's files where they are compressed, by the path without ".xz".
    """

    place: Path
    data: Mapping[str, Any]
    files: Mapping[str, tuple[int, str]]
    packed: Mapping[str, tuple[int, str]]


def checked(place: Path) -> SavedFolder:
    """Reads a folder's manifest, and checks every file against it.

    Raises:
        ArtifactError: saying what is missing, altered or foreign, and what to do.
    """
    with explained(f"cannot read {place}", "check that you may read the folder and all in it"):
        data = read_manifest(place)
        _check_digest(place, data)
        files = _files(place, data, "files")
        packed = _files(place, data, "packed") if "packed" in data else {}
        missing = next((name for name in packed if name + SUFFIX not in files), None)
        if missing is not None:
            raise ArtifactError(f"{place / MANIFEST_FILE} does not list {missing}{SUFFIX}: {AGAIN}")
        for name, (size, digest) in files.items():
            _verify(place, name, size, digest)
        if REPORT_FILE not in files:
            raise ArtifactError(
                f"{place / MANIFEST_FILE} does not list {REPORT_FILE}: the folder is incomplete; {AGAIN}"
            )
    return SavedFolder(place, data, files, packed)


@contextmanager
def engine_files(place: Path, packed: Mapping[str, tuple[int, str]]) -> Iterator[Path]:
    """A folder with the engine's files as `Engine.save` wrote them: the saved one, or a temporary one if compressed.

    Raises:
        ArtifactError: if a compressed file does not hold what the manifest says.
    """
    if not packed:
        yield place
        return
    with tempfile.TemporaryDirectory(prefix="fxopt-") as folder:
        with explained(f"cannot unpack {place}", "make room in the folder for temporary files, or set TMPDIR"):
            for name, (size, digest) in packed.items():
                unpack(place / f"{name}{SUFFIX}", Path(folder) / name, size, digest)
        yield Path(folder)


@contextmanager
def explained(what: str, advice: str) -> Iterator[None]:
    """Turns errors of the file system into one that says what was tried, and what to do.

    Raises:
        ArtifactError: in their place.
    """
    try:
        yield
    except OSError as error:
        raise ArtifactError(f"{what}: {first_line(error)}; {advice}") from error


def resolved(path: Path) -> Path:
    """The path without links.

    Raises:
        ArtifactError: if there is none.
    """
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # no working folder, links in a circle, a name with a NUL
        raise ArtifactError(
            f"{path} leads nowhere ({first_line(error)}): pass the full path of a folder that can exist"
        ) from error


def spare_folders(place: Path) -> list[Path]:
    """The folders of saves that are under way or were killed."""
    return [path for path in place.iterdir() if SPARE.fullmatch(path.name)]


def read_manifest(place: Path, *, any_version: bool = False) -> dict[str, Any]:
    """A folder's manifest, its format checked and nothing else.

    Raises:
        ArtifactError: if there is none that this version reads.
    """
    if not place.is_dir():
        raise ArtifactError(f"{place} is not a folder: pass the folder that save() wrote")
    path = place / MANIFEST_FILE
    if not path.is_file():
        for spare in spare_folders(place):
            if spare.suffix == ".old" and (spare / MANIFEST_FILE).is_file():
                raise ArtifactError(
                    f"{place} was being saved to when it was interrupted; what was there before is in {spare.name}: "
                    f"load that, or {AGAIN}"
                )
        raise ArtifactError(f"{place} has no {MANIFEST_FILE}: it is incomplete, or was not written by fxopt")
    data = read_json(path)
    if data.get("format") != FORMAT:
        raise ArtifactError(
            f"{path} is of format {data.get('format')!r}, not {FORMAT!r}: pass the folder that save() wrote"
        )
    version = data.get("format_version")
    if type(version) is not int:
        raise ArtifactError(f"{path} has the format version {version!r}, which is not a number; {AGAIN}")
    if version > FORMAT_VERSION and not any_version:
        raise ArtifactError(
            f"{path} has format version {version}, this fxopt reads up to {FORMAT_VERSION}: upgrade fxopt, or {AGAIN}"
        )
    return data


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file.

    Raises:
        ArtifactError: if there is none.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is not readable JSON ({error}): it is damaged; {AGAIN}") from error
    if not isinstance(data, dict):
        raise ArtifactError(f"{path} holds a {type(data).__name__}, not an object: it is damaged; {AGAIN}")
    return cast("dict[str, Any]", data)


def body_digest(body: Mapping[str, Any]) -> str:
    """The SHA-256 of a manifest without its own."""
    # Through JSON once, as reading does: it turns tuples into lists and all keys into text.
    plain = json.loads(json.dumps(body))
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode("ascii")).hexdigest()


def _check_digest(place: Path, data: Mapping[str, Any]) -> None:
    body = {key: value for key, value in data.items() if key != DIGEST}
    if data.get(DIGEST) != body_digest(body):
        raise ArtifactError(
            f"{place / MANIFEST_FILE} was altered since it was saved (its own SHA-256 differs); "
            f"copy it again, or {AGAIN}"
        )


def _files(place: Path, data: Mapping[str, Any], entry_name: str) -> dict[str, tuple[int, str]]:
    listed = data.get(entry_name)
    if not isinstance(listed, dict):
        raise ArtifactError(f"{place / MANIFEST_FILE} lists no {entry_name}: the folder is damaged; {AGAIN}")
    files: dict[str, tuple[int, str]] = {}
    for name, entry in listed.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name or not path.parts:
            raise ArtifactError(f"{place / MANIFEST_FILE} lists {name!r}, outside the folder: do not trust it")
        size, digest = (entry.get("size"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
        if not isinstance(size, int) or not isinstance(digest, str):
            raise ArtifactError(f"{place / MANIFEST_FILE} has no size and SHA-256 for {name}: {AGAIN}")
        files[name] = (size, digest)
    return files


def _verify(place: Path, name: str, size: int, digest: str) -> None:
    path = place / name
    if not resolved(path).is_relative_to(resolved(place)):
        raise ArtifactError(f"{path} leads outside the folder: do not trust it")
    if not path.is_file():
        raise ArtifactError(f"{place} lacks the file {name}: copy the whole folder, or save the engine again")
    actual = path.stat().st_size
    if actual != size:
        raise ArtifactError(f"{path} has {actual} bytes instead of {size}: it was cut or altered; copy it again")
    if sha256(path) != digest:
        raise ArtifactError(f"{path} was altered since it was saved (its SHA-256 differs); copy it again, or {AGAIN}")


def sha256(path: Path) -> str:
    """Of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
