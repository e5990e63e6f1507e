"""The backend `openvino`: the program's ONNX model, read and compiled by OpenVINO for the CPU.

What OpenVINO makes of types is its own: the option `precision` says what floating layers compute in, whatever the types
in the graph, and quantize and dequantize nodes become integer kernels. `info()["layers"]` says what really runs.

The model is handed over as a file with its weights beside it, so the 2 GiB limit of protobuf is no limit. It is saved
as OpenVINO's own `model.xml` and `model.bin`, which load without ONNX.
"""

from __future__ import annotations

import importlib.util
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import torch

from fxopt.backend import Backend, Engine, TensorSpec
from fxopt.errors import ArtifactError, BackendError, BackendUnavailable
from fxopt.integer_scheme import Scheme
from fxopt.ops import DYNAMIC
from fxopt.options import check_choice
from fxopt.packed_weight import PackedWeight

if TYPE_CHECKING:
    from fxopt.artifact import Manifest
    from fxopt.program import Program
    from fxopt.target import Target

__all__ = ["OpenVinoBackend"]

Hint = Literal["latency", "throughput"]
Precision = Literal["float32", "bfloat16", "float16"]

_NAMES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
_OTHER_FLOATS = (torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True, kw_only=True)
class OpenVinoBackend(Backend):
    """Runs programs in OpenVINO, on the CPU.

    Attributes:
        hint: what it is tuned for: "latency" of one call, or "throughput" of several threads that call it.
        num_threads: of all calls together; None: as many as torch uses when the engine is made.
        precision: what floating layers compute in, whatever the types in the graph.
    """

    name: ClassVar[str] = "openvino"
    tolerance: ClassVar[float] = 1e-3

    hint: Hint = "latency"
    num_threads: int | None = None
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        check_choice("hint", self.hint, get_args(Hint))
        check_choice("precision", self.precision, get_args(Precision))
        # a spec string may give values of any type
        threads: object = self.num_threads
        if threads is not None and (type(threads) is not int or threads < 1):
            raise ValueError(f"num_threads must be an integer of at least 1, or None, not {threads!r}")

    def unavailable(self) -> str | None:
        return None if importlib.util.find_spec("openvino") else "openvino not installed: pip install openvino"

    def scheme(self, target: Target) -> Scheme:
        return Scheme.of(target).adding("within_places")._replace(fewest_terms=0)

    def lower(self, program: Program, *, dynamic_batch: bool) -> Engine:
        self._require_available(program.target)
        from fxopt.lowering.onnx_lower import onnx_of
        from fxopt.lowering.openvino_session import OpenVinoEngine, compile_model, read_model

        self._require_whole_blocks(program)
        lowered = onnx_of(program, dynamic_batch=dynamic_batch, optimize=True)
        started = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="fxopt-") as folder:
            # OpenVINO may read weights as late as it compiles
            lowered.model.save(Path(folder), one_file_below=0)
            try:
                model = read_model(Path(folder) / "model.onnx")
                compiled = compile_model(model, self._config())
            except BackendError as error:
                advice = "backend='onnx' may run it: ONNX Runtime has other operators"
                if any(program.op(node) == "quantize" for node in program.nodes):
                    advice = "backend='onnx' may run it, or ignore= of quantize, which leaves layers in floating point"
                raise BackendError(f"{error}. {advice}") from error
        seconds = lowered.seconds | {"compile": time.perf_counter() - started}
        inputs = TensorSpec.of_program(program, dynamic_batch=lowered.dynamic_batch)
        notes = [*lowered.notes, *self._notes(program)]
        return OpenVinoEngine(model, compiled, inputs=inputs, notes=notes, seconds=seconds)

    def load(self, directory: Path, manifest: Manifest) -> Engine:
        self._require_available(manifest.target)
        from fxopt.lowering.openvino_session import MODEL_FILE, OpenVinoEngine, compile_model, read_model

        path = directory / MODEL_FILE
        try:
            model = read_model(path)
        except BackendError as error:
            raise ArtifactError(f"{path} is not a readable OpenVINO model: {error}. Compile and save again.") from error
        compiled = compile_model(model, self._config())
        return OpenVinoEngine(model, compiled, inputs=manifest.inputs, notes=manifest.notes)

    def _config(self) -> dict[str, Any]:
        return {
            "PERFORMANCE_HINT": self.hint.upper(),
            "INFERENCE_PRECISION_HINT": _NAMES[self.precision],
            "INFERENCE_NUM_THREADS": self.num_threads or torch.get_num_threads(),
            # it would quantize what layers with packed weights read
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
        }

    def _notes(self, program: Program) -> list[str]:
        from fxopt.analysis.shapes import shapes, specs_in

        held = {spec.dtype for spec in specs_in(tuple(program.analysis(shapes).values()))}
        names = [str(dtype).removeprefix("torch.") for dtype in _OTHER_FLOATS if dtype in held]
        others = [name for name in names if name != self.precision]
        notes = []
        if others:
            notes.append(
                f"what is {' or '.join(others)} in the program is computed in {self.precision}: OpenVINO's kernels go "
                "by the option precision"
            )
        if any(program.op(node) in DYNAMIC for node in program.nodes):
            notes.append(
                "layers that are quantized dynamically compute in floating point: OpenVINO has no integer kernels for "
                "them, and mode='static' is faster"
            )
        return notes

    def _require_whole_blocks(self, program: Program) -> None:
        for node in program.nodes:
            weight = program.module_of(node)
            if isinstance(weight, PackedWeight) and weight.places % weight.block:
                raise BackendError(
                    f"{node.target} has {weight.places} inputs in blocks of {weight.block}, and OpenVINO takes whole "
                    "blocks only: pass group_size=None to quantize, or one that divides them; backend='onnx' runs this"
                )

    def _require_available(self, target: Target) -> None:
        reason = self.unavailable()
        if reason is not None:
            raise BackendUnavailable(f"backend openvino: {reason}")
        if target.device != "cpu":
            raise BackendError(f'backend openvino runs on the CPU, and the target is {target.device!r}: use "onnx"')
        from fxopt.lowering.openvino_session import capabilities

        wanted = {"float32": "FP32", "bfloat16": "BF16", "float16": "FP16"}[self.precision]
        if wanted not in capabilities():
            raise BackendUnavailable(
                f"backend openvino: this processor does not compute in {self.precision}, OpenVINO would take float32: "
                "leave out precision"
            )
