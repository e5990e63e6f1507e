"""A quantized network that can be called, and the methods that make one: fxopt and its peers.

All run on one thread of the CPU. Whatever ends in ONNX Runtime is read from its file and called in the same way.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fxopt
from benchmarks.quantize.subjects import Subject
from fxopt.registry import passes, pipelines

__all__ = [
    "FLOAT",
    "FXOPT",
    "OPENVINO",
    "ORT",
    "PER_TENSOR",
    "TORCHAO",
    "Engine",
    "Files",
    "Maker",
    "Missing",
    "float_engine",
    "methods",
    "ort",
]

FLOAT = "fp32 onnx"
OPENVINO = "NNCF, OpenVINO"
TORCHAO = "torchao pt2e"

FXOPT: Mapping[str, tuple[str, ...]] = {"fxopt": ("default", "quantize")}
"""The variants of fxopt: name -> specs of passes. The bars are about the first."""

ORT: Mapping[str, Mapping[str, Any]] = {
    "ORT U8S8 min-max": {},
    "ORT U8S8 min-max, reduce_range": {"reduce_range": True},
    "ORT U8S8 percentile": {"calibrate_method": "Percentile"},
    "ORT U8S8 entropy": {"calibrate_method": "Entropy"},
    "ORT S8S8 min-max": {"activation_type": "QInt8"},
    "ORT U8U8 min-max": {"weight_type": "QUInt8"},
}
"""The schemes of ONNX Runtime: name -> options of `quantize_static`, enumerators by name."""

PER_TENSOR: Mapping[str, Any] = {"per_channel": False, "reduce_range": True}
"""One scale for each weight, of 7 bits, which fit a processor that adds up products in 16."""


class Missing(Exception):
    """A method that cannot run here; the message says why."""


@dataclass(frozen=True)
class Engine:
    """A network to call.

    Attributes:
        run: images to logits, without gradients; any number of images.
        nbytes: of the file or files; None where nothing is written.
        timed: whether its latency says anything.
    """

    run: Callable[[Tensor], Tensor]
    nbytes: int | None
    timed: bool = True


class Files(NamedTuple):
    """What a method reads and where it writes: the float network as ONNX, and a folder of its own."""

    float_onnx: Path
    folder: Path


Maker = Callable[[Subject, Files], Engine]
"""Makes an engine of a network."""


def methods(*, inductor: bool) -> dict[str, Maker]:
    """All that is compared, by name.

    Args:
        inductor: whether torchao's network is compiled by inductor, which takes minutes, to be timed.
    """
    makers: dict[str, Maker] = {name: partial(_fxopt, specs) for name, specs in FXOPT.items()}
    makers |= {name: partial(ort, options) for name, options in ORT.items()}
    return {**makers, OPENVINO: _openvino, TORCHAO: partial(_torchao, inductor)}


def float_engine(subject: Subject, folder: Path) -> tuple[Engine, Path]:
    """The network in float32, its batch norms folded, and its ONNX file, which the peers read too."""
    path = _compiled(subject, ("default",), folder)
    return _onnx_engine(path), path


def _compiled(subject: Subject, specs: tuple[str, ...], folder: Path) -> Path:
    compiled = fxopt.compile(
        subject.model,
        subject.example(),
        passes=list(specs),
        backend="onnx(num_threads=1)",
        calibration=subject.batches(),
        on_no_match="ignore",
    )
    compiled.save(folder / "fxopt")
    (path,) = (folder / "fxopt").rglob("model.onnx")
    return path


def _fxopt(specs: tuple[str, ...], subject: Subject, files: Files) -> Engine:
    wanted = [spec.partition("(")[0] for spec in specs]
    unknown = [name for name in wanted if name not in passes() and name not in pipelines()]
    if unknown:
        raise Missing(f"no pass {', '.join(unknown)} is registered")
    return _onnx_engine(_compiled(subject, specs, files.folder))


def _onnx_engine(path: Path) -> Engine:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (name,) = (item.name for item in session.get_inputs())
    nbytes = sum(each.stat().st_size for each in path.parent.glob(f"{path.name}*"))
    return Engine(lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0]), nbytes)


def ort(options: Mapping[str, Any], subject: Subject, files: Files) -> Engine:
    """The network by ONNX Runtime's `quantize_static`, from the float network's file."""
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared, path = files.folder / "prepared.onnx", files.folder / "model.onnx"
    quant_pre_process(files.float_onnx, prepared, skip_symbolic_shape=True)
    quantize_static(
        prepared,
        path,
        _Reader(subject, prepared),
        quant_format=QuantFormat.QDQ,
        per_channel=options.get("per_channel", True),
        reduce_range=options.get("reduce_range", False),
        activation_type=QuantType[options.get("activation_type", "QUInt8")],
        weight_type=QuantType[options.get("weight_type", "QInt8")],
        calibrate_method=CalibrationMethod[options.get("calibrate_method", "MinMax")],
        # not for min-max alone: without it the outputs of all layers for all images are in memory at once
        extra_options={"CalibStridedMinMax": 1},
    )
    return _onnx_engine(path)


class _Reader:
    """The calibration images as ONNX Runtime asks for them, a batch at a time."""

    def __init__(self, subject: Subject, path: Path) -> None:
        import onnx

        self._name = onnx.load(path, load_external_data=False).graph.input[0].name
        self._batches = subject.batches()
        self._rest = iter(self._batches)

    def __len__(self) -> int:
        return len(self._batches)

    def set_range(self, start_index: int, end_index: int) -> None:
        self._rest = iter(self._batches[start_index:end_index])

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self._rest, None)
        return None if batch is None else {self._name: batch.numpy()}


def _openvino(subject: Subject, files: Files) -> Engine:
    nncf, openvino = _package("nncf"), _package("openvino")
    core = openvino.Core()
    data = nncf.Dataset([image[None].numpy() for image in subject.calibration])
    kind = nncf.ModelType.TRANSFORMER if subject.transformer else None
    quantized = nncf.quantize(
        core.read_model(files.float_onnx), data, subset_size=len(subject.calibration), model_type=kind
    )
    openvino.save_model(quantized, files.folder / "model.xml", compress_to_fp16=False)
    quantized.reshape([1, *subject.test.shape[1:]])
    # by itself it computes in bfloat16 what stays in float, where the machine can
    settings = {"INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    request = core.compile_model(quantized, "CPU", settings).create_infer_request()

    def run(x: Tensor) -> Tensor:
        # a request's output is its own memory
        found = [torch.tensor(request.infer([image[None].numpy()])[0]) for image in x]
        return torch.cat(found)

    return Engine(run, sum(path.stat().st_size for path in files.folder.glob("model.*")))


def _torchao(inductor: bool, subject: Subject, files: Files) -> Engine:
    _package("torchao")
    from torchao.quantization.pt2e import move_exported_model_to_eval
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    batch = torch.export.Dim("batch", min=1, max=4096)
    exported = torch.export.export(subject.model, subject.example(), dynamic_shapes=({0: batch},)).module()
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(exported, quantizer)
    for images in subject.batches():
        prepared(images)
    converted = convert_pt2e(prepared)
    move_exported_model_to_eval(converted)
    path = files.folder / "model.pt"
    # the float weights, which the graph no longer reads, are still among its parameters
    read = {node.target for node in converted.graph.nodes if node.op == "get_attr"}
    torch.save({name: tensor for name, tensor in converted.state_dict().items() if name in read}, path)
    if inductor:
        import torch._inductor.config as config

        config.freezing = True
        converted = torch.compile(converted)
    return Engine(converted, path.stat().st_size, timed=inductor)


def _package(name: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ImportError as error:
        raise Missing(f"{error}: pip install {name}") from error
