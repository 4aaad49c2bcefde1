"""Replace the MatMuls of a graph of the model builder by the operators of ai.gblm.

A weight is replaced only after it was compared, value by value, with the checkpoint's: a graph that
names its weights in another way is refused, never guessed at. Two MatMuls of the same input,
Sigmoid and two Mul, the gated feed-forward of LLaMA, become one operator, which reads both weights
as one. Operators cannot prepare weights at load, so what is stored is the kernels' own layout in
memory: panels, which name their version; see docs/onnx.md.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gblm.errors import CheckpointError, InputError
from gblm.export.onnx.runtime import DOMAIN, DOMAIN_VERSION, MODEL_FILE
from gblm.export.onnx.storage import DATA_FILE, DataFile, StoredGraph
from gblm.kernels import BACKENDS
from gblm.model.folder import ModelFolder
from gblm.model.packed_reader import PackedReader
from gblm.sparse.formats import Format, Shape, format_for, join_formats
from gblm.sparse.patterns import Dense
from gblm.sparse.weights import SparseWeight

LAYER_WEIGHT = re.compile(r"model\.layers\.(\d+)\.(attn|mlp)\.(\w+)\.MatMul\.weight")
HEAD_WEIGHT = "lm_head.MatMul.weight"
EMBEDDINGS, TABLE = "model.embed_tokens.weight", "model.embed_tokens.table"
QKV, GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
# What graphs or checkpoints join to one linear.
FUSED = {"qkv_proj": QKV, "gate_up_proj": GATE_UP}
LINEAR, GATED = "Linear", "GatedLinear"


@dataclass(frozen=True)
class Replaced:
    """Records the operator `op` that took the place of MatMuls by the weights of `linears`.

    `spec` is that of their format, `shape` their [out, in], `num_bytes` the size of the panels.
    """

    op: str
    linears: tuple[str, ...]
    spec: str
    shape: tuple[int, int]
    num_bytes: int


def pack_graph(built: Path, packed: ModelFolder, output: Path) -> list[Replaced]:
    """Write a graph whose linears are packed.

    Args:
        built: a float32 graph of the model builder, from the unpacked checkpoint.
        packed: the packed checkpoint.
        output: a folder; the graph and its data are written there.

    Returns:
        What was replaced, in the order of the graph.

    Raises:
        CheckpointError: the graph is not what the builder makes of this checkpoint.
    """
    import onnx

    graph = StoredGraph(built)
    if any(entry.domain == DOMAIN for entry in graph.model.opset_import):
        raise CheckpointError(f"{built}: the graph is rewritten already.")
    with (
        PackedReader(packed) as reader,
        (output / DATA_FILE).open("wb") as stream,
    ):
        rewriter = _Rewriter(graph, reader, DataFile(stream))
        nodes = [made for node in graph.model.graph.node for made in rewriter.rewrite(node)]
        rewriter.check_complete()
        kept = rewriter.initializers(nodes)
    proto = graph.model
    del proto.graph.node[:], proto.graph.initializer[:]
    proto.graph.node.extend(nodes)
    proto.graph.initializer.extend(kept)
    proto.opset_import.append(onnx.helper.make_opsetid(DOMAIN, DOMAIN_VERSION))
    (output / MODEL_FILE).write_bytes(proto.SerializeToString())
    return rewriter.replaced


class _Rewriter:
    """Rewrites node after node, and makes the tensors that the new nodes need."""

    def __init__(self, graph: StoredGraph, reader: PackedReader, data: DataFile) -> None:
        self.graph, self.reader, self.data = graph, reader, data
        self.replaced: list[Replaced] = []
        self._made: dict[str, Any] = {}
        self._gates: dict[str, tuple[Gate, tuple[str, ...]]] = {}
        for gate in find_gates(graph.model.graph.node):
            if linears := self._packable([gate.gate, gate.up]):
                self._gates[gate.last.name] = gate, linears
        self._inner = {name for gate, _ in self._gates.values() for name in gate.inner}
        self._transposed = {
            node.output[0]: node.input[0]
            for node in graph.model.graph.node
            if node.op_type == "Transpose" and node.input[0] in graph.tensors
        }

    def rewrite(self, node: Any) -> Iterator[Any]:
        """Give the nodes that take a node's place."""
        if node.name in self._inner:
            return
        if node.name in self._gates:
            gate, linears = self._gates[node.name]
            yield self._node(node, GATED, [gate.gate, gate.up], linears)
        elif node.op_type == "MatMul" and (linears := self._packable([node])):
            yield self._node(node, LINEAR, [node], linears)
        elif node.op_type == "Gather" and self._embeddings(node.input[0]) is not None:
            yield from self._gather(node)
        elif node.op_type == "Transpose" and node.output[0] in self._transposed:
            return  # of the tied embeddings, which are now read as they are
        else:
            yield node

    def check_complete(self) -> None:
        """Raise CheckpointError when a packed weight has found no MatMul."""
        done = {name for one in self.replaced for name in one.linears}
        missing = sorted(set(self.reader.linears) - done)
        if missing:
            raise CheckpointError(
                f"{self.graph.folder}: the graph has no MatMul by the weight of {missing[0]}."
            )

    def initializers(self, nodes: list[Any]) -> list[Any]:
        """Give what the nodes use: what was made, and the rest of the old ones."""
        used = {name for node in nodes for name in node.input}
        kept = [
            self.data.tensor(name, tensor.data_type, tensor.dims, self.graph.raw(name).data)
            for name, tensor in self.graph.tensors.items()
            if name in used
        ]
        return [*self._made.values(), *kept]

    def _packable(self, matmuls: Sequence[Any]) -> tuple[str, ...]:
        """Name the linears behind MatMuls whose weights can be joined panels, else none."""
        weights = [node.input[1] for node in matmuls]
        if not all(name in self.graph.tensors for name in weights):
            return ()
        linears = linears_behind(weights, self._is_stored)
        if any(name in self.reader.linears for name in linears):
            return linears
        exact = all(_fits(self._stored(name)) for name in weights) if linears else False
        return linears if exact else ()

    def _is_stored(self, name: str) -> bool:
        return name in self.reader.linears or f"{name}.weight" in self.reader.headers

    def _panels(self, matmuls: Sequence[Any], linears: tuple[str, ...]) -> Panels:
        stored = torch.cat([self._stored(node.input[1]) for node in matmuls])
        if not any(name in self.reader.linears for name in linears):
            return dense_panels(linears[0], stored)
        panels, expected = packed_panels(self.reader, linears)
        if not torch.equal(stored, expected):
            raise CheckpointError(
                f"{self.graph.folder}: the graph's weight of {', '.join(linears)} is not the "
                "checkpoint's."
            )
        return panels

    def _stored(self, name: str) -> Tensor:
        """Read a weight of the graph as [out, in] float32."""
        return torch.from_numpy(self.graph.floats(name).copy()).T.contiguous()

    def _node(self, node: Any, op: str, matmuls: Sequence[Any], linears: tuple[str, ...]) -> Any:
        import onnx

        panels = self._panels(matmuls, linears)
        name = f"{linears[0]}.panels"
        array = panels.data.numpy()
        self._made[name] = self.data.tensor(name, onnx.TensorProto.UINT8, array.shape, array.data)
        self.replaced.append(Replaced(op, linears, panels.spec, panels.shape, panels.data.numel()))
        out, into = panels.shape
        return onnx.helper.make_node(
            op, [matmuls[0].input[0], name], list(node.output), name=node.name, domain=DOMAIN,
            out_features=out // (2 if op == GATED else 1), in_features=into,
        )  # fmt: skip

    def _embeddings(self, name: str) -> str | None:
        """Name the initializer behind the table of a Gather, if it is the embeddings."""
        source = self._transposed.get(name, name)
        return source if source in (HEAD_WEIGHT, EMBEDDINGS) else None

    def _gather(self, node: Any) -> Iterator[Any]:
        """Look up bfloat16 rows and widen those alone, where that loses nothing."""
        import onnx

        source = str(self._embeddings(node.input[0]))
        table = torch.from_numpy(self.graph.floats(source).copy())
        table = table.T.contiguous() if source == HEAD_WEIGHT else table
        rows, dtype = node.output[0], onnx.TensorProto.FLOAT
        if exact := is_bfloat16(table):
            table = table.to(torch.bfloat16).view(torch.int16)
            rows, dtype = f"{rows}/bfloat16", onnx.TensorProto.BFLOAT16
        self._made[TABLE] = self.data.tensor(TABLE, dtype, table.shape, table.numpy().data)
        yield onnx.helper.make_node("Gather", [TABLE, node.input[1]], [rows], name=node.name)
        if exact:
            yield onnx.helper.make_node(
                "Cast", [rows], list(node.output), name=f"{node.name}/Cast",
                to=onnx.TensorProto.FLOAT,
            )  # fmt: skip


def _fits(weight: Tensor) -> bool:
    """Tell whether a dense weight [out, in] can be panels without loss."""
    return is_bfloat16(weight) and weight.shape[1] % 8 == 0


def linears_behind(weights: Sequence[str], known: Callable[[str], bool]) -> tuple[str, ...]:
    """Name a checkpoint's linears behind weights of a graph, in the order of their rows.

    Args:
        weights: names of initializers that are to be one weight.
        known: whether the checkpoint has a linear of that name.

    Returns:
        Names; none when a weight is no linear's.
    """
    names: tuple[str, ...] = ()
    for weight in weights:
        if weight.startswith(HEAD_WEIGHT):
            names += ("lm_head",)
            continue
        found = LAYER_WEIGHT.match(weight)
        if found is None:
            return ()
        stem = f"model.layers.{found[1]}.{'self_attn' if found[2] == 'attn' else 'mlp'}"
        names += tuple(f"{stem}.{part}" for part in FUSED.get(found[3], (found[3],)))
    stem = names[0].rpartition(".")[0]
    for fused, parts in FUSED.items():
        if names == tuple(f"{stem}.{part}" for part in parts) and known(f"{stem}.{fused}"):
            return (f"{stem}.{fused}",)
    return names


@dataclass(frozen=True)
class Panels:
    """Holds a weight [out, in] in the kernels' layout: `data` is [bytes] uint8."""

    shape: Shape
    data: Tensor
    spec: str


def packed_panels(reader: PackedReader, linears: Sequence[str]) -> tuple[Panels, Tensor]:
    """Join the weights of packed linears.

    Args:
        reader: of the checkpoint.
        linears: names, in the order of their rows.

    Returns:
        Panels, and the dense weight [out, in] float32 that they stand for.

    Raises:
        InputError: floating values are not exact in bfloat16, or the kernels cannot take the
            shape.
        CheckpointError: the linears cannot be one.
    """
    found = [reader.linears.get(name) for name in linears]
    packed = [linear for linear in found if linear is not None]
    fmt = join_formats(linear.fmt for linear in packed)
    if fmt is None or len(packed) < len(linears):
        raise CheckpointError(
            f"{reader.folder}: {', '.join(linears)} are one linear in the graph; pack them in one "
            "format."
        )
    pieces = []
    for linear in packed:
        parts = reader.parts(linear.name)
        linear.fmt.validate(linear.name, parts, linear.shape)
        if fmt.values.is_float:
            parts["values"] = exact_bfloat16(linear.name, parts["values"])
        pieces.append(parts)
    shape = (sum(linear.shape[0] for linear in packed), packed[0].shape[1])
    joined = fmt.join(pieces)
    return _prepare(linears[0], fmt, joined, shape), fmt.expand(joined, torch.float32).float()


def dense_panels(name: str, weight: Tensor) -> Panels:
    """Make panels of a weight that is not packed; every position is kept.

    Args:
        name: for messages.
        weight: [out, in], exact in bfloat16.
    """
    exact = exact_bfloat16(name, weight)
    fmt = format_for(Dense())
    parts = fmt.pack(name, SparseWeight.cut(exact, torch.ones_like(exact, dtype=torch.bool)))
    return _prepare(name, fmt, parts, (weight.shape[0], weight.shape[1]))


def is_bfloat16(weight: Tensor) -> bool:
    """Tell whether every value is exact in bfloat16."""
    return bool((weight == weight.to(torch.bfloat16)).all())


def exact_bfloat16(name: str, values: Tensor) -> Tensor:
    """Cast floating values to bfloat16, if that loses nothing.

    Raises:
        InputError: it would.
    """
    if not is_bfloat16(values):
        raise InputError(
            f"{name}: the values are {values.dtype} and not exact in bfloat16, which the operator "
            "stores. Prune the bfloat16 model, or export without --sparse."
        )
    return values.to(torch.bfloat16)


def _prepare(name: str, fmt: Format, parts: dict[str, Tensor], shape: Shape) -> Panels:
    backend = BACKENDS["cpu"]
    if reason := backend.refuses(fmt, shape, torch.bfloat16, torch.device("cpu")):
        raise InputError(f"{name}: the operator cannot take this weight: {reason}.")
    return Panels(shape, backend.prepare(fmt, parts, shape)[0], fmt.spec)


@dataclass(frozen=True)
class Gate:
    """Names the nodes that compute the first half of a feed-forward.

    The MatMul `gate` goes through silu and is multiplied with the MatMul `up`; the Mul `last` gives
    the result. `inner` are the names of all nodes but the last.
    """

    gate: Any
    up: Any
    last: Any
    inner: frozenset[str]


def find_gates(nodes: Iterable[Any]) -> list[Gate]:
    """Find every gate whose inner values nobody else reads.

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
