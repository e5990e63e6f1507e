"""Nodes of ONNX in the forward of a module: torch's exporter takes them over. To run, they are of no use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["node", "nodes"]


def node(
    operator: str,
    inputs: Sequence[Tensor | None],
    dtype: torch.dtype,
    sizes: Sequence[Any],
    attributes: dict[str, Any] | None = None,
) -> Tensor:
    """A node of ONNX with one output."""
    import torch.onnx.ops

    found: Tensor = torch.onnx.ops.symbolic(operator, inputs, attributes, dtype=dtype, shape=sizes)
    return found


def nodes(
    operator: str,
    inputs: Sequence[Tensor | None],
    dtypes: Sequence[torch.dtype],
    sizes: Sequence[Sequence[Any]],
    attributes: dict[str, Any] | None = None,
) -> Sequence[Tensor]:
    """A node of ONNX with several outputs."""
    import torch.onnx.ops

    found: Sequence[Tensor] = torch.onnx.ops.symbolic_multi_out(
        operator, inputs, attributes, dtypes=dtypes, shapes=sizes
    )
    return found
