"""What a report takes from a packed folder: each linear's sparsity, bits and backend; masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gblm.checkpoint.inspect import inspect
from gblm.checkpoint.packed_folder import RECIPE_FILE, PackedLinear, PackedReader
from gblm.errors import InputError
from gblm.folder import quant_method, read_config, read_json_object
from gblm.formats.manifest import QUANT_METHOD
from gblm.kernels import select


@dataclass(frozen=True)
class LinearFacts:
    """One packed linear.

    Attributes:
        layer: index of its decoder layer.
        part: the rest of its name, such as "self_attn.q_proj".
        pattern: of its mask.
        values: the value type.
        sparsity: share of the weights that are not stored.
        bits: per weight, masks and scales counted.
        backend: that serves it on this machine's CPU.
    """

    layer: int
    part: str
    pattern: str
    values: str
    sparsity: float
    bits: float
    backend: str


@dataclass(frozen=True)
class PackedFacts:
    """One packed folder.

    Attributes:
        name: of the folder.
        line: what it is and how large, in one sentence.
        method: that pruned it; None if the folder does not say.
        linears: in the order of the decoder layers.
        masks: by "layer.part", [out, in] bool, for the layers asked for.
    """

    name: str
    line: str
    method: str | None
    linears: list[LinearFacts]
    masks: dict[str, Tensor]


def read_folder(folder: Path, layers: Sequence[int]) -> PackedFacts:
    """Read one packed folder.

    Args:
        folder: as `gblm prune` or `gblm export pack` writes it.
        layers: decoder layers whose masks are kept.

    Raises:
        InputError: it is none, is damaged, or has no such layer.
    """
    if quant_method(read_config(folder)) != QUANT_METHOD:
        raise InputError(
            f"{folder}: is no packed folder, so there are no masks to show; give folders that "
            "`gblm prune` or `gblm export pack` wrote, and record files."
        )
    linears: list[LinearFacts] = []
    masks: dict[str, Tensor] = {}
    with PackedReader(folder) as packed:
        for linear in packed.linears.values():
            place = _place(linear.name)
            if place is None:
                continue
            mask = _mask(packed, linear)
            linears.append(_linear(packed, linear, place, mask))
            if place[0] in layers:
                masks[f"{place[0]}.{place[1]}"] = mask
    _check_layers(folder, layers, linears)
    recipe = folder / RECIPE_FILE
    method = read_json_object(recipe).get("method") if recipe.exists() else None
    facts = inspect(folder)
    return PackedFacts(
        folder.resolve().name,
        f"{facts['architecture']}, {len(linears)} packed linears, {facts['bytes'] / 1e6:.1f} MB, "
        f"{facts['size_ratio']:.3f} of dense" + (f"; pruned with {method}." if method else "."),
        None if method is None else str(method),
        sorted(linears, key=lambda linear: linear.layer),
        masks,
    )


def _check_layers(folder: Path, layers: Sequence[int], linears: Sequence[LinearFacts]) -> None:
    present = {linear.layer for linear in linears}
    missing = sorted(set(layers) - present)
    if missing or not present:
        choices = f"{min(present)} to {max(present)}" if present else "nothing"
        raise InputError(
            f"{folder}: there is no packed linear in layer {(missing or [0])[0]}; --layer takes "
            f"{choices}."
        )


def _place(name: str) -> tuple[int, str] | None:
    """Decoder layer and the rest of a name; None for what lies in no numbered layer."""
    pieces = name.split(".")
    index = next((i for i, piece in enumerate(pieces) if piece.isdigit()), None)
    return None if index is None else (int(pieces[index]), ".".join(pieces[index + 1 :]))


def _linear(
    packed: PackedReader, linear: PackedLinear, place: tuple[int, str], mask: Tensor
) -> LinearFacts:
    size = sum(packed.num_bytes(f"{linear.name}.{part}") for part in linear.headers)
    floats = linear.fmt.values.is_float
    dtype = linear.headers["values"][1] if floats else packed.dtype
    backend, _ = select(linear.fmt, linear.shape, dtype, torch.device("cpu"))
    return LinearFacts(
        *place,
        str(linear.fmt.pattern),
        str(dtype).removeprefix("torch.") if floats else str(linear.fmt.values),
        1 - int(mask.sum()) / mask.numel(),
        8 * size / mask.numel(),
        backend.name,
    )


def _mask(packed: PackedReader, linear: PackedLinear) -> Tensor:
    """[out, in] bool; the parts are checked first, as a folder may come from anywhere."""
    parts = packed.parts(linear.name)
    linear.fmt.validate(linear.name, parts, linear.shape)
    return linear.fmt.mask(parts)
