from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fxopt
from fxopt.errors import ArtifactError, BackendUnavailable, InputError
from fxopt.lowering import TensorrtRtxBackend
from fxopt.runtime.tensorrt import Input, Runner, check_arrays, unavailable

BACKEND = TensorrtRtxBackend()
MISSING = unavailable()

needs_rtx = pytest.mark.skipif(BACKEND.unavailable() is not None, reason=str(BACKEND.unavailable()))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine") / "out"
    torch.manual_seed(0)
    fxopt.compile(nn.Linear(4, 2).eval(), torch.randn(2, 4), passes=[], backend=BACKEND).save(folder, compress=True)
    return folder


def test_it_is_imported_without_torch(new_process: Any) -> None:
    loaded = new_process.code(
        "import sys, fxopt.runtime.tensorrt; print('torch' in sys.modules, 'fxopt' in sys.modules)"
    )
    assert loaded.split() == ["False", "True"]


@needs_rtx
@pytest.mark.skipif(MISSING is None, reason="this machine has a GPU and pycuda")
def test_a_folder_is_read_without_torch_and_what_is_missing_is_said(saved: Path, new_process: Any) -> None:
    said = new_process.code(
        "import sys\n"
        "from fxopt.errors import BackendUnavailable\n"
        "from fxopt.runtime.tensorrt import Runner\n"
        "try:\n"
        f"    Runner({str(saved)!r})\n"
        "except BackendUnavailable as error:\n"
        "    print('torch' in sys.modules, 'tensorrt_rtx' in sys.modules, error)\n"
    )
    assert said.strip() == f"False True {MISSING}"


@needs_rtx
def test_a_damaged_folder_is_refused(saved: Path, tmp_path: Path) -> None:
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    plan = tmp_path / "engine.plan.xz"
    plan.write_bytes(plan.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="it was cut or altered"):
        Runner(tmp_path)
    with pytest.raises(ArtifactError, match="is not a folder"):
        Runner(tmp_path / "nowhere")


def test_an_engine_of_another_kind_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    fxopt.compile(nn.Linear(4, 2).eval(), torch.randn(2, 4), passes=[], backend="eager").save(folder)
    with pytest.raises(ArtifactError, match=r"holds an engine of the backend eager: fxopt\.load runs it"):
        Runner(folder)


@needs_rtx
def test_what_numpy_cannot_hold_is_refused(tmp_path: Path, new_process: Any) -> None:
    model = nn.Linear(4, 2).to(torch.bfloat16).eval()
    folder = tmp_path / "out"
    fxopt.compile(model, torch.randn(2, 4).bfloat16(), passes=[], backend=BACKEND, verify="structure").save(folder)
    # in a process of its own: ml_dtypes, which onnx imports, gives numpy the type
    said = new_process.code(
        "from fxopt.errors import FxoptError\n"
        "from fxopt.runtime.tensorrt import Runner\n"
        "try:\n"
        f"    Runner({str(folder)!r})\n"
        "except FxoptError as error:\n"
        "    print(type(error).__name__, error)\n"
    )
    assert said.strip() == "ArtifactError numpy has no bfloat16: import ml_dtypes first, which adds it"


def test_arrays_are_checked() -> None:
    specs = (Input("ids", np.dtype("int64"), (None, 3), ("batch", None)), Input("scale", np.dtype("float32"), (), ()))
    ids, scale = np.zeros((2, 3), np.int64), np.array(1.0, np.float32)
    check_arrays(specs, (ids, scale), {"batch": (1, 4)})
    for given, message in [
        ((ids,), r"expected 2 inputs \(ids, scale\), got 1"),
        ((ids.tolist(), scale), "input ids: expected a numpy array, got list"),
        ((ids.astype(np.int32), scale), "input ids: expected int64, got int32: convert it first"),
        ((ids[:, :2], scale), r"input ids: expected shape \[batch, 3\], got \[2, 2\]"),
        ((ids[:0], scale), "input ids: this engine takes a batch of 1 to 4, got 0"),
        ((ids, scale[None]), r"input scale: expected shape \[\], got \[1\]"),
    ]:
        with pytest.raises(InputError, match=message):
            check_arrays(specs, given, {"batch": (1, 4)})
    two = (specs[0], Input("other", np.dtype("int64"), (None,), ("batch",)))
    with pytest.raises(InputError, match="input other: expected batch 2 as the inputs before it, got 1"):
        check_arrays(two, (ids, np.zeros(1, np.int64)), {})


def test_arrays_of_several_sizes_are_checked() -> None:
    image = Input("image", np.dtype("float32"), (None, 3, None), ("batch", None, "width"))
    other = Input("other", np.dtype("float32"), (None, None), ("batch", "width"))
    limits = {"batch": (1, 4), "width": (8, 64)}
    wide = np.zeros((2, 3, 16), np.float32)
    check_arrays((image, other), (wide, wide[:, 0]), limits)
    with pytest.raises(InputError, match="input other: expected width 16 as the inputs before it, got 8"):
        check_arrays((image, other), (wide, wide[:, 0, :8]), limits)
    with pytest.raises(InputError, match="input image: this engine takes a width of 8 to 64, got 4"):
        check_arrays((image, other), (wide[:, :, :4], wide[:, 0]), limits)
    with pytest.raises(InputError, match=r"input image: expected shape \[batch, 3, width\], got \[2, 16\]"):
        check_arrays((image, other), (wide[:, 0], wide[:, 0]), limits)


@pytest.mark.gpu
@needs_rtx
@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
def test_it_answers_like_the_model_without_torch(saved: Path, new_process: Any) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    said = new_process.code(
        "import sys, numpy as np\n"
        "from fxopt.runtime.tensorrt import Runner\n"
        f"with Runner({str(saved)!r}) as runner:\n"
        "    for _ in range(2):\n"
        "        (y,) = runner(np.arange(12, dtype=np.float32).reshape(3, 4))\n"
        "assert 'torch' not in sys.modules\n"
        "print(*y.reshape(-1))\n"
    )
    expected = model(torch.arange(12.0).reshape(3, 4)).detach().reshape(-1)
    torch.testing.assert_close(torch.tensor(list(map(float, said.split()))), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(MISSING is None, reason="this machine has a GPU and pycuda")
def test_what_is_missing_is_what_is_raised(saved: Path) -> None:
    with pytest.raises(BackendUnavailable, match=r"pip install pycuda|no GPU|CUDA devices"):
        Runner(saved)
