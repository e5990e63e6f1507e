"""What the command line calls MODEL: a name, a callable or a file, turned into a module and inputs to try it with.

    torchvision:NAME          a model of torchvision, in evaluation mode
    timm:NAME                 a model of timm, in evaluation mode
    package.module:callable   a module, or something that is called without arguments and returns one
    FILE.pt2                  a program saved by torch.export.save

Nothing is downloaded: weights are random unless a file gives them.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pickle
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from fxopt.errors import InputError, first_line
from fxopt.input_source import InputSpec, read_tensors

__all__ = ["ModelSource", "load_model", "load_weights"]

_FORMS = "MODEL is torchvision:NAME, timm:NAME, package.module:callable or FILE.pt2"
_SHOWN = 3  # entries of a mismatch that are named in a message


class ModelSource(NamedTuple):
    """A model and how to call it.

    Attributes:
        model: the module.
        inputs: example inputs (a tuple or a mapping) if the source tells their shapes, else None.
    """

    model: nn.Module
    inputs: tuple[Any, ...] | dict[str, Any] | None


def load_model(spec: str) -> ModelSource:
    """The model that `spec` stands for; its weights are those of the source, never downloaded.

    Raises:
        InputError: if the form, the name or the file is wrong, or what it gives is not a model.
    """
    if spec.endswith(".pt2"):
        return _from_file(Path(spec))
    library, colon, name = spec.partition(":")
    if not colon or not library or not name:
        raise InputError(f"cannot read {spec!r}: {_FORMS}")
    if library == "torchvision":
        return _from_torchvision(name)
    if library == "timm":
        return _from_timm(name)
    return _from_callable(library, name)


def load_weights(model: nn.Module, path: Path) -> None:
    """Loads a state dict into `model`, strictly: names and shapes must all agree.

    Args:
        model: changed in place.
        path: a .safetensors file, or one written by `torch.save`, which is read with `weights_only=True`.

    Raises:
        InputError: if the file cannot be read, or does not fit; names the first entries that do not.
    """
    given = read_tensors(path)
    wanted = model.state_dict()
    problems = [
        _some("missing", [name for name in wanted if name not in given]),
        _some("unexpected", [name for name in given if name not in wanted]),
        _some(
            "of another shape",
            [
                f"{name} {tuple(given[name].shape)} instead of {tuple(tensor.shape)}"
                for name, tensor in wanted.items()
                if name in given and given[name].shape != tensor.shape
            ],
        ),
    ]
    if any(problems):
        raise InputError(f"{path} does not fit the model: {'; '.join(problem for problem in problems if problem)}")
    model.load_state_dict(dict(given))


def _from_torchvision(name: str) -> ModelSource:
    models = _library("torchvision.models", "torchvision")
    known = models.list_models()
    if name not in known:
        raise InputError(f"torchvision has no model {name!r}{_suggestion(name, known)}")
    arguments: dict[str, Any] = {"weights": None}
    parameters = inspect.signature(models.get_model_builder(name)).parameters
    if "weights_backbone" in parameters:  # its default would be downloaded
        arguments["weights_backbone"] = None
    if name in ("googlenet", "inception_v3"):  # slow, and announced by a warning, unless it is asked for or not
        arguments["init_weights"] = True
    model = models.get_model(name, **arguments).eval()
    shape = _torchvision_shape(models.get_model_weights(name).DEFAULT)
    return ModelSource(model, None if shape is None else (InputSpec(shape=shape).random(),))


def _torchvision_shape(weights: Any) -> tuple[int, ...] | None:
    """The input shape that the preprocessing of these weights gives; None where it gives no single one (detection)."""
    preprocessing = weights.transforms()
    size = getattr(preprocessing, "crop_size", None) or getattr(preprocessing, "resize_size", None)
    if size is None:
        return None
    height, width = size[0], size[-1]
    if type(preprocessing).__name__ == "VideoClassification":
        return (1, 3, max(16, weights.meta.get("min_temporal_size", 1)), height, width)
    return (1, 3, height, width)


def _from_timm(name: str) -> ModelSource:
    timm = _library("timm", "timm")
    known = timm.list_models()
    if name.partition(".")[0] not in known:
        raise InputError(f"timm has no model {name!r}{_suggestion(name, known)}")
    model = timm.create_model(name, pretrained=False).eval()
    size = model.pretrained_cfg.get("input_size")
    return ModelSource(model, None if size is None else (InputSpec(shape=(1, *size)).random(),))


def _from_callable(module_name: str, attribute: str) -> ModelSource:
    spec = f"{module_name}:{attribute}"
    try:
        found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:  # importing runs the user's own code; --debug shows where it failed
        raise InputError(f"cannot import {spec}: {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(found, nn.Module):
        found = _call(found, spec)
    if not isinstance(found, nn.Module):
        raise InputError(f"{spec} gives a {type(found).__name__}, not a torch.nn.Module")
    return ModelSource(found.eval(), None)


def _call(function: Callable[[], Any], spec: str) -> Any:
    if not callable(function):
        raise InputError(f"{spec} is a {type(function).__name__}, neither a torch.nn.Module nor callable")
    try:
        return function()
    except Exception as error:  # anything may go wrong in the user's own code; --debug shows where
        raise InputError(f"{spec}() failed with {type(error).__name__}: {error}") from error


def _from_file(path: Path) -> ModelSource:
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    if not _is_exported(path):  # asked first, as torch logs a traceback before it raises
        raise InputError(f"{path} was not written by torch.export.save")
    try:
        exported = torch.export.load(path)
    except (RuntimeError, ValueError, KeyError, OSError, pickle.UnpicklingError) as error:
        raise InputError(f"{path} cannot be loaded by this torch: {first_line(error)}") from error
    model = exported.module(check_guards=False)
    for module in model.modules():  # an exported program refuses eval(): its mode is burnt in, only the flag is stale
        module.training = False
    args, kwargs = exported.example_inputs or ((), {})
    if kwargs and args:
        return ModelSource(model, None)
    return ModelSource(model, dict(kwargs) if kwargs else tuple(args) or None)


def _is_exported(path: Path) -> bool:
    """Whether it is an archive with the mark of the .pt2 format."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/archive_format") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError):
        return False


def _library(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"{extra} is not installed (pip install 'fxopt[vision]'): {error}") from error


def _suggestion(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=_SHOWN)
    return f"; did you mean {', '.join(near)}?" if near else ""


def _some(what: str, names: Sequence[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{what}: {', '.join(names[:_SHOWN])}{more}"
