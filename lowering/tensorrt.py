"""The backends `tensorrt` and `tensorrt_rtx`: engines for NVIDIA GPUs, built from a program's ONNX model.

`tensorrt` builds for the GPU that is there. `tensorrt_rtx` builds engines for several kinds of GPUs, on a machine that
needs none; they are finished in seconds where they first run. Precision is that of the program: `cast_precision` and
`quantize` decide on it, and no option of a builder.

Engines take tensors on the CUDA device of the target, and on "cuda:0" where the target is a CPU: whatever the program
was made with. Where there is no GPU, an engine can be made, saved and loaded, and calling it raises
`BackendUnavailable`.

Each step has a file: `onnx_lower`, `tensorrt_build`, `tensorrt_engine` with `tensorrt_contexts`, `tensorrt_layers`.
`fxopt.runtime.tensorrt` runs what is saved without torch.
"""

from __future__ import annotations

import importlib.util
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from fxopt.backend import Backend, Engine, TensorSpec
from fxopt.errors import ArtifactError, BackendError, BackendUnavailable, InputError
from fxopt.free_axes import BATCH
from fxopt.integer_scheme import INT8, Scheme
from fxopt.lowering.tensorrt_device import no_gpu
from fxopt.options import check_choice, check_count, check_flag
from fxopt.runtime.tensorrt_plan import PACKAGES, PLAN_FILE, load_module

if TYPE_CHECKING:
    from fxopt.artifact import Manifest
    from fxopt.lowering.onnx_model import OnnxModel
    from fxopt.lowering.tensorrt_build import Sizes
    from fxopt.program import Program
    from fxopt.target import Target

__all__ = ["TensorrtBackend", "TensorrtRtxBackend"]

_MOST = 32
_TF32_TOLERANCE = 1e-2


@dataclass(frozen=True, kw_only=True)
class _Tensorrt(Backend):
    """What both flavours share.

    Attributes:
        min_batch: the smallest batch, where the batch is free.
        opt_batch: the batch that kernels are chosen for; None: the example's.
        max_batch: the largest batch; None: 32, or twice `opt_batch` where that is more.
        ranges: of the other free axes: name, smallest size, the one that kernels are chosen for, and largest.
        workspace_bytes: GPU memory that a layer may use besides its tensors; None: all there is.
        tf32: whether products of float32 may round what they read to 10 bits of mantissa.
        cuda_graph: whether calls are captured as CUDA graphs, one for each batch size that is met, and replayed.
    """

    tolerance: ClassVar[float] = 1e-3

    min_batch: int = 1
    opt_batch: int | None = None
    max_batch: int | None = None
    ranges: tuple[tuple[str, int, int, int], ...] = ()
    workspace_bytes: int | None = None
    tf32: bool = False
    cuda_graph: bool = False

    def __post_init__(self) -> None:
        check_count("min_batch", self.min_batch)
        for name in ("opt_batch", "max_batch", "workspace_bytes"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        if not _are_ranges(self.ranges):
            raise ValueError(
                'ranges must be a tuple such as (("height", 64, 224, 512),), of names and growing sizes, '
                f"not {self.ranges!r}"
            )
        for name in ("tf32", "cuda_graph"):
            check_flag(name, getattr(self, name))
        given = [size for size in (self.min_batch, self.opt_batch, self.max_batch) if size is not None]
        if given != sorted(given):
            raise ValueError(f"min_batch, opt_batch and max_batch must grow in this order, not {given}")
        if self.tf32:
            object.__setattr__(self, "tolerance", _TF32_TOLERANCE)

    def unavailable(self) -> str | None:
        if importlib.util.find_spec(self.name) is None:
            return f"{self.name} not installed: pip install {PACKAGES[self.name]}"
        return None

    def device(self, target: Target) -> torch.device:
        found = super().device(target)
        return found if found.type == "cuda" else torch.device("cuda", 0)

    def scheme(self, target: Target) -> Scheme:
        """Signed and symmetric, whatever the target: its engines run on no CPU. Biases stay floating numbers."""
        return Scheme(INT8, INT8, None, integer_biases=False)

    def lower(self, program: Program, *, dynamic_batch: bool) -> Engine:
        self._require_available()
        from fxopt.lowering.onnx_lower import onnx_of
        from fxopt.lowering.tensorrt_build import build
        from fxopt.lowering.tensorrt_engine import TensorrtEngine

        module, device = load_module(self.name), self.device(program.target)
        lowered = onnx_of(program, dynamic_batch=dynamic_batch, optimize=True, dequantize=True)
        ranges = self._ranges(program) | ({BATCH: self._batches(program)} if lowered.dynamic_batch else {})
        inputs = TensorSpec.of_program(program, dynamic_batch=lowered.dynamic_batch)
        sparse = self._sparse_layers(lowered.model)
        started = time.perf_counter()
        with nullcontext() if no_gpu(device) else torch.cuda.device(device):
            built = build(
                module,
                lowered.model,
                inputs=inputs,
                output_types=_output_types(program),
                ranges=ranges,
                configured=lambda config: self._configured(module, config, sparse=bool(sparse)),
            )
        info = {
            "backend": self.name,
            "version": str(module.__version__),
            "device": str(device),
            "ranges": {name: list(sizes) for name, sizes in ranges.items()},
            "bytes": len(built.plan),
            "outputs": built.outputs,
            "host_code": self._host_code,
            "seconds": lowered.seconds | {"build": time.perf_counter() - started},
            "layers": built.layers,
            "notes": [*lowered.notes, *([f"sparse kernels are allowed for {sparse}"] if sparse else [])],
        }
        engine = TensorrtEngine(built.plan, inputs=inputs, device=device, info=info, cuda_graph=self.cuda_graph)
        engine.inspect()
        return engine

    def load(self, directory: Path, manifest: Manifest) -> Engine:
        self._require_available()
        from fxopt.lowering.tensorrt_engine import TensorrtEngine, checked_info

        path = directory / PLAN_FILE
        try:
            plan = path.read_bytes()
        except OSError as error:
            raise ArtifactError(f"{path} holds the engine and cannot be read: {error}") from error
        info = checked_info(manifest.info, self.name, path)
        return TensorrtEngine(
            plan, inputs=manifest.inputs, device=self.device(manifest.target), info=info, cuda_graph=self.cuda_graph
        )

    @contextmanager
    def _configured(self, module: Any, config: Any, *, sparse: bool) -> Iterator[None]:
        """Sets the options of a builder's configuration, for as long as it builds."""
        if self.workspace_bytes is not None:
            config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, self.workspace_bytes)
        if not self.tf32:
            config.clear_flag(module.BuilderFlag.TF32)
        yield

    @property
    def _host_code(self) -> bool:
        """Whether plans hold code that runs on the CPU."""
        return False

    def _sparse_layers(self, model: OnnxModel) -> str:
        """The layers that sparse kernels are allowed for, separated by commas."""
        return ""

    def _ranges(self, program: Program) -> dict[str, Sizes]:
        """Of the free axes beside the batch."""
        from fxopt.lowering.tensorrt_build import Sizes

        given = {name: Sizes(*sizes) for name, *sizes in self.ranges}
        for axis in program.free_axes:
            sizes = given.get(axis.name)
            if sizes is None:
                raise BackendError(
                    f"a {self.name} engine is made for a range of sizes, and none is given for {axis.name}: write "
                    f"ranges=(({axis.name!r}, smallest, {axis.size}, largest),), or leave it out of dynamic_axes"
                )
            if not sizes.least <= axis.size <= sizes.most:
                raise InputError(
                    f"the example's {axis.name} of {axis.size} must be one that the engine takes: it is for "
                    f"{sizes.least} to {sizes.most} by ranges"
                )
        others = sorted(given.keys() - {axis.name for axis in program.free_axes})
        if others:
            raise InputError(f"ranges names {', '.join(others)}, which dynamic_axes does not")
        return given

    def _batches(self, program: Program) -> Sizes:
        from fxopt.lowering.tensorrt_build import Sizes

        assert program.batch is not None
        example = program.batch.size
        best = example if self.opt_batch is None else self.opt_batch
        batches = Sizes(self.min_batch, best, max(_MOST, 2 * best) if self.max_batch is None else self.max_batch)
        if not batches.least <= min(example, best) <= max(example, best) <= batches.most:
            raise InputError(
                f"the example's batch of {example} must be one that the engine takes: it is for {batches.least} to "
                f"{batches.most} by min_batch and max_batch, and best at {best}"
            )
        return batches

    def _require_available(self) -> None:
        reason = self.unavailable()
        if reason is not None:
            raise BackendUnavailable(f"backend {self.name}: {reason}")


def _are_ranges(value: Any) -> bool:
    """Whether that is a tuple of a name and three growing sizes, each name once."""
    whole = isinstance(value, tuple) and all(
        isinstance(item, tuple)
        and len(item) == 4
        and isinstance(item[0], str)
        and all(type(size) is int and size > 0 for size in item[1:])
        and list(item[1:]) == sorted(item[1:])
        for item in value
    )
    return whole and len({item[0] for item in value}) == len(value)


@dataclass(frozen=True, kw_only=True)
class TensorrtBackend(_Tensorrt):
    """Builds engines with TensorRT 10 or 11, for the GPU of this machine.

    Attributes, besides those of all flavours:
        optimization_level: how long the builder looks for fast kernels, from 0 to 5; None: its default.
        sparsity: whether layers with two zeros in every four weights may use sparse kernels.
        timing_cache: file that keeps what was measured for the next build; made where there is none.
        version_compatible: whether later versions of TensorRT can run the engine. It then holds a runtime that runs on
            the CPU: load such engines only from whom you trust.
        hardware_compatible: whether all GPUs from Ampere on can run it, not only those of the kind that is here.
    """

    name: ClassVar[str] = "tensorrt"

    optimization_level: int | None = None
    sparsity: bool = True
    timing_cache: str | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.optimization_level is not None:
            check_choice("optimization_level", self.optimization_level, range(6))
        if self.timing_cache is not None and not isinstance(self.timing_cache, str):
            raise ValueError(f"timing_cache must be the path of a file, or None, not {self.timing_cache!r}")
        for name in ("sparsity", "version_compatible", "hardware_compatible"):
            check_flag(name, getattr(self, name))

    def unavailable(self) -> str | None:
        return super().unavailable() or no_gpu(torch.device("cuda", 0))

    @property
    def _host_code(self) -> bool:
        return self.version_compatible

    def _sparse_layers(self, model: OnnxModel) -> str:
        from fxopt.lowering.onnx_lower import SPARSITY_KEY

        marks = {item.key: item.value for item in model.graph.metadata_props}
        return str(marks.get(SPARSITY_KEY, "")) if self.sparsity else ""

    @contextmanager
    def _configured(self, module: Any, config: Any, *, sparse: bool) -> Iterator[None]:
        with super()._configured(module, config, sparse=sparse):
            if sparse:
                config.set_flag(module.BuilderFlag.SPARSE_WEIGHTS)
            if self.optimization_level is not None:
                config.builder_optimization_level = self.optimization_level
            if self.version_compatible:
                config.set_flag(module.BuilderFlag.VERSION_COMPATIBLE)
            if self.hardware_compatible:
                config.hardware_compatibility_level = module.HardwareCompatibilityLevel.AMPERE_PLUS
            if self.timing_cache is None:
                yield
                return
            path = Path(self.timing_cache)
            cache = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
            if cache is None or not config.set_timing_cache(cache, False):
                raise BackendError(f"{path} is no timing cache of this TensorRT on this GPU: delete it")
            yield
            path.write_bytes(bytes(config.get_timing_cache().serialize()))


@dataclass(frozen=True, kw_only=True)
class TensorrtRtxBackend(_Tensorrt):
    """Builds engines with TensorRT-RTX, for several kinds of GPUs; needs none to build.

    Attributes, besides those of all flavours:
        compute_capabilities: the kinds of GPUs, such as ("8.6", "12.0"), each of which makes the engine larger; None:
            all that RTX serves together, from Ampere on.
    """

    name: ClassVar[str] = "tensorrt_rtx"

    compute_capabilities: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        given: object = self.compute_capabilities
        if given is None:
            return
        if not isinstance(given, tuple) or not given or not all(map(_is_capability, given)):
            raise ValueError(f'compute_capabilities must be a tuple such as ("8.6", "12.0"), or None, not {given!r}')
        if len(set(given)) != len(given):
            raise ValueError(f"compute_capabilities has one of {given!r} twice")

    @contextmanager
    def _configured(self, module: Any, config: Any, *, sparse: bool) -> Iterator[None]:
        with super()._configured(module, config, sparse=sparse):
            if self.compute_capabilities is not None:
                known = module.ComputeCapability.__members__
                served = {_spoken(name): kind for name, kind in known.items() if name.startswith("SM")}
                other = next((item for item in self.compute_capabilities if item not in served), None)
                if other is not None:
                    raise InputError(f"this tensorrt_rtx has no compute capability {other}: it has {', '.join(served)}")
                config.num_compute_capabilities = len(self.compute_capabilities)
                for index, item in enumerate(self.compute_capabilities):
                    config.set_compute_capability(served[item], index)
            yield


def _is_capability(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"\d+\.\d", value) is not None


def _spoken(name: str) -> str:
    """The compute capability that TensorRT calls SM86: 8.6."""
    digits = name.removeprefix("SM")
    return f"{digits[:-1]}.{digits[-1]}"


def _output_types(program: Program) -> list[str]:
    """Torch's names of the data types of a program's outputs."""
    from fxopt.analysis.shapes import shapes, specs_in

    given = program.analysis(shapes)[program.nodes[-1].name]
    return [str(spec.dtype).removeprefix("torch.") for spec in specs_in(given)]
