"""Tables of rotary embeddings become a formula that ONNX Runtime computes once, at load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="onnx: make dev installs it")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime: make dev installs it")

from gblm.export.onnx_model.rotary import find_formula, frequencies  # noqa: E402
from gblm.export.onnx_model.storage import StoredGraph  # noqa: E402

Array = np.ndarray[Any, Any]


def tables(freq: Array, positions: int, factor: float = 1) -> tuple[Array, Array]:
    """Cosines and sines [positions, frequencies] float32, as model builders compute them."""
    angles = np.outer(np.arange(positions, dtype=np.float32), freq.astype(np.float32))
    scale = np.float32(factor)
    return np.cos(angles) * scale, np.sin(angles) * scale


def rope(theta: float, count: int) -> Array:
    return np.asarray((theta ** -(np.arange(count) / count)).astype(np.float32))


def save(folder: Path, cosines: Array, sines: Array) -> StoredGraph:
    """A graph whose only node is an attention with these tables."""
    names = ("cos_cache", "sin_cache")
    inputs = ["query", "key", "value", "past_key", "past_value", "length", "total", *names]
    node = onnx.helper.make_node(
        "GroupQueryAttention", inputs, ["output"], domain="com.microsoft",
        num_heads=4, kv_num_heads=2, do_rotary=1,
    )  # fmt: skip
    held = [
        onnx.numpy_helper.from_array(array, name)
        for array, name in zip((cosines, sines), names, strict=True)
    ]
    graph = onnx.helper.make_graph([node], "attention", [], [], held)
    onnx.save(onnx.helper.make_model(graph), str(folder / "model.onnx"))
    return StoredGraph(folder)


@pytest.mark.parametrize("factor", [1, 1.2079])
@pytest.mark.parametrize(
    "freq", [rope(10000, 32), rope(500000, 64), np.where(rope(500000, 64) < 1e-3, 0.125, 1)
             * rope(500000, 64)], ids=["theta 10000", "theta 500000", "slow ones slower"],
)  # fmt: skip
def test_tables_are_replaced_by_what_gives_them(freq: Array, factor: float, tmp_path: Path) -> None:
    pair = tables(freq, 8192, factor)
    found = frequencies(*pair)
    assert np.abs(found - freq.astype(np.float32)).max() < 1e-9
    formula = find_formula(save(tmp_path, *pair))
    assert formula.tables == ("cos_cache", "sin_cache")
    held = sum(array.nbytes for _, array in formula.constants)
    assert held < 1000 < sum(table.nbytes for table in pair)


def test_other_tables_stay(tmp_path: Path) -> None:
    cosines, sines = tables(rope(10000, 32), 512)
    changed = cosines.copy()
    changed[300, 5] += 1e-4
    assert not find_formula(save(tmp_path, changed, sines)).tables
    late = np.concatenate([cosines[:256], cosines[:256]])  # frequencies that change on the way
    assert not find_formula(save(tmp_path, late, sines)).tables
