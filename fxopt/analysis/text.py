"""The program as text: what `Program.text` prints and golden tests compare."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from fxopt.analysis.shapes import TensorSpec, shapes

if TYPE_CHECKING:
    from fxopt.program import Program

__all__ = ["excerpt", "render"]


def render(program: Program) -> str:
    """One line per node: `%conv1 = conv2d[conv1](%x) {3, 8, kernel_size=(3, 3)} : f32[1, 8, 6, 6]`.

    Brackets hold the path of the module or tensor, braces the module's own configuration.
    """
    known = program.analysis(shapes)
    return "\n".join(_line(program, node, known.get(node.name)) for node in program.graph.nodes)


def excerpt(program: Program, name: str, *, around: int = 3) -> str:
    """The lines around the node `name`, with an arrow at it; empty if there is no such node."""
    lines = program.text().splitlines()
    names = [node.name for node in program.graph.nodes]
    if name not in names:
        return ""
    at = names.index(name)
    window = range(max(0, at - around), min(len(lines), at + around + 1))
    return "\n".join(f"{'->' if index == at else '  '} {lines[index]}" for index in window)


def _line(program: Program, node: fx.Node, spec: Any) -> str:
    if node.op == "output":
        return f"return {_value(node.args[0])}"
    kind = f" : {_spec_text(spec)}" if spec is not None else ""
    if node.op == "placeholder":
        return f"%{node.name} = input{kind}"
    if node.op == "get_attr":
        return f"%{node.name} = get_attr[{node.target}]{kind}"
    operator = program.op(node).removeprefix("unknown:")
    arguments = [_value(item) for item in node.args] + [f"{key}={_value(item)}" for key, item in node.kwargs.items()]
    where = config = ""
    module = program.module_of(node)
    if module is not None:
        where, text = f"[{node.target}]", _config(module)
        config = f" {{{text}}}" if text else ""
    return f"%{node.name} = {operator}{where}({', '.join(arguments)}){config}{kind}"


def _config(module: nn.Module) -> str:
    """The module's own configuration; for BatchNorm the same with every torch, some of which print more than others."""
    if not isinstance(module, nn.modules.batchnorm._BatchNorm):
        return module.extra_repr()
    names = ("eps", "momentum", "affine", "track_running_stats")
    return ", ".join([str(module.num_features), *(f"{name}={getattr(module, name)}" for name in names)])


def _spec_text(spec: Any) -> str:
    if isinstance(spec, tuple) and not isinstance(spec, TensorSpec):
        return f"({', '.join(_spec_text(item) for item in spec)})"
    return str(spec)


def _value(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if isinstance(value, tuple):
        inner = ", ".join(_value(item) for item in value)
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    if isinstance(value, list):
        return f"[{', '.join(_value(item) for item in value)}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, slice):
        parts = ["" if item is None else _value(item) for item in (value.start, value.stop, value.step)]
        return ":".join(parts if value.step is not None else parts[:2])
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return repr(value)
