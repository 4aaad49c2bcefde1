"""Convert folders that compressed-tensors wrote into packed folders of ours, bit for bit.

Only fp8 codes become something else: their products with the scales, rounded once to bfloat16. The
library dropped its sparse formats, and vLLM and transformers dropped them with it, so nothing else
reads these files. Never prunes. What config.json says is held against closed lists, or refused;
nothing is looked up or run by it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gblm.checkpoint.pack import Packing, Piece, check_packable, check_room, write_packed
from gblm.errors import CheckpointError, InputError
from gblm.export.legacy_layouts import (
    FP8,
    LAYOUTS,
    MARLIN,
    PLAIN,
    ROUNDING,
    SCALE,
    TWO_OF_FOUR,
    Raw,
    Stored,
)
from gblm.export.pack import MIN_SPARSITY, find_pattern
from gblm.model.folder import CODE_FORMATS, LEGACY_FORMATS, ModelFolder
from gblm.model.layers import Layers
from gblm.model.linears import prunable
from gblm.model.reader import Header, Reader
from gblm.progress import Progress, no_progress
from gblm.sparse.formats import VALUE_DTYPES, Format, format_for
from gblm.sparse.patterns import NM, Pattern
from gblm.sparse.weights import same_bits

logger = logging.getLogger(__name__)

# Tensors that quantise activations; ours stay floating.
ACTIVATIONS = ("input_scale", "input_zero_point", "output_scale", "output_zero_point")
PARTS = {part for layout in LAYOUTS.values() for part in layout.parts} - {"weight", "shape", "meta"}
REFUSED = {
    "weight_zero_point": "asymmetric codes are not converted",
    "weight_g_idx": "codes in another column order are not converted",
    SCALE: "the scales of codes that are not stored sparse",
}


def export_legacy(
    source: str | Path | ModelFolder,
    output: Path,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Convert a folder of compressed-tensors; one linear at a time is in memory.

    Linears of the decoder layers that are stored sparse are packed, everything else is stored as
    the dense tensor that it stands for.

    Args:
        source: a folder or hub id with a sparse format of compressed-tensors.
        output: the folder to make.
        overwrite: replace an existing folder.
        progress: for a progress bar.

    Returns:
        The sparsity report; "rounded" in it tells that there were fp8 codes.

    Raises:
        CheckpointError: the folder is damaged, or of a format that is not converted.
        InputError: there is nothing to pack, or our value types cannot hold codes or scales.
    """
    folder = ModelFolder.open(source)
    with LegacyReader(folder) as reader:
        rounds = any(stored.dtype == FP8 for stored in reader.packed.values())
        rounded = {"rounded": "bfloat16"} if rounds else {}
        if rounds:
            logger.warning("%s: %s.", folder, ROUNDING)
        layers = Layers(reader)
        check_room(reader, output, overwrite)
        names = packable(reader, tuple(prunable(layers.model)))
        pattern = _pattern(reader, names)
        formats = {
            name: format_for(pattern, reader.packed[f"{name}.weight"].values) for name in names
        }
        check_packable(reader, formats)
        recipe = {
            "model": str(folder), "method": "pack", "pattern": str(pattern),
            "options": {"legacy": reader.settings.layout, **rounded},
        }  # fmt: skip
        packing = Packing(layers, recipe, keeps_values=False)
        pieces = _pieces(packing, reader, formats, progress("converting", len(names)))
        return write_packed(packing, pieces, output, overwrite) | rounded


def packable(reader: LegacyReader, linears: tuple[str, ...]) -> list[str]:
    """List the linears that are stored sparse and have columns that our formats can hold.

    Raises:
        InputError: there are none.
    """
    if reader.settings.activations:
        logger.warning("%s: only weights are taken; activations stay floating.", reader.folder)
    names = []
    for name in linears:
        if (stored := reader.packed.get(f"{name}.weight")) is None:
            continue
        columns = stored.shape[-1]
        if columns % 8:
            logger.warning("%s: %d columns are no multiple of 8: stored dense.", name, columns)
            continue
        names.append(name)
    if not names:
        raise InputError(f"{reader.folder}: no linear of a decoder layer can be stored packed.")
    return names


def _pattern(reader: LegacyReader, names: list[str]) -> Pattern:
    """Take 2:4 where the file says so, else the tightest pattern that all masks follow."""
    if reader.settings.layout in (TWO_OF_FOUR, MARLIN):
        return NM(2, 4)
    found = find_pattern((name, reader.raw(f"{name}.weight").mask) for name in names)
    if reader.settings.layout == PLAIN and found.sparsity < MIN_SPARSITY:
        way_out = "its tensors are plain floats: remove `quantization_config` from config.json and "
        way_out += "use it as a dense model."
        if reader.settings.scales:
            way_out = "remove `sparsity_config` from config.json and serve it as what it is."
        raise InputError(
            f"{reader.folder}: only {found.sparsity:.2%} of the weights are zero, so packing would "
            f"make it larger; {way_out}"
        )
    return found


def _pieces(
    packing: Packing,
    reader: LegacyReader,
    formats: Mapping[str, Format],
    step: Callable[[], None],
) -> Iterator[Piece]:
    """Pack one linear after the other, and unpack it again to compare it with the file."""
    for name, fmt in formats.items():
        stored, raw = reader.packed[f"{name}.weight"], reader.raw(f"{name}.weight")
        tensors, rows = packing.pack(name, stored.weight(raw), fmt)
        parts = {part: tensors[f"{name}.{part}"] for part in fmt.parts}
        fmt.validate(name, parts, (raw.mask.shape[0], raw.mask.shape[1]))
        unpacked = stored.floats(raw) + 0.0  # packing writes −0.0 as +0.0
        if not same_bits(fmt.expand(parts, unpacked.dtype), unpacked):
            raise CheckpointError(f"{name}: the packed weight is not the one in the file.")
        yield tensors, rows
        reader.release()
        step()


@dataclass(frozen=True)
class Settings:
    """Says how a folder's weights are stored.

    `layout` is a name of LAYOUTS. `scales` says how those of codes may lie: "tensor", "channel", or
    the number of columns that share one; it is empty for floating values. `activations` tells
    whether activations were meant to be quantised, too.
    """

    layout: str
    scales: frozenset[str | int] = frozenset()
    activations: bool = False

    @classmethod
    def of(cls, folder: ModelFolder) -> Settings:
        """Read the "quantization_config" of a config.json.

        Raises:
            CheckpointError: it is not of compressed-tensors, or of a format that is not converted.
        """
        layout = folder.legacy_format
        if layout is None:
            raise CheckpointError(
                f"{folder}: config.json names no sparse format of compressed-tensors that is "
                f"converted: {', '.join(LEGACY_FORMATS)}, the last of floats and 2:4 codes only."
            )
        fields = folder.config["quantization_config"]
        groups = fields.get("config_groups")
        if not groups and layout != MARLIN:
            return cls(layout)
        if refusal := _refusal(layout, fields):
            raise CheckpointError(f"{folder}: {refusal}")
        activations = any(group.get("input_activations") for group in groups.values())
        weights = [group["weights"] for group in groups.values()]
        scales = {w["group_size" if w["strategy"] == "group" else "strategy"] for w in weights}
        return cls(layout, frozenset(scales), activations)


def _refusal(layout: str, fields: dict[str, Any]) -> str | None:
    """Say why codes cannot be converted: all that they and their scales alone do not tell."""
    groups, name = fields.get("config_groups"), fields.get("format")
    if layout != MARLIN and name not in CODE_FORMATS:
        known = ", ".join(CODE_FORMATS)
        return f"codes stored as {str(name)[:40]!r} are not converted; {known} are."
    if fields.get("kv_cache_scheme"):
        return "a quantised KV cache is not converted; its scales would be lost."
    if not isinstance(groups, dict) or not all(isinstance(g, dict) for g in groups.values()):
        return "config_groups are no groups of settings."
    every = (_weights_refusal(layout, group.get("weights")) for group in groups.values())
    return next((refusal for refusal in every if refusal), None)


def _weights_refusal(layout: str, weights: Any) -> str | None:
    if not isinstance(weights, dict):
        return "config_groups have no settings for weights."
    off = (None, False)
    wanted: dict[str, tuple[object, ...]] = {
        "num_bits": (4, 8) if layout == MARLIN else (8,), "type": ("int", "float"),
        "symmetric": (True,), "actorder": off, "dynamic": off,
    }  # fmt: skip
    for key, values in wanted.items():
        if weights.get(key) not in values:
            return (
                f"weights with {key} {str(weights.get(key))[:40]!r} are not converted; symmetric "
                "int8 or fp8 codes in column order are, and int4 ones in marlin-24."
            )
    strategy, size = weights.get("strategy"), weights.get("group_size")
    if strategy == "group" and type(size) is int and size > 0:
        return None
    if strategy in ("tensor", "channel"):
        return None
    return f"scales by {str(strategy)[:40]!r} are not converted; tensor, channel and group are."


class LegacyReader(Reader):
    """Reads tensors by the names of the dense model; what is stored in parts is expanded.

    `packed` describes the weights that are stored in parts, by the names of the dense tensors.
    """

    def __init__(self, folder: ModelFolder) -> None:
        """Read config.json, the headers and the parts `shape`, and hold them against each other.

        Raises:
            CheckpointError: it is not of compressed-tensors, damaged, or of no format that is read.
        """
        self.settings = Settings.of(folder)
        super().__init__(folder)
        self.packed: dict[str, Stored] = {}
        for stored in self._find():
            if stored.name in self.packed:
                raise CheckpointError(f"{folder}: {stored.name} is stored twice.")
            self.packed[stored.name] = stored
        if not self.packed:
            raise CheckpointError(
                f"{folder}: config.json says {self.settings.layout}, but no tensor is stored so."
            )
        self.headers = dict(self._dense_headers())

    def rename(self, names: Mapping[str, str]) -> None:
        """Call tensors as the model in memory does; see Reader."""
        super().rename(names)
        self.packed = {names.get(name, name): stored for name, stored in self.packed.items()}

    def raw(self, name: str) -> Raw:
        """Read a weight that is stored in parts."""
        stored = self.packed[name]
        return stored.raw({part: self._load(own) for part, own in stored.parts.items()})

    def tensor(self, name: str) -> Tensor:
        """Read one tensor, expanded if it is stored in parts.

        Raises:
            InputError: it is integer codes, which floats do not hold exactly.
        """
        if (stored := self.packed.get(name)) is None:
            return super().tensor(name)
        if not stored.values.is_float:
            raise InputError(
                f"{name}: its codes belong to no linear that can be stored packed, and floats do "
                "not hold them exactly; start from the dense model."
            )
        return stored.floats(self.raw(name)).reshape(stored.shape)

    def _find(self) -> Iterator[Stored]:
        """Describe every weight that is stored in parts."""
        layout = LAYOUTS[self.settings.layout]
        for prefix, headers in self._parts(layout.parts).items():
            for part in layout.parts:
                if part not in headers:
                    raise CheckpointError(f"{self.folder}: {prefix}.{part} is missing.")
            shape = self._shape(prefix, headers) if "shape" in headers else []
            stored = layout.describe(self.settings.layout, prefix, headers, shape)
            scale = self.headers.get(stored.scale_name)
            if stored.layout == MARLIN:
                groups, rows = headers["scale_packed"][0]
                scale = (rows, groups), torch.float16
            if scale is not None:
                stored = stored.scaled(scale, self.settings.scales)
            elif stored.dtype not in VALUE_DTYPES:
                raise CheckpointError(
                    f"{prefix}: values of {stored.dtype} without scales; floats are needed."
                )
            yield stored

    def _parts(self, own: tuple[str, ...]) -> dict[str, dict[str, Header]]:
        """Collect the parts' headers by what the names begin with."""
        found: dict[str, dict[str, Header]] = {}
        for name, header in self.headers.items():
            prefix, _, part = name.rpartition(".")
            if part in own and (part != "weight" or len(header[0]) == 2):
                found.setdefault(prefix, {})[part] = header
            elif part in PARTS - {*own}:
                layout = self.settings.layout
                raise CheckpointError(f"{self.folder}: {name} is no part of {layout}.")
        return found

    def _dense_headers(self) -> Iterator[tuple[str, Header]]:
        """Give the headers of the dense tensors; refuse what is unknown beside the packed ones."""
        parts = {name for stored in self.packed.values() for name in stored.parts.values()}
        for name, header in self.headers.items():
            part = name.rpartition(".")[2]
            if name in parts or (self.settings.scales and part in ACTIVATIONS):
                continue
            if name in self.packed:
                raise CheckpointError(f"{self.folder}: {name} is stored twice, packed and dense.")
            if part in REFUSED:
                raise CheckpointError(f"{name}: {REFUSED[part]}.")
            yield name, header
        for name, stored in self.packed.items():
            yield name, (stored.shape, stored.floating)

    def _shape(self, prefix: str, headers: dict[str, Header]) -> list[int]:
        shape, dtype = headers["shape"]
        if dtype != torch.int64 or shape not in ((1,), (2,), (2, 1)):
            raise CheckpointError(f"{prefix}.shape: {list(shape)} {dtype} holds no shape.")
        return [int(size) for size in self._load(f"{prefix}.shape").reshape(-1)]
