"""Loading ragged parts (bitmask format) through vLLM's loader: q/k/v, gate/up, tensor parallel.

The number of kept values is known only when a tensor arrives. So each part of each piece is kept
as it comes; once a piece is complete it is cut to this rank, and at the end the pieces are joined.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from vllm.model_executor.parameter import BasevLLMParameter

from gblm.errors import CheckpointError
from gblm.formats import Format, Shape
from gblm.weights import SparseWeight

Cut = Literal["rows", "columns"]


@dataclass
class Pieces:
    """The pieces of one vLLM linear, in the order of its rows.

    Attributes:
        fmt: format of every piece.
        name: of the linear, for messages.
        rows: rows of each piece on this rank.
        columns: columns on this rank.
    """

    fmt: Format
    name: str
    rows: list[int]
    columns: int
    _arriving: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    _done: dict[int, SparseWeight] = field(default_factory=dict)

    def take(self, piece: int, part: str, tensor: Tensor, rank: int, cut: Cut) -> None:
        """Keep one part; when the piece has all of them, cut it to this rank."""
        parts = self._arriving.setdefault(piece, {})
        parts[part] = tensor.detach().cpu()
        if parts.keys() < set(self.fmt.parts):
            return
        del self._arriving[piece]
        shape = self.fmt.shape_of({name: tuple(t.shape) for name, t in parts.items()})
        self.fmt.validate(f"{self.name}[{piece}]", parts, shape)
        self._done[piece] = self._cut(self.fmt.unpack(parts, shape), piece, rank, cut)

    def join(self) -> dict[str, Tensor]:
        """The parts of the fused weight on this rank."""
        if sorted(self._done) != list(range(len(self.rows))):
            raise CheckpointError(
                f"{self.name}: parts of its weight are missing in the checkpoint."
            )
        whole = SparseWeight(
            torch.cat([self._done[i].weight for i in range(len(self.rows))]),
            torch.cat([self._done[i].mask for i in range(len(self.rows))]),
        )
        self._done.clear()
        return self.fmt.pack(self.name, whole)

    @property
    def shape(self) -> Shape:
        """[out, in] of the fused weight on this rank."""
        return sum(self.rows), self.columns

    def _cut(self, weight: SparseWeight, piece: int, rank: int, cut: Cut) -> SparseWeight:
        dim, length = (0, self.rows[piece]) if cut == "rows" else (1, self.columns)
        if weight.mask.shape[1 - dim] != (self.columns if dim == 0 else self.rows[piece]):
            raise CheckpointError(
                f"{self.name}: stored as {list(weight.mask.shape)}, which does not fit the model."
            )
        if weight.mask.shape[dim] < (rank + 1) * length:
            raise CheckpointError(
                f"{self.name}: stored as {list(weight.mask.shape)}, too small for the model."
            )
        start = rank * length
        return SparseWeight(
            weight.weight.narrow(dim, start, length).clone(),
            weight.mask.narrow(dim, start, length).clone(),
        )


class RaggedParameter(BasevLLMParameter):
    """One part of all pieces of a linear; hands what vLLM loads to the linear's `Pieces`."""

    def __init__(self, *, data: Tensor, weight_loader: Any, part: str, pieces: Pieces) -> None:
        super().__init__(data=data, weight_loader=weight_loader)
        self.part = part
        self.pieces = pieces

    def load_column_parallel_weight(self, loaded_weight: Tensor) -> None:
        """Output features are split over ranks."""
        self.pieces.take(0, self.part, loaded_weight, self.tp_rank, "rows")

    def load_row_parallel_weight(self, loaded_weight: Tensor) -> None:
        """Input features are split over ranks."""
        self.pieces.take(0, self.part, loaded_weight, self.tp_rank, "columns")

    def load_merged_column_weight(self, loaded_weight: Tensor, **kwargs: Any) -> None:
        """One of gate and up."""
        piece = self._shard_id_as_int(kwargs["shard_id"])
        self.pieces.take(piece, self.part, loaded_weight, self.tp_rank, "rows")

    def load_qkv_weight(self, loaded_weight: Tensor, **kwargs: Any) -> None:
        """One of q, k and v; `num_heads` ranks share a replicated key/value head."""
        piece = self._shard_id_as_int(kwargs["shard_id"])
        rank = self.tp_rank if piece == 0 else self.tp_rank // kwargs["num_heads"]
        self.pieces.take(piece, self.part, loaded_weight, rank, "rows")
