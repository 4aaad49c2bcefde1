"""Replace the MatMuls of a graph of the model builder by the operators of ai.gblm.

A weight is replaced only after it was compared, value by value, with the checkpoint's: a graph that
names its weights in another way is refused, never guessed at. Two MatMuls of the same input,
Sigmoid and two Mul, the gated feed-forward of LLaMA, become one operator, which reads both weights
as one. Operators cannot prepare weights at load, so what is stored is the kernels' own layout in
memory: panels, which name their version; see docs/onnx.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from gblm.errors import CheckpointError, InputError
from gblm.export.onnx.runtime import DATA_FILE, DOMAIN, DOMAIN_VERSION, MODEL_FILE
from gblm.kernels import BACKENDS
from gblm.model.folder import ModelFolder
from gblm.model.packed_reader import PackedReader
from gblm.sparse.formats import Format, Parts, Shape, from_spec, join_formats

if TYPE_CHECKING:
    import onnx_ir as ir

LAYER_WEIGHT = re.compile(r"model\.layers\.(\d+)\.(attn|mlp)\.(\w+)\.MatMul\.weight")
HEAD_WEIGHT = "lm_head.MatMul.weight"
EMBEDDINGS, TABLE = "model.embed_tokens.weight", "model.embed_tokens.table"
QKV, GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
# What graphs or checkpoints join to one linear.
FUSED = {"qkv_proj": QKV, "gate_up_proj": GATE_UP}
DENSE = from_spec("dense/dense")
LINEAR, GATED = "Linear", "GatedLinear"
# Smaller initializers stay in the graph, where shape inference sees them.
INLINE_BYTES = 1024
# ONNX Runtime maps whole pages; the kernels want panels at the beginning of a cache line.
PAGE_BYTES = 4096


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


def pack_graph(folder: Path, packed: ModelFolder) -> list[Replaced]:
    """Put operators with packed weights into a graph.

    Args:
        folder: a float32 graph of the model builder, from the unpacked checkpoint; the graph and
            its data are replaced.
        packed: the packed checkpoint.

    Returns:
        What was replaced.

    Raises:
        CheckpointError: the graph is not what the builder makes of this checkpoint.
    """
    import onnx_ir as ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    model, clean = ir.load(folder / MODEL_FILE), RemoveUnusedNodesPass()
    with PackedReader(packed) as reader:
        rewriter = _Rewriter(model.graph, reader)
        rewriter.replace_gates()
        clean(model)
        rewriter.replace_others()
        clean(model)
        done = {name for one in rewriter.replaced for name in one.linears}
        if missing := sorted(set(reader.linears) - done):
            raise CheckpointError(
                f"{folder}: the graph has no MatMul by the weight of {missing[0]}."
            )
    model.graph.opset_imports[DOMAIN] = DOMAIN_VERSION
    ir.save(
        model, folder / MODEL_FILE, external_data=DATA_FILE, size_threshold_bytes=INLINE_BYTES,
        alignment=PAGE_BYTES, align_threshold=0,
    )  # fmt: skip
    return rewriter.replaced


def read(value: ir.Value) -> Tensor:
    """Read an initializer into memory, floating values as float32."""
    stored = value.const_value
    if stored is None:
        raise CheckpointError(f"the graph has no values for {value.name}.")
    kind = np.float32 if stored.dtype.is_floating_point() else None
    return torch.from_numpy(np.array(stored.numpy(), dtype=kind))


class _Rewriter:
    """Replaces nodes of a graph, and records in `replaced` what took their place."""

    def __init__(self, graph: ir.Graph, reader: PackedReader) -> None:
        self.graph, self.reader = graph, reader
        self.replaced: list[Replaced] = []

    def replace_gates(self) -> None:
        """Let one operator compute the gated half of each feed-forward."""
        for node in tuple(self.graph):
            if node.op_type == "Sigmoid" and (found := find_gate(node)):
                self._replace(GATED, *found)

    def replace_others(self) -> None:
        """Let operators multiply by all other weights, and narrow the embeddings."""
        for node in tuple(self.graph):
            if node.op_type == "MatMul":
                self._replace(LINEAR, [node], node)
            elif node.op_type == "Gather":
                self._narrow(node)

    def _replace(self, op: str, matmuls: Sequence[ir.Node], last: ir.Node) -> None:
        """Put one operator in the place of MatMuls, if they multiply by weights of the checkpoint.

        Args:
            op: the operator.
            matmuls: MatMuls of the same input.
            last: the node whose result the operator gives.
        """
        import onnx_ir as ir

        weights = [weight for node in matmuls if (weight := node.inputs[1]) is not None]
        linears = self._packable(weights)
        if not linears:
            return
        panels = self._panels(torch.cat([_transposed(weight) for weight in weights]), linears)
        out, into = panels.shape
        sizes = {"out_features": out // len(matmuls), "in_features": into}
        data = self._initializer(f"{linears[0]}.panels", panels.data)
        new = ir.node(op, [matmuls[0].inputs[0], data], sizes, domain=DOMAIN, name=last.name)
        ir.convenience.replace_nodes_and_values(
            self.graph, last, [last], [new], last.outputs, new.outputs
        )
        self.replaced.append(Replaced(op, linears, panels.spec, panels.shape, panels.data.numel()))

    def _packable(self, weights: Sequence[ir.Value]) -> tuple[str, ...]:
        """Name the linears behind weights that can be joined panels without loss, else none."""
        if not all(weight.is_initializer() for weight in weights):
            return ()
        linears = linears_behind([str(weight.name) for weight in weights], self._is_stored)
        if any(name in self.reader.linears for name in linears):
            return linears
        stored = map(_transposed, weights)
        exact = all(is_bfloat16(weight) and weight.shape[1] % 8 == 0 for weight in stored)
        return linears if exact else ()

    def _is_stored(self, name: str) -> bool:
        return name in self.reader.linears or f"{name}.weight" in self.reader.headers

    def _panels(self, stored: Tensor, linears: tuple[str, ...]) -> Panels:
        """Make panels of a weight of the graph, once it is found to be the checkpoint's."""
        if not any(name in self.reader.linears for name in linears):
            shape = (stored.shape[0], stored.shape[1])
            return _prepare(linears[0], DENSE, {"values": stored.to(torch.bfloat16)}, shape)
        panels, expected = packed_panels(self.reader, linears)
        if not torch.equal(stored, expected):
            raise CheckpointError(
                f"the graph's weight of {', '.join(linears)} is not the checkpoint's."
            )
        return panels

    def _initializer(self, name: str, data: Tensor) -> ir.Value:
        import onnx_ir as ir
        from onnx_ir.tensor_adapters import TorchTensor

        value = ir.val(name, const_value=TorchTensor(data, name))
        self.graph.register_initializer(value)
        return value

    def _narrow(self, node: ir.Node) -> None:
        """Look bfloat16 rows of the embeddings up and widen those alone, if that loses nothing."""
        import onnx_ir as ir

        table = node.inputs[0]
        maker = table.producer() if table is not None else None
        if maker is not None and maker.op_type == "Transpose":  # of a head that is tied to them
            table = maker.inputs[0]
        if table is None or table.name not in (HEAD_WEIGHT, EMBEDDINGS):
            return
        rows = _transposed(table) if table.name == HEAD_WEIGHT else read(table)
        if not is_bfloat16(rows):
            return
        data = self._initializer(TABLE, rows.to(torch.bfloat16))
        found = ir.node("Gather", [data, node.inputs[1]], name=node.name)
        wide = ir.node(
            "Cast", found.outputs, {"to": int(ir.DataType.FLOAT)}, name=f"{node.name}/Cast"
        )
        ir.convenience.replace_nodes_and_values(
            self.graph, node, [node], [found, wide], node.outputs, wide.outputs
        )


def _transposed(weight: ir.Value) -> Tensor:
    """Read a weight of a MatMul [in, out] as [out, in] float32."""
    return read(weight).T.contiguous()


def linears_behind(weights: Sequence[str], known: Callable[[str], bool]) -> tuple[str, ...]:
    """Name a checkpoint's linears behind weights of a graph, in the order of their rows.

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
            if not is_bfloat16(parts["values"]):
                raise InputError(
                    f"{linear.name}: the values are {parts['values'].dtype} and not exact in "
                    "bfloat16, which the operator stores. Prune the bfloat16 model, or export "
                    "without --sparse."
                )
            parts["values"] = parts["values"].to(torch.bfloat16)
        pieces.append(parts)
    shape = (sum(linear.shape[0] for linear in packed), packed[0].shape[1])
    joined = fmt.join(pieces)
    wide = fmt.widened(), fmt.widen(joined)
    return _prepare(linears[0], *wide, shape), fmt.expand(joined, torch.float32).float()


def is_bfloat16(weight: Tensor) -> bool:
    """Tell whether every value is exact in bfloat16."""
    return bool((weight == weight.to(torch.bfloat16)).all())


def _prepare(name: str, fmt: Format, parts: Parts, shape: Shape) -> Panels:
    backend = BACKENDS["cpu"]
    if reason := backend.refuses(fmt, shape, torch.bfloat16, torch.device("cpu")):
        raise InputError(f"{name}: the operator cannot take this weight: {reason}.")
    return Panels(shape, backend.prepare(fmt, parts, shape)[0], fmt.spec)


def find_gate(sigmoid: ir.Node) -> tuple[list[ir.Node], ir.Node] | None:
    """Find the first half of a gated feed-forward whose inner values nobody else reads.

    Args:
        sigmoid: the node around which it is.

    Returns:
        The MatMul that goes through silu and the one that it is multiplied with; and the Mul that
        gives the result.
    """
    source, ratio = sigmoid.inputs[0], sigmoid.outputs[0]
    silu = _only_reader(ratio)
    if source is None or silu is None or silu.op_type != "Mul":
        return None
    last = _only_reader(silu.outputs[0])
    if {*silu.inputs} != {source, ratio} or last is None or last.op_type != "Mul":
        return None
    other = next((value for value in last.inputs if value is not silu.outputs[0]), None)
    if other is None or _only_reader(other) is None or len(source.uses()) != 2:
        return None
    gate, up = source.producer(), other.producer()
    if gate is None or up is None or {gate.op_type, up.op_type} != {"MatMul"}:
        return None
    return ([gate, up], last) if gate.inputs[0] is up.inputs[0] else None


def _only_reader(value: ir.Value) -> ir.Node | None:
    uses = tuple(value.uses())
    return uses[0].node if len(uses) == 1 else None
