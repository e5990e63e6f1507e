"""The code blocks of the documents that users copy from run as they stand, one document's in order."""

from __future__ import annotations

import re
import sys
import types
import warnings
from pathlib import Path

import pytest

from tests.conftest import ROOT

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#:]+)\)")
DOCUMENTS = ["README.md", "docs/writing_a_pass.md"]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_code_blocks_run(document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / document).read_text(encoding="utf-8")
    blocks = list(BLOCK.finditer(text))
    assert blocks
    # A registered module, as the user's file is: dataclasses look up there what their annotations name.
    module = types.ModuleType("users_file")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for block in blocks:
        first_line = text.count("\n", 0, block.start()) + 2
        padded = "\n" * (first_line - 1) + block[1]
        exec(compile(padded, document, "exec", dont_inherit=True), vars(module))


@pytest.mark.parametrize("document", [*DOCUMENTS, "CONTRIBUTING.md", "docs/architecture.md"])
def test_links_lead_somewhere(document: str) -> None:
    path = ROOT / document
    targets = LINK.findall(BLOCK.sub("", path.read_text(encoding="utf-8")))
    assert [target for target in targets if not (path.parent / target).exists()] == []


def test_the_two_commands_are_targets() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    commands = re.findall(r"make (\w+)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert {"demo", "test"} <= set(commands)
    assert [name for name in commands if f"\n{name}:" not in makefile] == []


def test_tables_name_what_is_registered() -> None:
    from fxopt import registry

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # plugins that happen to be installed beside it are not this test's business
        built_in = {
            name
            for kinds in (registry.passes(), registry.backends())
            for name, kind in kinds.items()
            if kind.__module__.startswith("fxopt.")
        }
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)) == built_in
