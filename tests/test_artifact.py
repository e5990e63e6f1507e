from __future__ import annotations

import copy
import hashlib
import json
import lzma
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from fxopt import artifact
from fxopt.backend import Engine
from fxopt.compare import compare
from fxopt.errors import ArtifactError, FxoptError
from fxopt.program import Program
from fxopt.registry import make_backend

ROOT = Path(__file__).resolve().parent.parent


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor, *, shift: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.linear(x) + shift, "shift": shift * 2}


def make(backend: str) -> tuple[Program, Engine]:
    torch.manual_seed(0)
    program = fxopt.capture(Net().eval(), {"x": torch.randn(2, 4), "shift": torch.randn(2, 3)})
    return program, make_backend(backend).lower(program, dynamic_batch=True)


def write(place: Path, program: Program, engine: Engine, backend: str = "onnx(num_threads=1)") -> None:
    artifact.write(
        place,
        engine=engine,
        backend=make_backend(backend),
        signature=program.signature,
        report=program.report,
        target=program.target,
    )


@pytest.fixture(scope="module")
def made() -> tuple[Program, Engine]:
    return make("onnx(num_threads=1)")


@pytest.fixture(scope="module")
def original(made: tuple[Program, Engine], tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("artifact") / "saved"
    write(place, *made)
    return place


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "copy")


def sign(data: dict[str, Any]) -> None:
    """What a forger would do: the checks behind the manifest's own SHA-256 must hold too."""
    body = {key: value for key, value in data.items() if key != "sha256"}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    data["sha256"] = hashlib.sha256(text.encode()).hexdigest()


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / artifact.MANIFEST_FILE
    data = json.loads(path.read_text())
    change(data)
    sign(data)
    path.write_text(json.dumps(data))


def test_what_is_written_is_read(folder: Path, made: tuple[Program, Engine]) -> None:
    program, engine = made
    manifest = artifact.read(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "model.onnx", "report.json"]
    assert manifest.backend == "onnx(num_threads=1)"
    assert manifest.signature.names == ("x", "shift")
    assert manifest.signature.to_json() == program.signature.to_json()
    assert [str(spec) for spec in manifest.inputs] == ["x: float32[batch, 4]", "shift: float32[batch, 3]"]
    assert manifest.target == program.target
    assert {"torch", "onnx", "onnxruntime"} <= manifest.versions.keys()
    assert manifest.files["model.onnx"][0] == (folder / "model.onnx").stat().st_size
    assert manifest.info == engine.info()
    assert manifest.created.endswith("+00:00")
    text = (folder / artifact.MANIFEST_FILE).read_text()
    assert str(folder.parent) not in text
    assert str(ROOT) not in text


@pytest.mark.parametrize("backend", ["onnx(num_threads=1)", "eager"])
def test_a_new_process_gives_the_same_answer_without_the_class(backend: str, tmp_path: Path, new_process: Any) -> None:
    program, engine = make(backend)
    place = tmp_path / "saved"
    write(place, program, engine, backend)
    inputs = program.inputs_with_batch(3)
    source = f"""
import json, sys, torch
from pathlib import Path
from fxopt import artifact
from fxopt.registry import make_backend
place = Path({str(place)!r})
manifest = artifact.read(place)
engine = make_backend(manifest.backend).load(place, manifest)
x, shift = (torch.tensor(value) for value in json.loads({json.dumps([tensor.tolist() for tensor in inputs])!r}))
outputs = manifest.signature.unflatten_outputs(engine(*manifest.signature.flatten_inputs((x,), {{"shift": shift}})))
print(json.dumps({{name: value.tolist() for name, value in outputs.items()}}))
"""
    outputs = json.loads(new_process.code(source, path=[ROOT]))
    assert list(outputs) == ["logits", "shift"]
    assert compare(engine(*inputs), [torch.tensor(value) for value in outputs.values()]).within(1e-6)


def test_an_artifact_is_replaced_as_a_whole(folder: Path, made: tuple[Program, Engine]) -> None:
    (folder / "model.onnx.data").write_bytes(b"x")
    edit(folder, lambda data: data["files"].update({"model.onnx.data": {"size": 1, "sha256": ""}}))
    write(folder, *made)
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "model.onnx", "report.json"]
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]  # no drafts, no old ones
    artifact.read(folder)


def test_a_damaged_artifact_can_be_replaced_too(folder: Path, made: tuple[Program, Engine]) -> None:
    (folder / "model.onnx").unlink()
    edit(folder, lambda data: data.update(format_version=999))
    write(folder, *made)
    artifact.read(folder)


def test_an_empty_folder_and_missing_parents_are_fine(tmp_path: Path, made: tuple[Program, Engine]) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", *made)
    write(tmp_path / "a" / "b", *made)
    artifact.read(tmp_path / "empty")
    artifact.read(tmp_path / "a" / "b")


def test_foreign_folders_and_files_are_not_overwritten(tmp_path: Path, made: tuple[Program, Engine]) -> None:
    foreign = tmp_path / "photos"
    foreign.mkdir()
    (foreign / "cat.jpg").write_bytes(b"cat")
    (foreign / artifact.MANIFEST_FILE).write_text('{"format": "other"}')
    with pytest.raises(ArtifactError, match="is not empty and was not written by fxopt: nothing was changed"):
        write(foreign, *made)
    assert (foreign / "cat.jpg").read_bytes() == b"cat"
    with pytest.raises(ArtifactError, match="exists and is not a folder"):
        write(foreign / "cat.jpg", *made)
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_what_the_user_put_into_an_artifact_is_not_lost(folder: Path, made: tuple[Program, Engine]) -> None:
    (folder / "notes").mkdir()
    (folder / "notes" / "mine.txt").write_text("mine")
    with pytest.raises(
        ArtifactError, match=r"also holds notes/mine.txt, which fxopt did not write: nothing was changed"
    ):
        write(folder, *made)
    assert (folder / "notes" / "mine.txt").read_text() == "mine"
    artifact.read(folder)


def test_a_save_that_fails_leaves_what_was_there(folder: Path, made: tuple[Program, Engine]) -> None:
    program, engine = made
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    class Full(type(engine)):  # type: ignore[misc]
        def save(self, directory: Path) -> None:
            (directory / "half").write_bytes(b"x")
            raise OSError(28, "No space left on device")

    full = object.__new__(Full)
    full.__dict__.update(engine.__dict__)
    with pytest.raises(ArtifactError, match="No space left on device"):
        write(folder, program, full)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_not_a_folder(folder: Path) -> None:
    with pytest.raises(ArtifactError, match=r"nowhere is not a folder: pass the folder that save\(\) wrote"):
        artifact.read(folder / "nowhere")
    with pytest.raises(ArtifactError, match=r"model.onnx is not a folder"):
        artifact.read(folder / "model.onnx")


def test_no_manifest(folder: Path) -> None:
    (folder / artifact.MANIFEST_FILE).unlink()
    with pytest.raises(ArtifactError, match=r"has no manifest.json: it is incomplete, or was not written by fxopt"):
        artifact.read(folder)


@pytest.mark.parametrize("text", ["{", "\ufeff\ud800".encode("utf-8", "surrogatepass"), "[" * 100_000, ""])
def test_a_manifest_that_is_no_json(folder: Path, text: str | bytes) -> None:
    (folder / artifact.MANIFEST_FILE).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ArtifactError, match=r"manifest.json is not readable JSON"):
        artifact.read(folder)


def test_a_manifest_that_is_no_object(folder: Path) -> None:
    (folder / artifact.MANIFEST_FILE).write_text("[1]")
    with pytest.raises(ArtifactError, match="holds a list, not an object"):
        artifact.read(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "is of format 'other', not 'fxopt'"),
        ({"format": None}, "is of format None, not 'fxopt'"),
        ({"format_version": 3}, "has format version 3, this fxopt reads up to 2: upgrade fxopt, or save"),
        ({"format_version": "1"}, "has the format version '1', which is not a number"),
        ({"format_version": True}, "has the format version True, which is not a number"),
        ({"files": None}, "lists no files"),
        ({"files": {"model.onnx": "x"}}, "has no size and SHA-256 for model.onnx"),
        ({"files": {}}, "does not list report.json: the folder is incomplete"),
        ({"inputs": [{"name": "x", "dtype": "load", "shape": [1]}]}, "lacks an entry or has a wrong one"),
        ({"target": {"device": "abacus"}}, "lacks an entry or has a wrong one"),
        ({"signature": {}}, "lacks an entry or has a wrong one"),
        ({"signature": []}, "lacks an entry or has a wrong one"),
        ({"engine": 3}, "lacks an entry or has a wrong one"),
        ({"engine": {"notes": None}}, "lacks an entry or has a wrong one"),
        ({"engine": {"notes": [1]}}, "lacks an entry or has a wrong one"),
        ({"inputs": [{"name": [], "dtype": "int8", "shape": [1]}]}, "lacks an entry or has a wrong one"),
        ({"inputs": []}, "are not those of the signature"),
    ],
)
def test_a_manifest_with_wrong_entries(folder: Path, change: dict[str, Any], message: str) -> None:
    edit(folder, lambda data: data.update(change))
    with pytest.raises(ArtifactError, match=message):
        artifact.read(folder)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/../../secret", "..\\secret", "C:\\secret", ""])
def test_a_manifest_that_leads_outside(folder: Path, name: str) -> None:
    (folder.parent / "secret").write_bytes(b"x")
    edit(folder, lambda data: data["files"].update({name: {"size": 1, "sha256": hashlib.sha256(b"x").hexdigest()}}))
    with pytest.raises(ArtifactError, match="outside the folder: do not trust it"):
        artifact.read(folder)


def test_a_link_that_leads_outside(folder: Path) -> None:
    shutil.move(folder / "model.onnx", folder.parent / "elsewhere")
    (folder / "model.onnx").symlink_to(folder.parent / "elsewhere")
    with pytest.raises(ArtifactError, match="leads outside the folder"):
        artifact.read(folder)


def test_a_missing_file(folder: Path) -> None:
    (folder / "model.onnx").unlink()
    with pytest.raises(ArtifactError, match=r"lacks the file model.onnx: copy the whole folder"):
        artifact.read(folder)


def test_a_truncated_file(folder: Path) -> None:
    path = folder / "model.onnx"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=r"model.onnx has \d+ bytes instead of \d+: it was cut or altered"):
        artifact.read(folder)


@pytest.mark.parametrize("name", ["model.onnx", "report.json"])
def test_an_altered_file(folder: Path, name: str) -> None:
    path = folder / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=f"{name} was altered since it was saved"):
        artifact.read(folder)


def test_a_report_that_is_none(folder: Path) -> None:
    text = '{"passes": 3}'
    (folder / "report.json").write_text(text)
    entry = {"size": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    edit(folder, lambda data: data["files"].update({"report.json": entry}))
    with pytest.raises(ArtifactError, match=r"report.json lacks an entry or has a wrong one"):
        artifact.read(folder)


def paths(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield at
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        yield from paths(entry, (*at, key))


WRONG: tuple[Any, ...] = (None, -1, True, 0.5, "?", [], {}, [[]])


def altered(data: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The manifest with one wrong value, for all of these at each place in it."""
    for at in paths(data):
        for value in WRONG:
            changed = copy.deepcopy({"": data})
            holder: Any = changed
            for key in ("", *at[:-1]) if at else ():
                holder = holder[key]
            last = at[-1] if at else ""
            if type(holder[last]) is type(value) and holder[last] == value:
                continue
            holder[last] = value
            yield f"{at}={value!r}", changed[""]


def test_any_alteration_of_the_manifest_is_noticed(folder: Path) -> None:
    path = folder / artifact.MANIFEST_FILE
    unnoticed, count = [], 0
    for what, data in altered(json.loads(path.read_text())):
        count += 1
        path.write_text(json.dumps(data))
        try:
            fxopt.load(folder)
        except ArtifactError:
            continue
        unnoticed.append(what)
    assert count > 300
    assert not unnoticed


def test_an_alteration_is_called_one(folder: Path) -> None:
    path = folder / artifact.MANIFEST_FILE
    path.write_text(path.read_text().replace("float32", "float16", 1))
    with pytest.raises(
        ArtifactError, match=r"manifest.json was altered since it was saved \(its own SHA-256 differs\)"
    ):
        artifact.read(folder)


def test_a_forged_manifest_ends_in_no_other_error(folder: Path) -> None:
    path = folder / artifact.MANIFEST_FILE
    accepted, others = [], []
    for what, data in altered(json.loads(path.read_text())):
        if isinstance(data, dict):
            sign(data)
        path.write_text(json.dumps(data))
        try:
            fxopt.load(folder)(torch.zeros(2, 4), shift=torch.zeros(2, 3))
            accepted.append(what)
        except FxoptError:
            continue
        except Exception as error:  # noqa: BLE001 (any is a failure, and all of them shall be listed)
            others.append(f"{what}: {error!r}")
    assert not others
    assert "('created',)='?'" in accepted  # so the signature of this test is right


def test_the_working_folder_stays_the_working_folder(
    tmp_path: Path, made: tuple[Program, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # into an empty folder, and over what the first one saved
        write(Path(), *made)
        assert Path.cwd() == tmp_path
        artifact.read(Path())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json", "model.onnx", "report.json"]


def test_a_folder_that_is_saved_to_stays_what_it_was(folder: Path, made: tuple[Program, Engine]) -> None:
    folder.chmod(0o700)
    number = folder.stat().st_ino
    write(folder, *made)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert folder.stat().st_ino == number


def test_the_folder_around_need_not_be_written(folder: Path, made: tuple[Program, Engine]) -> None:
    before = folder.parent.stat().st_mtime_ns
    write(folder, *made)
    assert folder.parent.stat().st_mtime_ns == before


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
@pytest.mark.parametrize("after", range(6))
def test_an_exchange_that_is_interrupted_is_taken_back(
    folder: Path, made: tuple[Program, Engine], monkeypatch: pytest.MonkeyPatch, error: BaseException, after: int
) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    rename, calls = Path.rename, []

    def failing(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == after + 1:
            raise error
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", failing)
        with pytest.raises(ArtifactError if isinstance(error, OSError) else KeyboardInterrupt):
            write(folder, *made)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_save_that_was_killed_is_explained_and_can_be_repeated(folder: Path, made: tuple[Program, Engine]) -> None:
    old = folder / ".fxopt-0123abcd.old"
    old.mkdir()
    for name in ("manifest.json", "report.json"):
        (folder / name).rename(old / name)
    with pytest.raises(ArtifactError, match=r"interrupted; what was there before is in .fxopt-0123abcd.old"):
        artifact.read(folder)
    write(folder, *made)
    artifact.read(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "model.onnx", "report.json"]


def test_places_that_cannot_be_are_explained(
    tmp_path: Path, made: tuple[Program, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a\0b", "x" * 300):
        with pytest.raises(ArtifactError, match=r"leads nowhere|cannot save to .*choose another place"):
            write(tmp_path / name, *made)
        with pytest.raises(ArtifactError, match=r"is not a folder|cannot read"):
            artifact.read(tmp_path / name)
    (tmp_path / "file").touch()
    with pytest.raises(ArtifactError, match=r"cannot save to .*; give write access or make room there"):
        write(tmp_path / "file" / "below", *made)
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(ArtifactError, match=r"leads nowhere .*pass the full path"):
        write(Path("here"), *made)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_folder_that_may_not_be_written_is_explained(tmp_path: Path, made: tuple[Program, Engine]) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(ArtifactError, match=r"Permission denied.*; give write access"):
            write(tmp_path / "new", *made)
    finally:
        tmp_path.chmod(0o700)


def test_a_default_that_is_a_tensor_must_be_passed_after_loading(tmp_path: Path) -> None:
    class Masked(nn.Module):
        def forward(self, x: torch.Tensor, mask: torch.Tensor = torch.full((3,), 2.0)) -> torch.Tensor:  # noqa: B008
            return x * mask

    x = torch.ones(2, 3)
    compiled = fxopt.compile(Masked().eval(), (x,), backend="eager")
    assert compiled(x).tolist() == (x * 2).tolist()
    compiled.save(tmp_path / "saved")
    loaded = fxopt.load(tmp_path / "saved")
    assert loaded(x, torch.full((3,), 4.0)).tolist() == (x * 4).tolist()
    with pytest.raises(fxopt.InputError, match="mask was left out: its default holds tensors"):
        loaded(x)


@pytest.fixture
def compressed(made: tuple[Program, Engine], tmp_path: Path) -> Path:
    place = tmp_path / "compressed"
    program, engine = made
    artifact.write(
        place,
        engine=engine,
        backend=make_backend("onnx(num_threads=1)"),
        signature=program.signature,
        report=program.report,
        target=program.target,
        compress=True,
    )
    return place


def test_compressed_files_are_those_of_the_plain_folder(compressed: Path, folder: Path) -> None:
    assert sorted(path.name for path in compressed.iterdir()) == ["manifest.json", "model.onnx.xz", "report.json"]
    manifest = artifact.read(compressed)
    assert manifest.packed == {"model.onnx": artifact.read(folder).files["model.onnx"]}
    with lzma.open(compressed / "model.onnx.xz") as file:  # any tool for .xz files reads them
        assert file.read() == (folder / "model.onnx").read_bytes()
    with artifact.unpacked(compressed, manifest) as place:
        assert [path.name for path in place.iterdir()] == ["model.onnx"]
        assert (place / "model.onnx").read_bytes() == (folder / "model.onnx").read_bytes()
    assert not place.exists()
    x, shift = torch.ones(3, 4), torch.ones(3, 3)
    answers = [fxopt.load(path)(x, shift=shift)["logits"] for path in (compressed, folder)]
    assert torch.equal(*answers)


def test_only_a_compressed_folder_needs_the_newer_format(compressed: Path, folder: Path) -> None:
    versions = [json.loads((path / "manifest.json").read_text())["format_version"] for path in (folder, compressed)]
    assert versions == [1, 2]
    with artifact.unpacked(folder, artifact.read(folder)) as place:
        assert place == folder


def test_a_compressed_folder_is_replaced_by_a_plain_one(compressed: Path, made: tuple[Program, Engine]) -> None:
    write(compressed, *made)
    assert sorted(path.name for path in compressed.iterdir()) == ["manifest.json", "model.onnx", "report.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"nothing of the kind", "is no readable .xz file"),
        (lzma.compress(bytes(10_000_000)), "does not hold the 100 bytes that were saved in it"),
        (lzma.compress(bytes(99)), "does not hold the 100 bytes that were saved in it"),
        (lzma.compress(b"1" * 100), "does not hold the 100 bytes that were saved in it"),
        (lzma.compress(bytes(100))[:-20], "is no readable .xz file"),
    ],
)
def test_a_compressed_file_with_other_contents_is_refused(compressed: Path, content: bytes, message: str) -> None:
    def change(data: dict[str, Any]) -> None:
        data["files"]["model.onnx.xz"] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        data["packed"]["model.onnx"] = {"size": 100, "sha256": hashlib.sha256(bytes(100)).hexdigest()}

    (compressed / "model.onnx.xz").write_bytes(content)
    edit(compressed, change)
    with pytest.raises(ArtifactError, match=message):
        fxopt.load(compressed)


@pytest.mark.parametrize(
    ("packed", "message"),
    [
        ({"../model.onnx": {"size": 1, "sha256": ""}}, "outside the folder"),
        ({"other": {"size": 1, "sha256": ""}}, "does not list other.xz"),
        (["model.onnx"], "lists no packed"),
    ],
)
def test_a_manifest_with_wrong_packed_files(compressed: Path, packed: Any, message: str) -> None:
    edit(compressed, lambda data: data.update(packed=packed))
    with pytest.raises(ArtifactError, match=message):
        artifact.read(compressed)
