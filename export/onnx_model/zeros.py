"""Zeros of each weight of an exported graph, counted in the file that was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from gblm.export.onnx_model.runtime import DOMAIN
from gblm.export.onnx_model.storage import StoredGraph
from gblm.kernels import native

# numpy's types of what a MatMul may be by; bfloat16 as bits, of which −0.0 is not a zero either.
ELEMENTS = {1: np.float32, 10: np.float16, 16: np.uint16}


def count_zeros(folder: Path) -> list[dict[str, Any]]:
    """One row for each weight that a MatMul or ai.gblm::Linear multiplies by.

    Returns:
        name, shape [in, out] of the MatMul or [out, in] of the operator, zeros and sparsity. Codes
        of ONNX Runtime's own integer operators are not looked into.
    """
    graph = StoredGraph(folder)
    rows: dict[str, dict[str, Any]] = {}
    for node in graph.model.graph.node:
        name = node.input[1] if len(node.input) > 1 else ""
        if name not in graph.tensors or name in rows:
            continue
        if node.domain == DOMAIN:
            kept, mask, _ = native.unpack(torch.from_numpy(graph.raw(name).copy()))
            rows[name] = _row(name, kept.shape, kept.numel() - int((mask & (kept != 0)).sum()))
        elif node.op_type in ("MatMul", "Gemm") and graph.tensors[name].data_type in ELEMENTS:
            tensor = graph.tensors[name]
            values = graph.raw(name).view(ELEMENTS[tensor.data_type])
            rows[name] = _row(name, tensor.dims, int(values.size - np.count_nonzero(values)))
    return list(rows.values())


def _row(name: str, shape: Any, zeros: int) -> dict[str, Any]:
    sizes = [int(size) for size in shape]
    return {"name": name, "shape": sizes, "zeros": zeros, "sparsity": zeros / np.prod(sizes).item()}
