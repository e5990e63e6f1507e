"""What the command line calls an input: a shape to fill at random, or a file to read.

A shape is `1x3x224x224`, `1x16:int64`, or either with a name before it: `ids=1x16:int64`. A file is a NumPy array
(.npy, .npz), safetensors, something written by `torch.save` that `weights_only=True` can read, or a picture.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch

from fxopt.backend import TensorSpec
from fxopt.errors import InputError, first_line
from fxopt.free_axes import BATCH

__all__ = ["InputSpec", "as_example_inputs", "gather_inputs", "parse_axes", "parse_input", "read_image", "read_tensors"]

_IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".webp"})

_SPEC = re.compile(r"(?:(?P<name>[A-Za-z_]\w*)=)?(?P<shape>\d+(?:x\d+)*)?(?::(?P<dtype>\w+))?")
_AXIS = re.compile(r"(?P<input>[A-Za-z_]\w*):(?P<axis>\d+)(?:=(?P<name>[A-Za-z_]\w*))?")
_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
}


@dataclass(frozen=True, kw_only=True)
class InputSpec:
    """An input tensor by shape and element type; `name` is the parameter of `forward`, or None for one by position."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    name: str | None = None

    def random(self, seed: int = 0) -> torch.Tensor:
        """Standard normal numbers; of integers 0 and 1, which are valid as index, mask and token alike.

        Raises:
            InputError: if a tensor of that shape cannot be allocated.
        """
        generator = torch.Generator().manual_seed(seed)
        try:
            if self.dtype.is_floating_point:
                return torch.randn(self.shape, generator=generator).to(self.dtype)
            return torch.randint(0, 2, self.shape, generator=generator).to(self.dtype)
        except (RuntimeError, MemoryError, TypeError, OverflowError) as error:  # torch's, by how far it is too large
            shape = "x".join(map(str, self.shape))
            raise InputError(f"an input of shape {shape} cannot be made: {first_line(error)}") from error


def parse_input(text: str) -> InputSpec:
    """Reads `[name=]1x3x224x224[:dtype]`.

    >>> parse_input("ids=1x16:int64")
    InputSpec(shape=(1, 16), dtype=torch.int64, name='ids')

    Raises:
        InputError: if the text has another form, or the element type is not known.
    """
    match = _SPEC.fullmatch(text)
    if match is None or match["shape"] is None:
        raise InputError(f"cannot read the input {text!r}: write a shape such as 1x3x224x224 or ids=1x16:int64")
    dtype = match["dtype"] or "float32"
    if dtype not in _DTYPES:
        raise InputError(f"the input {text!r} has an unknown element type; known are {', '.join(_DTYPES)}")
    shape = tuple(int(size) for size in match["shape"].split("x"))
    return InputSpec(shape=shape, dtype=_DTYPES[dtype], name=match["name"])


def parse_axes(texts: Sequence[str]) -> dict[str, dict[int, str]]:
    """Reads `INPUT:AXIS[=NAME]`, one axis each, as `dynamic_axes` for `fxopt.compile`.

    >>> parse_axes(["x:2=height", "x:3"])
    {'x': {2: 'height', 3: 'x_3'}}

    Raises:
        InputError: if a text has another form, or names an axis again.
    """
    found: dict[str, dict[int, str]] = {}
    for text in texts:
        match = _AXIS.fullmatch(text)
        if match is None:
            raise InputError(f"cannot read the axis {text!r}: write an input and an axis of it, such as x:2=height")
        axis, axes = int(match["axis"]), found.setdefault(match["input"], {})
        if axis in axes:
            raise InputError(f"axis {axis} of {match['input']} is given twice")
        axes[axis] = match["name"] or f"{match['input']}_{axis}"
    return found


def as_example_inputs(specs: Sequence[InputSpec]) -> tuple[torch.Tensor, ...] | dict[str, torch.Tensor]:
    """Random inputs: a mapping if the specs are named, else a tuple.

    Raises:
        InputError: if some are named and some are not, or a name comes twice.
    """
    names = [spec.name for spec in specs if spec.name is not None]
    if not names:
        return tuple(spec.random(seed) for seed, spec in enumerate(specs))
    if len(names) != len(specs):
        raise InputError("name every --input, or none")
    if len(set(names)) != len(names):
        raise InputError(f"an --input is given twice: {', '.join(names)}")
    return {name: spec.random(seed) for seed, (name, spec) in enumerate(zip(names, specs, strict=True))}


def gather_inputs(
    specs: Sequence[TensorSpec], texts: Sequence[str], *, mean: Sequence[float], std: Sequence[float]
) -> list[torch.Tensor]:
    """One tensor for each input of an engine: as `texts` say, at random where they say nothing.

    Args:
        specs: what the engine expects.
        texts: `[NAME=]SHAPE` or `[NAME=]FILE`. Those without a name fill the inputs in order; a file with several
            tensors goes by the names in it.
        mean: see `read_image`.
        std: see `read_image`.

    Raises:
        InputError: if a text cannot be read, names no input, or there are more than the engine takes; or if an input
            that is not given has an axis, other than the batch, of which nothing tells the size.
    """
    given: dict[str, torch.Tensor] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            name, value = next((spec.name for spec in specs if spec.name not in given), ""), text
        for key, tensor in _read_value(value, name, specs, mean=mean, std=std).items():
            if key not in [spec.name for spec in specs]:
                expected = ", ".join(str(spec) for spec in specs)
                raise InputError(f"--input {text}: no free input {key!r}; the engine takes {expected}")
            if key in given:
                raise InputError(f"--input {text}: {key} is given twice")
            given[key] = tensor
    sizes = {
        spec.axis_name(axis): given[spec.name].shape[axis]
        for spec in specs
        if spec.name in given and spec.takes(given[spec.name].shape)
        for axis, size in enumerate(spec.shape)
        if size is None
    }
    sizes.setdefault(BATCH, 1)
    for seed, spec in enumerate(specs):
        if spec.name not in given:
            free = [spec.axis_name(axis) for axis, size in enumerate(spec.shape) if size is None]
            unknown = next((name for name in free if name not in sizes), None)
            if unknown is not None:
                raise InputError(f"{unknown} of the input {spec} may have any size: add --input {spec.name}=SHAPE")
            shape = tuple(sizes[spec.axis_name(axis)] if size is None else size for axis, size in enumerate(spec.shape))
            given[spec.name] = InputSpec(shape=shape, dtype=spec.dtype).random(seed)
    return [given[spec.name] for spec in specs]


def _read_value(
    value: str, name: str, specs: Sequence[TensorSpec], *, mean: Sequence[float], std: Sequence[float]
) -> Mapping[str, torch.Tensor]:
    """Tensors by the name of the input that they are for."""
    path = Path(value)
    spec = next((spec for spec in specs if spec.name == name), None)
    if path.suffix.lower() in _IMAGE_SUFFIXES:
        return {name: read_image(path, spec.shape if spec is not None else (), mean=mean, std=std)}
    if path.suffix:
        tensors = read_tensors(path)
        return {name: next(iter(tensors.values()))} if len(tensors) == 1 else tensors
    wanted = parse_input(value)
    dtype = spec.dtype if spec is not None and ":" not in value else wanted.dtype
    return {name: InputSpec(shape=wanted.shape, dtype=dtype).random()}


def read_tensors(path: Path) -> Mapping[str, torch.Tensor]:
    """The tensors in a file by name; one without a name has the file's.

    Raises:
        InputError: if the file is not there, or is not what its suffix says.
    """
    if not path.is_file():
        raise InputError(f"{path} is a folder" if path.is_dir() else f"{path} does not exist")
    try:
        if path.suffix == ".npy":
            return {path.stem: _from_array(numpy.load(path, allow_pickle=False))}
        if path.suffix == ".npz":
            with numpy.load(path, allow_pickle=False) as arrays:
                return {name: _from_array(arrays[name]) for name in arrays.files}
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        return _named(torch.load(path, map_location="cpu", weights_only=True), path)
    except (OSError, ValueError, TypeError, EOFError, LookupError, RuntimeError, zipfile.BadZipFile) as error:
        raise InputError(f"cannot read {path}: {first_line(error)}") from error
    except pickle.UnpicklingError as error:
        raise InputError(f"{path} is no plain tensor file; objects of Python classes are never unpickled") from error


def read_image(path: Path, shape: Sequence[int | None], *, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """A picture, scaled and cut to its centre: `(pixel / 255 - mean) / std`, float32, (1, 3, height, width).

    Args:
        path: the picture.
        shape: the input that it is for, (batch, 3, height, width); None for a size of the picture's own.
        mean: per channel, or one for all.
        std: per channel, or one for all.

    Raises:
        InputError: if Pillow is missing, the file is no picture, or the input does not take one.
    """
    if len(shape) != 4 or shape[1] != 3:
        raise InputError(f"{path} is a picture, but the input has shape {tuple(shape)}, not (batch, 3, height, width)")
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise InputError(f"reading {path} needs Pillow: pip install 'fxopt[vision]'") from error
    try:
        with Image.open(path) as image:
            size = (shape[3] or image.width, shape[2] or image.height)
            fitted = ImageOps.fit(image.convert("RGB"), size, Image.Resampling.BILINEAR)
    except OSError as error:
        raise InputError(f"cannot read {path}: {first_line(error)}") from error
    pixels = torch.from_numpy(numpy.array(fitted)).permute(2, 0, 1)[None].float() / 255
    return (pixels - _per_channel(mean)) / _per_channel(std)


def _per_channel(values: Sequence[float]) -> torch.Tensor:
    if len(values) not in (1, 3):
        raise InputError(f"expected one number or three, got {len(values)}")
    return torch.tensor(values).reshape(1, -1, 1, 1)


def _from_array(array: numpy.ndarray[Any, Any]) -> torch.Tensor:
    return torch.from_numpy(numpy.ascontiguousarray(array))


def _read_safetensors(path: Path) -> Mapping[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise InputError(f"cannot read {path}: {error}") from error


def _named(data: Any, path: Path) -> Mapping[str, torch.Tensor]:
    """Names for what `torch.load` gave; a checkpoint's tensors are looked for under its usual keys."""
    if isinstance(data, torch.Tensor):
        return {path.stem: data}
    if isinstance(data, Mapping):
        for key in ("state_dict", "model"):
            if isinstance(data.get(key), Mapping):
                return _named(data[key], path)
        if all(isinstance(value, torch.Tensor) for value in data.values()):
            return {str(name): tensor for name, tensor in data.items()}
    if isinstance(data, list | tuple) and all(isinstance(value, torch.Tensor) for value in data):
        return {f"{path.stem}_{index}": tensor for index, tensor in enumerate(data)}
    raise InputError(f"{path} holds a {type(data).__name__}, not tensors by name")
