"""Make a packed model folder from a dense model and its pruned weights. Never prunes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from gblm.cache import remember
from gblm.checkpoint.head import Head, untied
from gblm.checkpoint.report import licence_of, model_card, summary, weight_row
from gblm.checkpoint.write import (
    ShardWriter,
    check_output,
    copy_side_files,
    file_hashes,
    new_folder,
)
from gblm.errors import CheckpointError, InputError
from gblm.files import write_json
from gblm.model.folder import ModelFolder
from gblm.model.layers import Layers
from gblm.model.linears import prunable
from gblm.model.packed_reader import MANIFEST_FILE, RECIPE_FILE, REPORT_FILE
from gblm.model.reader import Reader
from gblm.provenance import provenance
from gblm.recipe import SHARD_SIZE, published, shard_bytes
from gblm.sparse.formats import VALUE_DTYPES, Format
from gblm.sparse.formats.manifest import Group, Manifest, group_targets
from gblm.sparse.passes import all_finite
from gblm.sparse.weights import SparseWeight

# Packed tensors by full name, and their linears' rows of the sparsity report. Other tensors among
# them take the place of the source's.
Piece = tuple[Mapping[str, Tensor], list[dict[str, Any]]]


@dataclass(frozen=True)
class Packing:
    """What a packed folder is made from, besides the pruned weights themselves.

    Attributes:
        source: the dense model.
        recipe: for recipe.json.
        notes: further facts for MANIFEST.json, such as the calibration tokens' hash.
        keeps_values: kept weights are the source's own, bit for bit, until they are rounded to
            codes; False for methods that update them.
        head: the output head, when it is stored as codes.
    """

    source: Layers
    recipe: dict[str, Any]
    notes: dict[str, Any] = field(default_factory=dict)
    keeps_values: bool = True
    head: Head | None = None

    def pack(self, name: str, weight: SparseWeight, fmt: Format) -> Piece:
        """Pack one linear, in the dtype of the source checkpoint or as codes.

        Args:
            name: its full name.
            weight: the pruned weight, with codes where its values are integers.
            fmt: the format that stores it.

        Raises:
            InputError: a weight is NaN or Inf.
        """
        reader = self.source.reader
        if self.keeps_values and fmt.values.is_float:
            # The computation's dtype may be narrower than the checkpoint's.
            stored = SparseWeight.cut(reader.tensor(f"{name}.weight"), weight.mask.cpu())
        else:
            stored = weight.to(reader.headers[f"{name}.weight"][1])
        if not all_finite(stored.weight):
            raise InputError(
                f"{name}.weight holds NaN or Inf, which readers refuse: repair the model, or "
                "leave it dense with --ignore."
            )
        parts = fmt.pack(name, stored)
        shape = (weight.mask.shape[0], weight.mask.shape[1])
        row = weight_row(name, fmt, shape, stored.weight.dtype, stored.zeros, parts)
        return {f"{name}.{part}": tensor for part, tensor in parts.items()}, [row]


def check_packable(reader: Reader, formats: Mapping[str, Format]) -> None:
    """Fail before the first forward pass when a weight cannot be pruned or stored as chosen.

    Raises:
        CheckpointError: a weight is missing or no matrix, or a tensor has a dtype that packed
            folders do not hold.
        PatternError: its columns do not divide.
    """
    for name, (_, dtype) in reader.headers.items():
        if dtype.is_floating_point and dtype not in VALUE_DTYPES:
            raise CheckpointError(
                f"{name} is {dtype}, and packed folders hold bfloat16, float16 and float32: "
                "store the model in one of these first."
            )
    for name, fmt in formats.items():
        if f"{name}.weight" not in reader:
            raise CheckpointError(f"{reader.folder}: tensor {name}.weight is missing.")
        shape, dtype = reader.headers[f"{name}.weight"]
        if len(shape) != 2 or not dtype.is_floating_point:
            raise CheckpointError(f"{name}.weight is {list(shape)} {dtype}, no floating matrix.")
        fmt.check_shape(name, (shape[0], shape[1]))


def check_room(reader: Reader, output: Path, overwrite: bool, extra: int = 0) -> None:
    """Refuse an output name that is taken, and a disk too small for the packed model at its worst.

    Args:
        reader: of the dense model.
        output: the folder to make.
        overwrite: an existing folder may be replaced.
        extra: bytes that are needed besides.
    """
    need = int(1.1 * sum(map(reader.num_bytes, reader))) + (16 << 20)
    check_output(output, overwrite, need + extra, reader.folder.path)


def write_packed(
    packing: Packing,
    pieces: Iterable[Piece],
    output: Path,
    overwrite: bool = False,
    within: Path | None = None,
) -> dict[str, Any]:
    """Write the folder; it appears under its name complete or not at all.

    Args:
        packing: where it comes from.
        pieces: packed linears, consumed one piece at a time.
        output: the folder to make.
        overwrite: replace an existing folder.
        within: see `new_folder`.

    Returns:
        The sparsity report, as in sparsity_report.json.
    """
    rows: list[dict[str, Any]] = []
    reader = packing.source.reader
    with new_folder(output, overwrite, within) as folder:
        size = shard_bytes(packing.recipe.get("max_shard_size", SHARD_SIZE))
        shards, done = ShardWriter(folder, size), set[str]()
        for tensors, own_rows in pieces:
            rows += own_rows
            done |= {*tensors, *(f"{row['name']}.weight" for row in own_rows)}
            for name, tensor in tensors.items():
                shards.add(name, tensor)
        head_row = _add_head(packing.head, reader, shards)
        if packing.head is not None:
            done.add(packing.head.source)
        for tensor_name in reader:
            if tensor_name not in done:
                shards.add(reader.stored_name(tensor_name), reader.tensor(tensor_name))
        shards.finish()
        dense = sum(map(reader.num_bytes, reader))
        report = summary(rows, head_row, dense, shards.total_bytes)
        source = reader.folder
        config = source.config | {"quantization_config": _manifest(packing, rows).to_config()}
        config = untied(config) if packing.head else config
        write_side_files(folder, source, config, packing.recipe, report, packing.notes)
    return report


def _add_head(head: Head | None, reader: Reader, shards: ShardWriter) -> dict[str, Any] | None:
    """Add the head: it is made from the source alone, so a resumed run keeps nothing for it."""
    if head is None:
        return None
    tensors, row = head.pack(reader)
    for name, tensor in tensors.items():
        shards.add(name, tensor)
    return row


def _manifest(packing: Packing, rows: list[dict[str, Any]]) -> Manifest:
    """Make a group for each way that linears are stored, and one for the head."""
    stored: dict[tuple[str, str, str], list[str]] = {}
    for row in sorted(rows, key=lambda row: str(row["name"])):
        way = (row["format"], row["pattern"], row.get("values", "float"))
        stored.setdefault(way, []).append(row["name"])
    every = tuple(prunable(packing.source.model))
    groups = (
        Group(
            format=name, pattern=pattern, values=values, targets=group_targets(names, every)
        )
        for (name, pattern, values), names in stored.items()
    )  # fmt: skip
    if (head := packing.head) is None:
        return Manifest(groups=tuple(groups))
    return Manifest(groups=(*groups, head.group), tied=head.tied)


def write_side_files(
    folder: Path,
    source: ModelFolder,
    config: dict[str, Any],
    recipe: dict[str, Any],
    report: dict[str, Any],
    notes: dict[str, Any],
) -> None:
    """Write whatever a packed folder holds beside its weights, which must be there already.

    Args:
        folder: the folder that is being made.
        source: the folder whose tokenizer and the like go along.
        config: for config.json.
        recipe: for recipe.json and the model card, which do not tell its paths; the cache does.
        report: for sparsity_report.json and the model card.
        notes: further facts for MANIFEST.json.
    """
    if (place := Path(recipe["model"]).expanduser()).is_dir():
        recipe = recipe | {"model": os.path.abspath(place)}  # noqa: PTH100 (links keep their names)
    shown = published(recipe)
    copy_side_files(source.path, folder)
    write_json(folder / "config.json", config)
    write_json(folder / RECIPE_FILE, shown)
    write_json(folder / REPORT_FILE, report)
    card = model_card(shown, report, licence_of(source.path))
    (folder / "README.md").write_text(card, encoding="utf-8")
    facts = {"schema": 1, "provenance": provenance(), **notes}
    write_json(folder / MANIFEST_FILE, facts | {"files": file_hashes(folder)})
    remember(folder, recipe)
