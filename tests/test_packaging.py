"""The wheel and the source archive: each file once, and the wheel works where the sources are not."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from tests.conftest import ROOT, NewProcess

FOLDERS = {"fxopt": "fxopt", "passes": "fxopt/passes", "lowering": "fxopt/lowering"}


def source_files() -> list[Path]:
    """All files of the three packages that belong into the wheel, relative to the repository."""
    found = []
    for folder in FOLDERS:
        for file in sorted((ROOT / folder).rglob("*")):
            relative = file.relative_to(ROOT)
            linked = relative.parts[:2] in [("fxopt", "passes"), ("fxopt", "lowering")]
            if not linked and (file.suffix == ".py" or file.name == "py.typed"):
                found.append(relative)
    return found


def installed_name(source: Path) -> str:
    return "/".join([FOLDERS[source.parts[0]], *source.parts[1:]])


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source archive, and the wheel that was built from it."""
    copy = tmp_path_factory.mktemp("source") / "fxopt"
    ignored = shutil.ignore_patterns(
        ".git", ".venv", ".*_cache", ".hypothesis", "*.egg-info", "__pycache__", "build", "dist"
    )
    shutil.copytree(ROOT, copy, symlinks=True, ignore=ignored)
    target = tmp_path_factory.mktemp("archives")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(target), str(copy)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return target


@pytest.fixture(scope="module")
def installed(archives: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the wheel was installed, without what it depends on."""
    target = tmp_path_factory.mktemp("installed")
    (wheel,) = archives.glob("*.whl")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([*command, str(wheel)], check=True, capture_output=True)
    return target


def test_wheel_holds_each_file_once(archives: Path) -> None:
    (wheel,) = archives.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert [name for name, count in Counter(names).items() if count > 1] == []
    packaged = sorted(name for name in names if ".dist-info/" not in name)
    assert packaged == sorted(installed_name(file) for file in source_files())


def test_source_archive_holds_each_file_once(archives: Path) -> None:
    (sdist,) = archives.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    assert [member.name for member in members if member.issym() or member.islnk()] == []
    names = [member.name.partition("/")[2] for member in members if member.isfile()]
    packaged = sorted(name for name in names if name.split("/")[0] in FOLDERS)
    assert packaged == sorted(map(str, source_files()))


def test_wheel_declares_what_it_needs_and_offers(archives: Path) -> None:
    (wheel,) = archives.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        text = archive.read(metadata).decode()
        licenses = [name for name in archive.namelist() if name.endswith("/LICENSE")]
    assert "Requires-Dist: torch>=2.9" in text
    assert "License-Expression: Apache-2.0" in text
    assert len(licenses) == 1
    for extra in ("vision", "demo", "bench", "dev"):
        assert f"Provides-Extra: {extra}" in text


def test_wheel_compiles_and_reloads_where_the_sources_are_not(installed: Path, new_process: NewProcess) -> None:
    output = new_process.code(
        f"""
import sys, torch
from torch import nn
import fxopt, fxopt.passes, fxopt.lowering
for module in (fxopt, fxopt.passes, fxopt.lowering):
    assert module.__file__.startswith({str(installed)!r}), module.__file__
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
x = torch.randn(2, 3, 8, 8)
compiled = fxopt.compile(model, (x,))
assert [len(item.rewrites) for item in compiled.report.passes if item.name == "fold_batch_norm"] == [1]
compiled.save("engine")
torch.testing.assert_close(fxopt.load("engine")(x), model(x), rtol=1e-4, atol=1e-5)
print("equal")
""",
        path=[installed],
    )
    assert output.splitlines()[-1] == "equal"


def test_wheel_installs_the_command(installed: Path, new_process: NewProcess) -> None:
    result = new_process.run([str(installed / "bin" / "fxopt"), "passes"], path=[installed])
    assert result.returncode == 0, result.stderr
    assert "fold_batch_norm" in result.stdout


def test_packages_refuse_their_bare_names(new_process: NewProcess) -> None:
    for name in ("passes", "lowering"):
        result = new_process.run(["-c", f"import {name}"], path=[ROOT])
        assert result.returncode == 1
        message = result.stderr.splitlines()[-1]
        assert message.startswith("ImportError: ")
        assert f"fxopt.{name}" in message


def test_passes_are_imported_one_by_one(new_process: NewProcess) -> None:
    output = new_process.code(
        "import sys, fxopt.passes\n"
        "print('fxopt.passes.simplify' in sys.modules)\n"
        "fxopt.passes.FoldBatchNorm\n"
        "print('fxopt.passes.fold_batch_norm' in sys.modules, 'fxopt.passes.merge_branches' in sys.modules)\n"
        "print(sorted(fxopt.passes.__all__) == dir(fxopt.passes))\n"
        "print(all(hasattr(fxopt.passes, name) for name in fxopt.passes.__all__))"
    )
    assert output.split() == ["False", "True", "False", "True", "True"]


def test_importing_is_cheap(new_process: NewProcess) -> None:
    source = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import fxopt\n"
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)))"
    )
    # how many seconds that takes is a bar of the benchmark "overhead"
    assert set(new_process.code(source).split()) <= {"fxopt", "torch", "numpy", "__editable___fxopt_0_1_0_finder"}
