"""Plugins as users install them: found by name, named when broken, and refused when two claim one name."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, NewProcess

EXAMPLE = ROOT / "examples" / "fxopt_plugin_example"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip has installed the example."""
    copy = tmp_path_factory.mktemp("source") / "example"
    shutil.copytree(EXAMPLE, copy, ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
    target = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--target", str(target), str(copy)], check=True, capture_output=True)
    return target


def add_distribution(folder: Path, name: str, entry_points: str, source: str = "") -> Path:
    """Writes what pip would have installed for a package of one module: the module, and its metadata."""
    module = name.replace("-", "_")
    metadata = folder / f"{module}-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n", encoding="utf-8")
    (metadata / "entry_points.txt").write_text(entry_points, encoding="utf-8")
    (folder / f"{module}.py").write_text(source, encoding="utf-8")
    return folder


def test_is_found_by_name(installed: Path, new_process: NewProcess) -> None:
    output = new_process.code(
        """
import sys, torch
from torch import nn
import fxopt
model = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2), nn.ReLU()).eval()
assert "fxopt_plugin_example" not in sys.modules
program = fxopt.optimize(model, (torch.randn(2, 3, 8, 8),), ["drop_needless_relu(look_through=True)"])
print([(item.name, len(item.rewrites)) for item in program.report.passes])
print(fxopt.registry.make_pass("drop_needless_relu(look_through=False)"))
""",
        path=[installed],
    )
    assert output.splitlines() == ["[('drop_needless_relu', 1)]", "drop_needless_relu(look_through=False)"]


def test_is_listed_by_the_command(installed: Path, new_process: NewProcess) -> None:
    output = new_process.code("from fxopt.cli import main; main(['passes'])", path=[installed])
    assert "drop_needless_relu" in output
    assert "look_through=True" in output


def test_its_backend_is_found_by_name(installed: Path, new_process: NewProcess, tmp_path: Path) -> None:
    """An engine of a plugin's is saved, and loaded where the plugin is; elsewhere the name says what is missing."""
    source = f"""
import torch
from torch import nn
import fxopt
x = torch.ones(2, 3)
compiled = fxopt.compile(nn.Linear(3, 4).eval(), (x,), passes=[], backend="torchscript")
compiled.save({str(tmp_path / "engine")!r})
loaded = fxopt.load({str(tmp_path / "engine")!r})
print(loaded.engine.info()["backend"], torch.equal(loaded(x), compiled(x)))
"""
    assert new_process.code(source, path=[installed]) == "torchscript True\n"
    result = new_process.run(["-c", f"import fxopt; fxopt.load({str(tmp_path / 'engine')!r})"])
    assert "RegistryError: no backend named 'torchscript'" in result.stderr


def test_its_own_tests_pass(installed: Path, new_process: NewProcess) -> None:
    options = ["-q", "-p", "no:cacheprovider", "-W", "error", "--rootdir", str(EXAMPLE)]
    result = new_process.run(["-m", "pytest", *options, str(EXAMPLE / "tests")], path=[installed])
    assert result.returncode == 0, result.stdout
    assert "11 passed" in result.stdout


def test_is_unknown_where_it_is_not_installed(new_process: NewProcess) -> None:
    result = new_process.run(["-c", "import fxopt.registry; fxopt.registry.make_pass('drop_needless_relu')"])
    assert "RegistryError: no pass named 'drop_needless_relu'" in result.stderr


def test_broken_plugin_is_named_and_skipped(tmp_path: Path, new_process: NewProcess) -> None:
    folder = add_distribution(
        tmp_path / "site",
        "shaky-plugin",
        "[fxopt.passes]\nshake = shaky_plugin:Shake\n",
        source="raise OSError('its library is missing')",
    )
    result = new_process.run(["-c", "from fxopt.cli import main; main(['passes'])"], path=[folder])
    assert result.returncode == 0
    assert "fold_batch_norm" in result.stdout
    assert "shake" not in result.stdout
    assert result.stderr == (
        "warning: skipped 'shake' of the distribution shaky-plugin cannot be imported "
        "(OSError: its library is missing); reinstall or remove that package\n"
    )


def test_broken_plugin_stands_in_nobodys_way(tmp_path: Path, new_process: NewProcess) -> None:
    folder = add_distribution(
        tmp_path / "site", "shaky-plugin", "[fxopt.passes]\nshake = shaky_plugin:Shake\n", source="raise OSError"
    )
    source = (
        "import warnings; warnings.simplefilter('error')\n"
        "from fxopt import registry\n"
        "print(registry.make_pass('fold_batch_norm'))\n"
        "registry.make_pass('shake')"
    )
    result = new_process.run(["-c", source], path=[folder])
    assert result.stdout == "fold_batch_norm\n"
    assert "RegistryError: 'shake' of the distribution shaky-plugin cannot be imported" in result.stderr


def test_name_that_two_plugins_claim_is_an_error_naming_both(tmp_path: Path, new_process: NewProcess) -> None:
    first = add_distribution(tmp_path / "one", "first-plugin", "[fxopt.passes]\ntwin = first_plugin:Twin\n")
    second = add_distribution(tmp_path / "two", "second-plugin", "[fxopt.passes]\ntwin = second_plugin:Twin\n")
    source = "from fxopt import registry; registry.make_pass('twin')"
    result = new_process.run(["-c", source], path=[first, second])
    assert result.stderr.splitlines()[-1].endswith(
        "RegistryError: the name 'twin' is registered by first-plugin and second-plugin: uninstall one of them"
    )


def test_plugin_cannot_take_the_name_of_a_built_in(tmp_path: Path, new_process: NewProcess) -> None:
    folder = add_distribution(
        tmp_path / "site", "greedy-plugin", "[fxopt.passes]\nfold_batch_norm = greedy_plugin:Fold\n"
    )
    source = "from fxopt import registry; registry.make_pass('fold_batch_norm')"
    result = new_process.run(["-c", source], path=[folder])
    assert "'fold_batch_norm' is registered by fxopt and greedy-plugin" in result.stderr
