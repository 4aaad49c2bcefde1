"""Pack a dense-with-zeros HF folder made by any other pruning tool. Never prunes.

Any dense folder is packed with the pattern `dense`. Integer values are rounded to nearest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gblm.checkpoint.head import output_head
from gblm.checkpoint.pack import Packing, check_packable, check_room, write_packed
from gblm.errors import InputError, PatternError
from gblm.model.folder import ModelFolder
from gblm.model.layers import stream
from gblm.model.linears import prunable
from gblm.model.reader import Reader
from gblm.progress import Progress, no_progress
from gblm.recipe import SHARD_SIZE, shard_bytes
from gblm.sparse.formats import Format, format_for
from gblm.sparse.patterns import NM, Dense, Pattern, Unstructured, parse
from gblm.sparse.values import parse_values, quantize
from gblm.sparse.weights import SparseWeight

# Tried in this order: the first that every weight follows stores the most.
KNOWN_PATTERNS = (NM(1, 4), NM(2, 8), NM(2, 4), NM(4, 8), NM(8, 16))
MAX_WASTE = 0.1  # share of a weight's places that N:M may fill with zeros
MIN_SPARSITY = 1 / 16  # below this the bitmask of a bf16 weight outweighs what the zeros save


def export_pack(
    source: str | Path | ModelFolder,
    output: Path,
    pattern: str | None = None,
    ignore: tuple[str, ...] = (),
    overwrite: bool = False,
    progress: Progress = no_progress,
    values: str = "float",
    head: str = "float",
    max_shard_size: str = SHARD_SIZE,
) -> dict[str, Any]:
    """Pack the decoder layers' linears of a dense model whose zeros are already there.

    Args:
        source: a dense HF folder or hub id.
        output: the folder to make.
        pattern: what the weights must follow; found out if None. "dense" keeps every position.
        ignore: glob patterns of module names that stay dense.
        overwrite: replace an existing folder.
        progress: for a progress bar.
        values: how they are stored, as `gblm.sparse.values.parse_values` reads it.
        head: how the output head is stored: "float", "int8" or "int4"; see Recipe.
        max_shard_size: of a file of weights, as `gblm.recipe.shard_bytes` reads it.

    Returns:
        The sparsity report.

    Raises:
        PatternError: a weight does not follow `pattern`, for packing never prunes; or its columns
            do not divide into groups.
        InputError: the model has too few zeros for packing to save anything.
    """
    kind = parse_values(values)
    shard_bytes(max_shard_size)
    with stream(ModelFolder.open(source)) as layers:
        reader, packed_head = layers.reader, output_head(layers, head)
        check_room(reader, output, overwrite, packed_head.num_bytes if packed_head else 0)
        linears = prunable(layers.model, ignore=ignore)
        chosen = parse(pattern) if pattern else _worthwhile(reader, linears)
        formats = {
            name: format_for(chosen, kind.resolve(name, linear.in_features))
            for name, linear in linears.items()
        }
        check_packable(reader, formats)
        recipe = {"model": str(source), "method": "pack", "pattern": str(chosen), "options": {}}
        if max_shard_size != SHARD_SIZE:
            recipe["max_shard_size"] = max_shard_size
        if not kind.is_float:
            recipe["values"] = values
        if packed_head is not None:
            recipe["head"] = head
        packing = Packing(layers, recipe, head=packed_head)
        step = progress("packing", len(linears))
        pieces = (
            packing.pack(name, weight, formats[name])
            for name, weight in _weights(formats, reader, step)
        )
        return write_packed(packing, pieces, output, overwrite)


def find_pattern(masks: Iterable[tuple[str, Tensor]]) -> Pattern:
    """Find the tightest N:M pattern that every weight follows, else their mean sparsity.

    Args:
        masks: names and keep masks [out, in] bool of the linears.
    """
    candidates = list(KNOWN_PATTERNS)
    zeros = weights = 0
    for name, mask in masks:
        zeros += mask.numel() - int(mask.count_nonzero())
        weights += mask.numel()
        candidates = [c for c in candidates if _follows(c, name, mask)]
    if candidates and zeros / weights <= candidates[0].sparsity + MAX_WASTE:
        return candidates[0]
    return Unstructured(min(round(zeros / weights, 4), 0.9999))


def _worthwhile(reader: Reader, linears: Iterable[str]) -> Pattern:
    found = find_pattern((name, reader.tensor(f"{name}.weight").bool()) for name in linears)
    if found.sparsity < MIN_SPARSITY:
        raise InputError(
            f"{reader.folder}: only {found.sparsity:.2%} of the weights are zero; packing would "
            "make it larger. Prune it first: `gblm prune`; or keep every weight: --pattern dense."
        )
    return found


def _follows(pattern: NM, name: str, mask: Tensor) -> bool:
    try:
        pattern.check_mask(name, mask)
    except PatternError:
        return False
    return True


def _weights(
    formats: Mapping[str, Format], reader: Reader, step: Callable[[], None]
) -> Iterator[tuple[str, SparseWeight]]:
    for name, fmt in formats.items():
        weight = reader.tensor(f"{name}.weight")
        keeps_zeros = isinstance(fmt.pattern, Dense)
        mask = torch.ones_like(weight, dtype=torch.bool) if keeps_zeros else weight.bool()
        if fmt.values.is_float:
            yield name, SparseWeight(weight, mask)
        else:
            yield name, quantize(weight, mask, fmt.values, name)
        reader.release()
        step()
