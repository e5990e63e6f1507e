"""The built-in backends, one file each, under the import name `fxopt.lowering`.

Names resolve when they are first used, so that one backend does not import what another needs.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if __name__ != "fxopt.lowering":
    # A second import would make a second class object of every backend, and `isinstance` would fail between the two.
    raise ImportError(f"import this package as fxopt.lowering, not as {__name__}")

if TYPE_CHECKING:
    from fxopt.lowering.auto import AutoBackend
    from fxopt.lowering.eager import EagerBackend
    from fxopt.lowering.inductor import InductorBackend
    from fxopt.lowering.onnx import OnnxBackend
    from fxopt.lowering.openvino import OpenVinoBackend
    from fxopt.lowering.tensorrt import TensorrtBackend, TensorrtRtxBackend

__all__ = [
    "AutoBackend",
    "EagerBackend",
    "InductorBackend",
    "OnnxBackend",
    "OpenVinoBackend",
    "TensorrtBackend",
    "TensorrtRtxBackend",
]

_HOMES = {
    "AutoBackend": "auto",
    "EagerBackend": "eager",
    "InductorBackend": "inductor",
    "OnnxBackend": "onnx",
    "OpenVinoBackend": "openvino",
    "TensorrtBackend": "tensorrt",
    "TensorrtRtxBackend": "tensorrt",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return __all__
