"""Code generation that lets a flat graph be called like the model.

The graph of a program takes flat tensors and returns a tuple of tensors. `StructuredCodeGen` wraps that in the model's
own call: `forward(*args, **kwargs)` flattens by the `Signature`, runs the graph's body, and rebuilds the model's output
structure.
"""

from __future__ import annotations

from typing import Any

from torch.fx.graph import CodeGen

from fxopt.signature import Signature

__all__ = ["StructuredCodeGen"]

_NAME = "_fxopt_signature"


class StructuredCodeGen(CodeGen):
    """Generates `forward(*args, **kwargs)` around a flat graph."""

    def __init__(self, signature: Signature) -> None:
        super().__init__()
        self.signature = signature

    def gen_fn_def(self, free_vars: list[str], maybe_return_annotation: str, **_: Any) -> str:
        """The function's head: it binds and flattens the arguments."""
        names = [name.partition(":")[0].partition("=")[0].strip() for name in free_vars if name != "self"]
        targets = "".join(f"{name}, " for name in names)
        return (
            f"def forward(self, *args, **kwargs){maybe_return_annotation}:\n"
            f"    {targets}= {_NAME}.flatten_inputs(args, kwargs)"
        )

    def generate_output(self, output_args: Any, **options: Any) -> str:
        """The return statement: it rebuilds the output structure."""
        spell = options.get("repr_fn") or repr
        return f"return {_NAME}.unflatten_outputs({spell(output_args)})"

    def additional_globals(self) -> list[tuple[str, Any]]:
        """Names that the generated code uses."""
        return [(_NAME, self.signature)]
