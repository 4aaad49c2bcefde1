"""The gated feed-forward of LLaMA in a graph of the model builder: silu(x Gᵀ) · (x Uᵀ).

Two MatMuls of the same input, Sigmoid and two Mul become one operator, which reads both weights as
one and touches what lies between once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Gate:
    """One feed-forward's first half.

    Attributes:
        gate: the MatMul that goes through silu.
        up: the MatMul that it is multiplied with.
        last: the Mul whose output is the result.
        inner: names of all its other nodes.
    """

    gate: Any
    up: Any
    last: Any
    inner: frozenset[str]


def find_gates(nodes: Iterable[Any]) -> list[Gate]:
    """Every gate whose inner values nobody else reads.

    Args:
        nodes: of the graph, with distinct names.
    """
    every = list(nodes)
    users: dict[str, list[Any]] = defaultdict(list)
    for node in every:
        for name in node.input:
            users[name].append(node)
    makers = {name: node for node in every for name in node.output}
    found = (_gate(node, users, makers) for node in every if node.op_type == "Sigmoid")
    return [gate for gate in found if gate is not None]


def _gate(sigmoid: Any, users: dict[str, list[Any]], makers: dict[str, Any]) -> Gate | None:
    source = sigmoid.input[0]
    gate, silu = makers.get(source), _only(users[sigmoid.output[0]])
    if gate is None or gate.op_type != "MatMul" or silu is None or silu.op_type != "Mul":
        return None
    last = _only(users[silu.output[0]])
    if set(silu.input) != {source, sigmoid.output[0]} or last is None or last.op_type != "Mul":
        return None
    up = makers.get(next((name for name in last.input if name != silu.output[0]), ""))
    if up is None or up.op_type != "MatMul" or up.input[0] != gate.input[0]:
        return None
    if len(users[source]) != 2 or _only(users[up.output[0]]) is None:
        return None
    return Gate(gate, up, last, frozenset(node.name for node in (gate, up, sigmoid, silu)))


def _only(nodes: list[Any]) -> Any | None:
    return nodes[0] if len(nodes) == 1 else None
