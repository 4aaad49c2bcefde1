"""Tables of rotary embeddings (Su et al. 2021, https://arxiv.org/abs/2104.09864) as a formula.

The model builder stores the cosines and sines of every position in float32: 2 MB for 8192 positions
of 32 frequencies, 67 MB for a model with 131072 of 64. ONNX Runtime computes the same tables from
the frequencies when it loads the graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from gblm.export.onnx_model.storage import StoredGraph

ATTENTION = "GroupQueryAttention"
COSINES, SINES = 7, 8  # inputs of the attention
# Of a value of the tables: a few roundings of float32.
TOLERANCE = 1e-6
OPSET = 18


@dataclass(frozen=True)
class Formula:
    """What takes the place of the tables.

    Attributes:
        tables: names of the initializers that are not needed any more.
        nodes: that compute them.
        constants: initializers of the nodes, by name.
    """

    tables: tuple[str, ...] = ()
    nodes: tuple[Any, ...] = ()
    constants: tuple[tuple[str, np.ndarray[Any, Any]], ...] = ()


def find_formula(graph: StoredGraph) -> Formula:
    """Find the formula of a graph's tables; it is empty if they follow none, or there are none."""
    pairs = {
        (node.input[COSINES], node.input[SINES])
        for node in graph.model.graph.node
        if node.op_type == ATTENTION and len(node.input) > SINES and node.input[SINES]
    }
    if len(pairs) != 1:
        return Formula()
    ((cosines, sines),) = pairs
    if cosines not in graph.tensors or sines not in graph.tensors:
        return Formula()
    want = graph.floats(cosines), graph.floats(sines)
    formula = _formula((cosines, sines), *want)
    return formula if _gives(formula, want) else Formula()


def frequencies(cosines: np.ndarray[Any, Any], sines: np.ndarray[Any, Any]) -> Any:
    """Recover the radians a position from the tables.

    Angles at powers of two are exact multiples, so that the last one tells the frequency to the
    rounding of float32; each takes the number of whole turns from the one before.

    Args:
        cosines: [positions, frequencies] float32, times any factor.
        sines: the same.

    Returns:
        [frequencies] float32.
    """
    found, position = np.zeros(cosines.shape[1]), 1
    while position < len(cosines):
        angle = np.arctan2(sines[position].astype(np.float64), cosines[position])
        turns = np.round((found * position - angle) / (2 * np.pi)) if position > 1 else 0
        found = (angle + 2 * np.pi * turns) / position
        position *= 2
    return found.astype(np.float32)


def _formula(
    tables: tuple[str, str], cosines: np.ndarray[Any, Any], sines: np.ndarray[Any, Any]
) -> Formula:
    from onnx import helper

    scale = cosines[:1, :1]
    constants = {
        "rotary/start": np.array(0, np.float32),
        "rotary/positions": np.array(len(cosines), np.float32),
        "rotary/step": np.array(1, np.float32),
        "rotary/column": np.array([1], np.int64),
        "rotary/frequencies": frequencies(cosines, sines)[None],
        "rotary/scale": scale,
    }
    start, positions, step, column, row, _ = constants
    nodes = [
        helper.make_node("Range", [start, positions, step], ["rotary/range"]),
        helper.make_node("Unsqueeze", ["rotary/range", column], ["rotary/rows"]),
        helper.make_node("Mul", ["rotary/rows", row], ["rotary/angles"]),
    ]
    for function, name in zip(("Cos", "Sin"), tables, strict=True):
        unscaled = f"rotary/{function}"
        nodes.append(helper.make_node(function, ["rotary/angles"], [unscaled]))
        nodes.append(helper.make_node("Mul", [unscaled, "rotary/scale"], [name]))
    return Formula(tables, tuple(nodes), tuple(constants.items()))


def _gives(formula: Formula, want: tuple[np.ndarray[Any, Any], ...]) -> bool:
    """Tell whether ONNX Runtime computes the tables."""
    import onnx
    import onnxruntime
    from onnx import helper, numpy_helper

    outputs = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, table.shape)
        for name, table in zip(formula.tables, want, strict=True)
    ]
    held = [numpy_helper.from_array(array, name) for name, array in formula.constants]
    proto = helper.make_model(
        helper.make_graph(formula.nodes, "rotary", [], outputs, held),
        opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10,
    )  # fmt: skip
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    got = session.run(list(formula.tables), {})
    return all(np.abs(one - other).max() <= TOLERANCE for one, other in zip(got, want, strict=True))
