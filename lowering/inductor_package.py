"""An AOTInductor package and what is known about it: how it is built, and what runs in it.

`model.pt2` is an archive that holds a shared library, with the weights, and the C++ that it was compiled from;
`engine.json` says what the library does not say about itself.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import weakref
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from fxopt.errors import ArtifactError, BackendError, first_line
from fxopt.lowering.torch_export import quiet

__all__ = ["PACKAGE_FILE", "Facts", "PrivateFolder", "build", "copy_package", "kernels"]

PACKAGE_FILE = "model.pt2"
FACTS_FILE = "engine.json"

_CALL = re.compile(r"\baoti_torch_(?:cpu|cuda)_(\w+)\(|\b(cpp_fused_\w+|triton_\w+)\(")
_BODY = re.compile(r"::run_impl\(.*", re.DOTALL)
_INTEGER = re.compile(r"_q(conv|linear)")


@dataclass(frozen=True)
class Facts:
    """What is known about a package.

    Attributes:
        instruction_set: of the processor that it was compiled on, as torch names it: "AVX2".
        held: places of the outputs that depend on no input: each call gives the same memory.
    """

    instruction_set: str
    held: tuple[int, ...]

    @classmethod
    def read(cls, folder: Path) -> Facts:
        """Reads what `build` wrote.

        Raises:
            ArtifactError: if it is something else.
        """
        path = folder / FACTS_FILE
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            return cls(str(data["instruction_set"]), tuple(int(place) for place in data["held"]))
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise ArtifactError(f"{path} was not written by fxopt ({error}): compile and save again") from error


class PrivateFolder:
    """A temporary folder, deleted with this object.

    Attributes:
        path: of the folder.
    """

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="fxopt-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


def build(exported: ExportedProgram, folder: Path, options: Mapping[str, Any]) -> None:
    """Compiles a program into a folder.

    Raises:
        BackendError: if Inductor cannot compile it.
    """
    facts = Facts(torch.backends.cpu.get_cpu_capability(), _held_outputs(exported))
    (folder / FACTS_FILE).write_text(json.dumps(asdict(facts)) + "\n", encoding="utf-8")
    try:
        # weights become constants only where no gradients are wanted
        with quiet(), torch.no_grad():
            torch._inductor.aoti_compile_and_package(
                exported, package_path=str(folder / PACKAGE_FILE), inductor_configs=dict(options)
            )
    except Exception as error:
        raise BackendError(
            f"Inductor cannot compile this program: {type(error).__name__}: {first_line(error)}. "
            "backend='eager' runs it without that."
        ) from error


def copy_package(source: Path, folder: Path) -> None:
    """Copies a package.

    Raises:
        ArtifactError: if it is not there.
    """
    for name in (PACKAGE_FILE, FACTS_FILE):
        try:
            shutil.copyfile(source / name, folder / name)
        except OSError as error:
            raise ArtifactError(f"{source / name} cannot be read ({error}): compile and save again") from error


def kernels(folder: Path) -> list[dict[str, str]]:
    """What the library calls, in order, as its source says: kernels of libraries, and those that Inductor wrote."""
    with zipfile.ZipFile(folder / PACKAGE_FILE) as archive:
        sources = [name for name in archive.namelist() if name.endswith(".wrapper.cpp")]
        text = archive.read(sources[0]).decode() if sources else ""
    body = _BODY.search(text)
    return [
        {
            "name": f"{place}",
            "type": call[1] or call[2],
            "precision": "u8" if _INTEGER.match(call[1] or "") else "floating",
        }
        for place, call in enumerate(_CALL.finditer(body[0]) if body else ())
    ]


def _held_outputs(exported: ExportedProgram) -> tuple[int, ...]:
    """Places of the outputs that no input goes into, but for its sizes."""
    given = {spec.arg.name for spec in exported.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT}
    dependent: set[fx.Node] = set()
    for node in exported.graph.nodes:
        from_input = node.op == "placeholder" and node.name in given
        if from_input or (_has_tensors(node) and any(source in dependent for source in node.all_input_nodes)):
            dependent.add(node)
    (output,) = exported.graph.find_nodes(op="output")
    return tuple(place for place, node in enumerate(output.args[0]) if node not in dependent)


def _has_tensors(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor | tuple | list)
