"""The layers of an optimized model that ONNX Runtime wrote."""

from __future__ import annotations

from pathlib import Path

__all__ = ["layers_in"]


def layers_in(path: Path) -> list[dict[str, str]]:
    """By operator: its name, its type (with the domain where that is not ONNX's own), the precision of what it gives.

    The precision is "" where the file does not tell.
    """
    import onnx

    graph = onnx.load_model(path, load_external_data=False).graph
    types = {item.name: item.type.tensor_type.elem_type for item in (*graph.value_info, *graph.output)}
    found = []
    for node in graph.node:
        kind = types.get(node.output[0], 0)
        found.append(
            {
                "name": node.name,
                "type": f"{node.domain}.{node.op_type}" if node.domain else node.op_type,
                "precision": str(onnx.helper.tensor_dtype_to_np_dtype(kind)) if kind else "",
            }
        )
    return found
