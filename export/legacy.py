"""Convert checkpoints that compressed-tensors wrote into packed folders of ours, bit for bit.

Only fp8 codes become something else: their products with the scales, rounded once to bfloat16. The
library dropped its sparse formats, and vLLM and transformers dropped them with it, so nothing else
reads these files. Never prunes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from gblm.checkpoint.pack import Packing, Piece, check_packable, check_room, write_packed
from gblm.errors import CheckpointError, InputError, UsageError
from gblm.export.legacy_folder import LegacyReader
from gblm.export.legacy_layouts import MARLIN, ROUNDING, TWO_OF_FOUR
from gblm.export.pack import MIN_SPARSITY, find_pattern
from gblm.model.folder import ModelFolder
from gblm.model.layers import StreamedLayers
from gblm.model.linears import prunable
from gblm.progress import Progress, no_progress
from gblm.sparse.formats import Format, format_for
from gblm.sparse.patterns import NM, Pattern
from gblm.sparse.weights import same_bits

logger = logging.getLogger(__name__)


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
        InputError: there is nothing to pack.
        UsageError: there is nothing to convert.
    """
    folder = ModelFolder.open(source)
    if folder.kind == "packed":
        raise UsageError(f"{folder} is packed by gblm already: there is nothing to convert.")
    with LegacyReader(folder) as reader:
        rounded = {"rounded": "bfloat16"} if reader.has_fp8 else {}
        if rounded:
            logger.warning("%s: %s.", folder, ROUNDING)
        layers = StreamedLayers(reader)
        check_room(reader, output, overwrite)
        names = packable(reader, tuple(prunable(layers.model)))
        pattern = _pattern(reader, names)
        formats = {name: format_for(pattern, reader.values(name)) for name in names}
        check_packable(reader, formats)
        recipe = {
            "model": str(folder), "method": "pack", "pattern": str(pattern),
            "options": {"legacy": reader.legacy.layout, **rounded},
        }  # fmt: skip
        packing = Packing(layers, recipe, keeps_values=False)
        pieces = _pieces(packing, reader, formats, progress("converting", len(names)))
        return write_packed(packing, pieces, output, overwrite) | rounded


def packable(reader: LegacyReader, linears: tuple[str, ...]) -> list[str]:
    """List the linears that are stored sparse and have columns that our formats can hold.

    Args:
        reader: of the folder.
        linears: of the decoder layers, by full name.

    Raises:
        InputError: there are none.
    """
    if reader.legacy.activations:
        logger.warning("%s: only weights are taken; activations stay floating.", reader.folder)
    names = []
    for name in linears:
        in_parts = reader.packed or reader.legacy.layout != "dense"
        if in_parts and f"{name}.weight" not in reader.packed:
            continue
        columns = reader.headers[f"{name}.weight"][0][1]
        if columns % 8:
            logger.warning("%s: %d columns are no multiple of 8: stored dense.", name, columns)
            continue
        names.append(name)
    if not names:
        raise InputError(f"{reader.folder}: no linear of a decoder layer can be stored packed.")
    return names


def _pattern(reader: LegacyReader, names: list[str]) -> Pattern:
    """Take 2:4 where the file says so, else the tightest pattern that all masks follow."""
    if reader.legacy.layout in (TWO_OF_FOUR, MARLIN):
        return NM(2, 4)
    found = find_pattern((name, reader.mask(name)) for name in names)
    if reader.legacy.layout == "dense" and found.sparsity < MIN_SPARSITY:
        way_out = "its tensors are plain floats: remove `quantization_config` from config.json and "
        way_out += "use it as a dense model."
        if reader.scalings:
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
    for name, fmt in formats.items():
        weight = reader.weight(name)
        tensors, rows = packing.pack(name, weight, fmt)
        parts = {part: tensors[f"{name}.{part}"] for part in fmt.parts}
        fmt.validate(name, parts, (weight.mask.shape[0], weight.mask.shape[1]))
        unpacked = reader.unpacked(name) + 0.0  # packing writes −0.0 as +0.0
        if not same_bits(fmt.expand(parts, unpacked.dtype), unpacked):
            raise CheckpointError(f"{name}: the packed weight is not the one in the file.")
        yield tensors, rows
        reader.release()
        step()
