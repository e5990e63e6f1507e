from __future__ import annotations

from pathlib import Path

import pytest

import fxopt.lowering

ROOT = Path(__file__).resolve().parents[2]


def test_every_public_name_resolves() -> None:
    for name in dir(fxopt.lowering):
        assert getattr(fxopt.lowering, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'NoBackend'"):
        fxopt.lowering.NoBackend  # noqa: B018 (the access is the test)


def test_a_second_import_under_the_bare_name_is_refused(new_process) -> None:  # type: ignore[no-untyped-def]
    result = new_process.run(["-c", "import lowering"], path=[ROOT])
    assert result.returncode == 1
    assert "import this package as fxopt.lowering, not as lowering" in result.stderr


def test_naming_a_backend_imports_no_runtime(new_process) -> None:  # type: ignore[no-untyped-def]
    source = "import sys\nfrom fxopt.lowering import OnnxBackend, EagerBackend\nprint('onnxruntime' in sys.modules)"
    assert new_process.code(source).strip() == "False"
