"""What builds, and what runs TensorRT engines with torch and without have in common: the module, its log, its plans.

`tensorrt` and `tensorrt_rtx` are two modules with one interface. A plan is an engine as bytes; only a GPU makes an
engine of it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any

from fxopt.errors import BackendError, BackendUnavailable, first_line

__all__ = ["PACKAGES", "PLAN_FILE", "context_for", "deserialize", "errors_of", "load_module", "logger", "why_invalid"]

PLAN_FILE = "engine.plan"

PACKAGES = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx"}
"""What to install, by module; a backend has the name of its module."""

_log = logging.getLogger(__name__)
_listeners: list[list[str]] = []
_listening = threading.Lock()


def load_module(name: str) -> Any:
    """The module of a flavour.

    Raises:
        BackendUnavailable: if it cannot be imported.
    """
    try:
        return import_module(name)
    except (ImportError, OSError) as error:  # its libraries may be missing
        raise BackendUnavailable(
            f"{name} cannot be imported ({first_line(error)}): pip install {PACKAGES[name]}"
        ) from error


@cache
def logger(module: Any) -> Any:
    """The log of a flavour: TensorRT takes one for a process, and prints none of it. It goes to our debug log."""
    errors = {module.ILogger.Severity.ERROR, module.ILogger.Severity.INTERNAL_ERROR}

    class Log(module.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            _log.debug("%s: %s", severity.name, message)
            if severity in errors:
                for listener in tuple(_listeners):
                    listener.append(message)

    return Log()


@contextmanager
def errors_of(module: Any) -> Iterator[list[str]]:
    """The errors that TensorRT tells its log meanwhile, in any thread: its functions say no more than None."""
    logger(module)
    found: list[str] = []
    with _listening:
        _listeners.append(found)
    try:
        yield found
    finally:
        with _listening:  # by identity: equal lists are not the same listener
            _listeners[:] = [listener for listener in _listeners if listener is not found]


def why_invalid(module: Any, plan: bytes) -> str | None:
    """Why a plan does not fit the GPU or the libraries of this machine, which has a GPU; None if it does.

    TensorRT itself, unlike RTX, cannot tell before it tries.
    """
    runtime = module.Runtime(logger(module))
    if not hasattr(runtime, "get_engine_validity"):
        return None
    validity, diagnostics = runtime.get_engine_validity(plan)
    if validity != module.EngineValidity.INVALID:
        return None
    kinds = module.EngineInvalidityDiagnostics.__members__
    reasons = [name.lower().replace("_", " ") for name, kind in kinds.items() if int(diagnostics) & int(kind)]
    return (
        f"{module.__name__} says that the engine does not fit this machine: {', '.join(reasons) or 'no reason given'}"
    )


def deserialize(module: Any, plan: bytes, *, host_code: bool = False) -> Any:
    """The engine of a plan, on the current device.

    Args:
        module: the flavour.
        plan: what was saved.
        host_code: whether code in the plan may run on the CPU, as it must for a version compatible engine.

    Raises:
        BackendError: if this version or this GPU cannot run it.
    """
    with errors_of(module) as errors:
        runtime = module.Runtime(logger(module))
        if host_code:
            runtime.engine_host_code_allowed = True
        engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise BackendError(
            f"{module.__name__} {module.__version__} cannot load the engine: {'; '.join(errors) or 'no reason given'}. "
            "Engines are made for a version and kinds of GPUs: compile it again for this machine."
        )
    return engine


def context_for(module: Any, engine: Any, *, cuda_graph: bool = False) -> Any:
    """An execution context, of which each thread needs one.

    Args:
        module: the flavour.
        engine: what it runs.
        cuda_graph: whether RTX captures and replays CUDA graphs by itself.

    Raises:
        BackendError: if there is no memory for it.
    """
    with errors_of(module) as errors:
        if cuda_graph:
            config = engine.create_runtime_config()
            config.cuda_graph_strategy = module.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            context = engine.create_execution_context(config)
        else:
            context = engine.create_execution_context()
    if context is None:
        raise BackendError(
            f"{module.__name__} cannot make an execution context: {'; '.join(errors) or 'out of memory'}"
        )
    return context
