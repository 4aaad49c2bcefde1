"""A packed model folder, written from a dense one and its pruned weights; and read back.

config.json (with the manifest) · safetensors · recipe.json · sparsity_report.json ·
MANIFEST.json (sha256 of all files) · README.md (model card) · tokenizer files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gblm.checkpoint.card import model_card
from gblm.checkpoint.reader import Header, Reader
from gblm.checkpoint.writer import (
    ShardWriter,
    check_output,
    copy_side_files,
    file_hashes,
    new_folder,
    write_json,
)
from gblm.errors import CheckpointError
from gblm.folder import read_config
from gblm.formats import Format, Parts, Shape, format_for
from gblm.formats.manifest import Group, Manifest, group_targets
from gblm.patterns import Pattern
from gblm.provenance import provenance
from gblm.weights import SparseWeight

MANIFEST_FILE = "MANIFEST.json"
RECIPE_FILE = "recipe.json"
REPORT_FILE = "sparsity_report.json"


@dataclass(frozen=True)
class Packing:
    """What a packed folder is made from, besides the pruned weights themselves.

    Attributes:
        source: the dense model's folder.
        pattern: of all the pruned weights.
        linears: every linear of the decoder layers, pruned or not.
        recipe: for recipe.json.
        notes: further facts for MANIFEST.json, such as the calibration tokens' hash.
        keeps_values: kept weights are the source's own, bit for bit; False for methods that
            update them.
    """

    source: Path
    pattern: Pattern
    linears: tuple[str, ...]
    recipe: dict[str, Any]
    notes: dict[str, Any]
    keeps_values: bool = True


def check_packable(reader: Reader, linears: Iterable[str], pattern: Pattern) -> None:
    """Fail before the first forward pass when a weight cannot be pruned to, or stored in, pattern.

    Raises:
        CheckpointError: a weight is missing or not a floating-point matrix.
        PatternError: its columns do not divide.
    """
    fmt = format_for(pattern)
    for name in linears:
        if f"{name}.weight" not in reader:
            raise CheckpointError(f"{reader.folder}: tensor {name}.weight is missing.")
        shape, dtype = reader.headers[f"{name}.weight"]
        if len(shape) != 2 or not dtype.is_floating_point:
            raise CheckpointError(f"{name}.weight is {list(shape)} {dtype}, no floating matrix.")
        fmt.check_shape(name, (shape[0], shape[1]))


def check_room(reader: Reader, output: Path, overwrite: bool) -> None:
    """The output name is free and the disk can hold the packed model at its worst size."""
    need = int(1.1 * sum(map(reader.num_bytes, reader))) + (16 << 20)
    check_output(output, overwrite, need, reader.folder)


def write_packed(
    packing: Packing,
    pruned: Iterable[tuple[str, SparseWeight]],
    output: Path,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write the folder; it appears under its name complete or not at all.

    Args:
        packing: where it comes from.
        pruned: full name and weight of each pruned linear, consumed one at a time. Values are
            stored in the dtype of the source checkpoint.
        output: the folder to make.
        overwrite: replace an existing folder.

    Returns:
        The sparsity report, as in sparsity_report.json.
    """
    fmt = format_for(packing.pattern)
    rows: list[dict[str, Any]] = []
    with Reader(packing.source) as reader, new_folder(output, overwrite) as folder:
        shards = ShardWriter(folder)
        done = set()
        for name, weight in pruned:
            if packing.keeps_values:
                # The computation's dtype may be narrower than the checkpoint's.
                stored = SparseWeight.cut(reader.tensor(f"{name}.weight"), weight.mask.cpu())
            else:
                stored = weight.to(reader.headers[f"{name}.weight"][1])
            parts = fmt.pack(name, stored)
            for part, tensor in parts.items():
                shards.add(f"{name}.{part}", tensor)
            rows.append(_report_row(name, stored, parts, fmt))
            done.add(name)
        for tensor_name in reader:
            if tensor_name.removesuffix(".weight") not in done:
                shards.add(tensor_name, reader.tensor(tensor_name))
        shards.finish()
        report = _report(rows, sum(map(reader.num_bytes, reader)), shards.total_bytes)
        group = Group(
            format=fmt.name,
            pattern=str(packing.pattern),
            targets=group_targets(sorted(done), packing.linears),
        )
        _write_side_files(packing, folder, Manifest(groups=(group,)), report)
    return report


def _write_side_files(
    packing: Packing, folder: Path, manifest: Manifest, report: dict[str, Any]
) -> None:
    copy_side_files(packing.source, folder)
    config = read_config(packing.source) | {"quantization_config": manifest.to_config()}
    write_json(folder / "config.json", config)
    write_json(folder / RECIPE_FILE, packing.recipe)
    write_json(folder / REPORT_FILE, report)
    (folder / "README.md").write_text(model_card(packing.recipe, report), encoding="utf-8")
    facts = {"schema": 1, "provenance": provenance(), **packing.notes}
    write_json(folder / MANIFEST_FILE, facts | {"files": file_hashes(folder)})


def _report_row(name: str, weight: SparseWeight, parts: Parts, fmt: Format) -> dict[str, Any]:
    shape = list(weight.mask.shape)
    size = sum(t.numel() * t.element_size() for t in parts.values())
    return {
        "name": name,
        "shape": shape,
        "format": fmt.name,
        "pattern": str(fmt.pattern),
        "dtype": str(weight.weight.dtype).removeprefix("torch."),
        "zeros": int((weight.weight == 0).sum()),
        "sparsity": round(float((weight.weight == 0).float().mean()), 6),
        "bytes_dense": weight.weight.numel() * weight.weight.element_size(),
        "bytes_packed": size,
        "bits_per_weight": round(8 * size / weight.mask.numel(), 4),
    }


def _report(rows: list[dict[str, Any]], dense: int, packed: int) -> dict[str, Any]:
    weights = sum(row["shape"][0] * row["shape"][1] for row in rows)
    return {
        "linears": len(rows),
        "sparsity": round(sum(row["zeros"] for row in rows) / weights, 6),
        "bits_per_weight": round(8 * sum(row["bytes_packed"] for row in rows) / weights, 4),
        "bytes_dense": dense,
        "bytes_packed": packed,
        "tensors": rows,
    }


@dataclass(frozen=True)
class PackedLinear:
    """One packed weight as the headers describe it."""

    name: str
    fmt: Format
    shape: Shape
    headers: dict[str, Header]


class PackedReader(Reader):
    """A packed model folder: the manifest, the packed linears, the dense rest."""

    def __init__(self, folder: Path) -> None:
        """Read config.json and the headers, and check one against the other.

        Raises:
            CheckpointError: no manifest of ours, or parts are missing or misshapen.
        """
        self.config = read_config(folder)
        self.manifest = Manifest.from_config(self.config.get("quantization_config"))
        super().__init__(folder)
        # Hosts load every shard they find, so an unlisted one could replace what was checked.
        for path in folder.glob("*.safetensors*"):
            if path.name not in self.files:
                raise CheckpointError(f"{path} belongs to no index; remove it.")
        self.linears = {linear.name: linear for linear in self._find_linears()}
        if not self.linears:
            raise CheckpointError(f"{folder}: the manifest names no weight that is there.")

    def parts(self, name: str) -> dict[str, torch.Tensor]:
        """Read the parts of one packed linear."""
        return {part: self.tensor(f"{name}.{part}") for part in self.linears[name].headers}

    def dense_names(self) -> list[str]:
        """The tensors that are stored as they are."""
        packed = {f"{n}.{part}" for n, linear in self.linears.items() for part in linear.headers}
        return [name for name in self if name not in packed]

    def _find_linears(self) -> Iterator[PackedLinear]:
        """Every module that the manifest names, with all of its parts; nothing packed besides."""
        found: dict[str, dict[str, Header]] = {}
        formats: dict[str, Format] = {}
        for tensor in self:
            name, _, part = tensor.rpartition(".")
            fmt = self.manifest.format_of(name)
            if fmt is None:
                if part == "bitmask":
                    raise CheckpointError(f"{tensor}: packed, but the manifest does not name it.")
            elif part == "weight":
                raise CheckpointError(f"{name}: stored dense, but the manifest says {fmt.name}.")
            elif part in fmt.parts:
                formats[name] = fmt
                found.setdefault(name, {})[part] = self.headers[tensor]
        for name, headers in found.items():
            yield _packed_linear(name, formats[name], headers)


def _packed_linear(name: str, fmt: Format, headers: dict[str, Header]) -> PackedLinear:
    for part in fmt.parts:
        if part not in headers:
            raise CheckpointError(f"{name}: the part {part!r} of format {fmt.name} is missing.")
    if len(headers["bitmask"][0]) != 2 or min(headers["bitmask"][0]) < 1:
        raise CheckpointError(f"{name}.bitmask: shape {list(headers['bitmask'][0])} is impossible.")
    shape = fmt.shape_of(headers["bitmask"][0])
    fmt.check_shape(name, shape)
    fmt.check_layout(name, headers, shape)
    return PackedLinear(name, fmt, shape, headers)
