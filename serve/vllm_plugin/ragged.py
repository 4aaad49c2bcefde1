"""Load ragged parts (format bitmask) through vLLM's loader: q/k/v, gate/up, tensor parallel.

The number of kept values is known only when a tensor arrives. So each part of each piece is kept
as it comes; once a piece is complete it is cut to this rank, and with the last one the pieces are
joined and packed again: no more than one linear is unpacked at a time. A model whose pieces are
fused on disk (Phi-3) has parts of all of them in one: vLLM is asked which rows each piece is.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from torch import Tensor
from vllm.model_executor.parameter import BasevLLMParameter

from gblm.errors import CheckpointError
from gblm.sparse.formats import Format
from gblm.sparse.weights import SparseWeight

Cut = Literal["rows", "columns"]
PIECES = {"q": 0, "k": 1, "v": 2}  # vLLM's names of what a fused q/k/v is made of


class Rows:
    """Stands for a tensor that is fused on disk: what vLLM cuts out of it are numbers of rows."""

    @staticmethod
    def narrow(_: int, start: int, length: int) -> range:
        """Give the rows of one piece, of all ranks."""
        return range(start, start + length)


@dataclass
class Pieces:
    """Collects the pieces of one vLLM linear, which arrive in one format, in the order of rows.

    `rows` counts the rows of each piece on this rank, `columns` those of the linear; `name` is for
    messages.
    """

    fmt: Format
    name: str
    rows: list[int]
    columns: int
    _arriving: dict[Hashable, dict[str, Tensor]] = field(default_factory=dict)
    _places: dict[int, tuple[range, int]] = field(default_factory=dict)
    _done: dict[int, SparseWeight] = field(default_factory=dict)
    _whole: dict[str, Tensor] | None = None

    def take(
        self, piece: int, part: str, tensor: Tensor | range, cut: Cut, rank: int, num_ranks: int
    ) -> None:
        """Keep one part; when the piece has all of them, cut it to this rank.

        Args:
            piece: which of q, k, v or gate, up.
            part: local name.
            tensor: the whole part, as stored; the piece's rows where `take_fused` asks for them.
            cut: what is split over ranks.
            rank: this rank's place among those that hold different slices.
            num_ranks: how many slices there are.
        """
        if isinstance(tensor, range):
            self._places[piece] = tensor, rank
            return
        parts = self._arrived(piece, part, tensor)
        if parts is None:
            return
        dim = 0 if cut == "rows" else 1
        local = (self.rows[piece], self.columns)
        shape = (local[0] * num_ranks, local[1]) if dim == 0 else (local[0], local[1] * num_ranks)
        self.fmt.validate(f"{self.name}[{piece}]", parts, shape)
        self._done[piece] = self.fmt.unpack(parts).narrow(dim, rank * local[dim], local[dim])
        self._join_if_complete()

    def take_fused(
        self, pieces: Hashable, part: str, tensor: Tensor, locate: Callable[[Rows], None]
    ) -> None:
        """Keep one part of several pieces; when it was the last, cut each piece to this rank.

        Args:
            pieces: vLLM's name of them.
            part: local name.
            tensor: the whole part, as stored.
            locate: vLLM's loader, which finds the rows of each piece and hands them to `take`.
        """
        parts = self._arrived(pieces, part, tensor)
        if parts is None:
            return
        self._places.clear()
        locate(Rows())
        num_rows = max(rows.stop for rows, _ in self._places.values())
        self.fmt.validate(self.name, parts, (num_rows, self.columns))
        whole = self.fmt.unpack(parts)
        for piece, (rows, rank) in self._places.items():
            size = self.rows[piece]
            self._done[piece] = whole.narrow(0, rows.start + rank * size, size)
        del whole
        self._join_if_complete()

    def _arrived(self, piece: Hashable, part: str, tensor: Tensor) -> dict[str, Tensor] | None:
        """Keep a part; give all parts of its piece with the last of them, else None."""
        parts = self._arriving.setdefault(piece, {})
        parts[part] = tensor.detach().cpu()
        return None if parts.keys() < set(self.fmt.parts) else self._arriving.pop(piece)

    def _join_if_complete(self) -> None:
        if len(self._done) == len(self.rows):
            self._whole = self._join()
            give_back_memory()

    def hand_over(self) -> dict[str, Tensor]:
        """Give the parts of the fused weight on this rank, and do not keep them here.

        vLLM holds parameters, and they this, beyond loading.

        Raises:
            CheckpointError: not all parts have arrived.
        """
        whole, self._whole = self._whole, None
        if whole is None:
            raise CheckpointError(
                f"{self.name}: parts of its weight are missing in the checkpoint."
            )
        return whole

    def _join(self) -> dict[str, Tensor]:
        done = [self._done.pop(i) for i in range(len(self.rows))]
        whole = done[0] if len(done) == 1 else SparseWeight.cat(done)
        done.clear()
        return self.fmt.pack(self.name, whole)


def give_back_memory() -> None:
    """Let glibc return what was freed; it would keep the gaps between the weights that stay."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class RaggedParameter(BasevLLMParameter):
    """Stands for one part of all pieces of a linear; hands what vLLM loads to its `Pieces`."""

    output_dim = 0  # along which vLLM cuts what is fused on disk

    def __init__(self, *, data: Tensor, weight_loader: Any, part: str, pieces: Pieces) -> None:
        super().__init__(data=data, weight_loader=partial(_load, weight_loader))
        self.part = part
        self.pieces = pieces

    def load_column_parallel_weight(self, loaded_weight: Tensor) -> None:
        """Take a part whose output features are split over ranks."""
        self.pieces.take(0, self.part, loaded_weight, "rows", self.tp_rank, self.tp_size)

    def load_row_parallel_weight(self, loaded_weight: Tensor) -> None:
        """Take a part whose input features are split over ranks."""
        self.pieces.take(0, self.part, loaded_weight, "columns", self.tp_rank, self.tp_size)

    def load_merged_column_weight(self, loaded_weight: Tensor, **kwargs: Any) -> None:
        """Take a part of gate or up."""
        piece = int(kwargs["shard_id"])
        self.pieces.take(piece, self.part, loaded_weight, "rows", self.tp_rank, self.tp_size)

    def load_qkv_weight(self, loaded_weight: Tensor, **kwargs: Any) -> None:
        """Take a part of q, k or v; `num_heads` ranks share a replicated key/value head."""
        piece = PIECES[kwargs["shard_id"]]
        shared_by = 1 if piece == 0 else kwargs["num_heads"]
        rank, num_ranks = self.tp_rank // shared_by, self.tp_size // shared_by
        self.pieces.take(piece, self.part, loaded_weight, "rows", rank, num_ranks)


def _load(loader: Any, param: RaggedParameter, tensor: Tensor, *shard: Any) -> None:
    """Load as vLLM does, but complete what is fused on disk before it is cut."""
    if len(param.pieces.rows) == 1 or (shard and isinstance(shard[0], int | str)):
        loader(param, tensor, *shard)
        return
    param.pieces.take_fused(shard, param.part, tensor, lambda rows: loader(param, rows, *shard))
