"""The output head as codes: in the format `dense`, as a group of its own.

The codes of a head that is tied to the embeddings stand for these, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gblm.checkpoint.report import weight_row
from gblm.errors import CheckpointError, InputError, PatternError
from gblm.model.layers import Layers
from gblm.model.reader import Reader
from gblm.sparse.formats import Format, Parts, Shape, format_for
from gblm.sparse.formats.manifest import Group
from gblm.sparse.passes import all_finite, row_blocks
from gblm.sparse.patterns import Dense
from gblm.sparse.values import parse_values, quantize
from gblm.sparse.weights import SparseWeight

# Logits feel every error of the head, so that 4 bits need more scales than in a linear.
GROUPED = {"int4": "int4:32"}


@dataclass(frozen=True)
class Head:
    """An output head that is to be packed.

    Attributes:
        name: of the module, such as "lm_head".
        source: the tensor that it is made from: its own weight, or the embeddings'.
        fmt: `dense`, with integer values.
        shape: [out, in].
        dtype: of the source tensor.
        rounding: makes codes of some rows; None rounds to the nearest.
    """

    name: str
    source: str
    fmt: Format
    shape: Shape
    dtype: torch.dtype
    rounding: Callable[[Tensor], SparseWeight] | None = None

    @property
    def tied(self) -> dict[str, str]:
        """Map the embeddings that it stands for to its name; none if it has a weight of its own."""
        embeddings = self.source.removesuffix(".weight")
        return {} if embeddings == self.name else {embeddings: self.name}

    @property
    def weights(self) -> int:
        """Count its weights."""
        return self.shape[0] * self.shape[1]

    @property
    def num_bytes(self) -> int:
        """Count its bytes when it is packed."""
        return self.fmt.most_bytes(self.shape, self.dtype, "row")

    @property
    def added_bytes(self) -> int:
        """Tell by how many bytes the model grows; they are negative."""
        return self.num_bytes - self.weights * self.dtype.itemsize

    @property
    def group(self) -> Group:
        """Give the head's group in the manifest."""
        return Group(
            format=self.fmt.name,
            pattern=str(self.fmt.pattern),
            values=str(self.fmt.values),
            targets=(self.name,),
        )

    def check(self, reader: Reader) -> None:
        """Raise CheckpointError when a weight is NaN or Inf: before a run, not at its end."""
        for rows in self._blocks(reader):
            if not all_finite(rows):
                raise CheckpointError(f"{self.source} holds NaN or Inf: the checkpoint is damaged.")

    def pack(self, reader: Reader) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Round and pack.

        Returns:
            The parts by full name, and the row of the report.
        """
        pieces, zeros = list[Parts](), 0
        for rows in self._blocks(reader):
            weight = (self.rounding or self._to_the_nearest)(rows)
            pieces.append(self.fmt.pack(self.name, weight))
            zeros += weight.zeros
        parts = self.fmt.join(pieces)
        row = weight_row(self.name, self.fmt, self.shape, self.dtype, zeros, parts)
        row["embeddings"] = bool(self.tied)
        return {f"{self.name}.{part}": t for part, t in parts.items()}, row

    def _to_the_nearest(self, rows: Tensor) -> SparseWeight:
        every = torch.ones_like(rows, dtype=torch.bool)
        return quantize(rows, every, self.fmt.values, self.name)

    def _blocks(self, reader: Reader) -> Iterator[Tensor]:
        """Give some rows at a time, for a head has up to a billion weights."""
        weight = reader.tensor(self.source)
        yield from (weight[rows] for rows in row_blocks(self.shape))


def output_head(layers: Layers, values: str) -> Head | None:
    """Find the output head that is to be packed; None if it stays floating.

    Args:
        layers: of the dense model.
        values: "float", "int8" or "int4".

    Raises:
        InputError: the head is no nn.Linear.
        CheckpointError: the tensor is missing, or no floating-point matrix.
        PatternError: its columns do not divide into groups.
    """
    if values == "float":
        return None
    model, reader = layers.model, layers.reader
    module = model.get_output_embeddings()
    name = next((name for name, part in model.named_modules() if part is module), "")
    if not isinstance(module, nn.Linear) or not name:
        raise InputError(
            f"{type(model).__name__} has no output head that is an nn.Linear: --head float."
        )
    weight = f"{name}.weight"
    # As in transformers: a head that is stored counts, whatever config.json says of tying.
    source = weight if weight in reader else model.all_tied_weights_keys.get(weight, weight)
    if source not in reader:
        raise CheckpointError(f"{reader.folder}: tensor {source} is missing.")
    shape, dtype = reader.headers[source]
    if len(shape) != 2 or not dtype.is_floating_point:
        raise CheckpointError(f"{source} is {list(shape)} {dtype}, no floating matrix.")
    try:
        kind = parse_values(GROUPED.get(values, values)).resolve(name, shape[1])
    except PatternError as error:
        raise PatternError(
            f"{name}: {shape[1]} columns do not divide into groups of 32, 64 or 128. Leave the "
            "output head as it is: --head float."
        ) from error
    return Head(name, source, format_for(Dense(), kind), (shape[0], shape[1]), dtype)


def untied(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config.json whose output head is not the embeddings."""
    changed = config | {"tie_word_embeddings": False}
    if isinstance(text := config.get("text_config"), dict):
        changed["text_config"] = text | {"tie_word_embeddings": False}
    return changed
