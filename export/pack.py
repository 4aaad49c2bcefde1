"""Pack a dense-with-zeros HF folder made by any other pruning tool. Never prunes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gblm.checkpoint.packer import Packing, check_packable, check_room, write_packed
from gblm.checkpoint.reader import Reader
from gblm.errors import InputError, PatternError
from gblm.folder import resolve
from gblm.layers import StreamedLayers
from gblm.model import head_dim, prunable, refuse_packed
from gblm.patterns import NM, Pattern, Unstructured, parse
from gblm.progress import Progress, no_progress
from gblm.weights import SparseWeight

# Tried in this order: the first that every weight follows stores the most.
KNOWN_PATTERNS: tuple[NM, ...] = (NM(1, 4), NM(2, 8), NM(2, 4), NM(4, 8))
MIN_SPARSITY = 1 / 16  # below this the bitmask of a bf16 weight outweighs what the zeros save


def export_pack(
    source: str | Path,
    output: Path,
    pattern: str | None = None,
    ignore: tuple[str, ...] = (),
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Pack the decoder layers' linears of a dense model whose zeros are already there.

    Args:
        source: a dense HF folder or hub id.
        output: the folder to make.
        pattern: what the weights must follow; found out if None.
        ignore: glob patterns of module names that stay dense.
        overwrite: replace an existing folder.
        progress: for a progress bar.

    Returns:
        The sparsity report.

    Raises:
        PatternError: a weight does not follow `pattern`; packing never prunes.
        InputError: the model has too few zeros for packing to save anything.
    """
    folder = resolve(source)
    refuse_packed(folder)
    with Reader(folder) as reader:
        check_room(reader, output, overwrite)
        model = StreamedLayers(reader).model
        linears, every = tuple(prunable(model, ignore=ignore)), tuple(prunable(model))
        chosen = parse(pattern) if pattern else find_pattern(reader, linears)
        check_packable(reader, linears, chosen)
        recipe = {"model": str(source), "method": "pack", "pattern": str(chosen), "options": {}}
        packing = Packing(folder, chosen, every, recipe, notes={}, head_dim=head_dim(model))
        step = progress("packing", len(linears))
        pieces = (packing.pack(reader, weight) for weight in _weights(reader, linears, step))
        return write_packed(packing, pieces, output, overwrite)


def find_pattern(reader: Reader, linears: tuple[str, ...]) -> Pattern:
    """The tightest N:M pattern that every weight follows, else their mean sparsity."""
    candidates = list(KNOWN_PATTERNS)
    zeros = weights = 0
    for name in linears:
        mask = reader.tensor(f"{name}.weight") != 0
        zeros += int((~mask).sum())
        weights += mask.numel()
        candidates = [c for c in candidates if _follows(c, name, mask)]
    if candidates:
        return candidates[0]
    sparsity = zeros / weights
    if sparsity < MIN_SPARSITY:
        raise InputError(
            f"{reader.folder}: only {sparsity:.2%} of the weights are zero; packing would make it "
            "larger. Prune it first: `gblm prune`."
        )
    return Unstructured(round(sparsity, 4))


def _follows(pattern: NM, name: str, mask: Any) -> bool:
    try:
        pattern.check_mask(name, mask)
    except PatternError:
        return False
    return True


def _weights(
    reader: Reader, linears: tuple[str, ...], step: Callable[[], None]
) -> Iterator[dict[str, SparseWeight]]:
    for name in linears:
        yield {name: SparseWeight.from_zeros(reader.tensor(f"{name}.weight"))}
        reader.release()
        step()
