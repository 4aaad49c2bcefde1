"""Write a packed folder of ours as compressed-tensors 0.9.4 would have; the inverse of legacy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gblm.checkpoint.packed_folder import PackedReader
from gblm.checkpoint.writer import (
    ShardWriter,
    check_output,
    copy_side_files,
    new_folder,
    write_json,
)
from gblm.errors import CheckpointError, InputError
from gblm.export.legacy_bitmask import TWO_OF_FOUR, BitmaskTensor, pack
from gblm.folder import LEGACY_METHOD
from gblm.formats import format_for
from gblm.patterns import NM
from gblm.progress import Progress, no_progress
from gblm.values import ROW
from gblm.weights import SparseWeight

# The last version of compressed-tensors before it dropped these formats' writers.
WRITTEN_AS = "0.9.4"


def write_legacy(
    source: Path,
    output: Path,
    layout: str,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Write floating values or int8 codes in a bitmask layout of compressed-tensors, exactly.

    Args:
        source: a packed folder of ours.
        output: the folder to make.
        layout: "sparse-24-bitmask" or "sparse-bitmask".
        overwrite: replace an existing folder.
        progress: for a progress bar.

    Returns:
        Sizes and counts.

    Raises:
        InputError: other codes, or a packed output head, which neither layout holds.
        PatternError: a weight keeps more than two of four, and the layout is of 2:4.
    """
    with PackedReader(source) as packed:
        _check_values(packed)
        check_output(output, overwrite, int(1.1 * _num_bytes(packed)) + (16 << 20), source)
        zeros = weights = 0
        with new_folder(output, overwrite) as folder:
            shards, step = ShardWriter(folder), progress("converting", len(packed.linears))
            for name, linear in packed.linears.items():
                parts = packed.parts(name)
                linear.fmt.validate(name, parts, linear.shape)
                weight = _masked(name, linear.fmt.unpack(parts), layout)
                for part, tensor in _checked(name, weight, layout).items():
                    shards.add(f"{name}.{part}", tensor)
                zeros += int(weight.is_zero.sum())
                weights += weight.mask.numel()
                packed.release()
                step()
            for name in packed.dense_names():
                shards.add(name, packed.tensor(name))
            shards.finish()
            copy_side_files(source, folder)
            config = packed.config | {
                "quantization_config": _config(packed, layout, zeros / weights)
            }
            write_json(folder / "config.json", config)
        return {
            "source": str(source),
            "output": str(output),
            "layout": layout,
            "linears": len(packed.linears),
            "bytes": shards.total_bytes,
        }


def _num_bytes(packed: PackedReader) -> int:
    return sum(map(packed.num_bytes, packed)) + sum(
        linear.shape[0] * linear.shape[1] * 4 for linear in packed.linears.values()
    )


def _check_values(packed: PackedReader) -> None:
    for name, linear in packed.linears.items():
        values = linear.fmt.values
        codes = values.kind == "int8" and linear.fmt.name != "dense"
        if not (values.is_float or codes):
            raise InputError(
                f"{name}: {values} values of the format {linear.fmt.name} cannot be written "
                "exactly in a sparse layout of compressed-tensors; sparse floats and int8 can."
            )


def _masked(name: str, weight: SparseWeight, layout: str) -> SparseWeight:
    """The positions that are stored: ours, or for 2:4 exactly two of four."""
    if layout != TWO_OF_FOUR:
        return weight
    rows, columns = weight.mask.shape
    fmt = format_for(NM(2, 4))
    fmt.check_shape(name, (rows, columns))
    groups = weight.mask.reshape(-1, 4).sum(dim=1)
    if bool((groups == 2).all()):
        return weight
    return replace(weight, mask=fmt.stored_mask(name, ~weight.is_zero))


def _checked(name: str, weight: SparseWeight, layout: str) -> dict[str, torch.Tensor]:
    """Packed, and unpacked again by the code that reads such files."""
    parts = pack(weight, layout)
    headers = {part: (tuple(tensor.shape), tensor.dtype) for part, tensor in parts.items()}
    shape = [int(size) for size in parts["shape"].reshape(-1)]
    dense = BitmaskTensor.of(name, layout, headers, shape).dense(parts)[0]
    stored = weight.weight if weight.codes is None else weight.codes
    if not torch.equal(dense.view(torch.uint8), stored.contiguous().view(torch.uint8)):
        raise CheckpointError(f"{name}: unpacking the written weight gives other bits.")
    return parts if weight.scales is None else parts | {"weight_scale": weight.scales}


def _config(packed: PackedReader, layout: str, sparsity: float) -> dict[str, Any]:
    """The quantization_config; it names the matrices that are stored dense."""
    matrices = {name for name in packed.dense_names() if len(packed.headers[name][0]) == 2}
    # A tied head has no tensor, but readers of these files would look for its parts.
    ignore = {"lm_head", *(name.removesuffix(".weight") for name in matrices)}
    codes = _code_groups(packed)
    quantized = {
        "config_groups": codes, "format": "int-quantized", "ignore": sorted(ignore),
        "quantization_status": "compressed",
    }  # fmt: skip
    return {
        "quant_method": LEGACY_METHOD,
        "version": WRITTEN_AS,
        **(quantized if codes else {}),
        "sparsity_config": {
            "format": layout,
            "global_sparsity": round(sparsity, 6),
            "ignore": sorted(ignore),
            "registry_requires_subclass": False,
            "sparsity_structure": "2:4" if layout == TWO_OF_FOUR else "unstructured",
            "targets": ["Linear"],
        },
    }


def _code_groups(packed: PackedReader) -> dict[str, Any]:
    """config_groups of the linears that are stored as codes, by the columns that share a scale."""
    found: dict[int, list[str]] = {}
    for name, linear in packed.linears.items():
        if not linear.fmt.values.is_float:
            found.setdefault(linear.fmt.values.group_size, []).append(name)
    return {
        f"group_{number}": {
            "targets": names,
            "weights": {
                "num_bits": 8, "type": "int", "symmetric": True, "dynamic": False,
                **({"strategy": "channel"} if size == ROW else
                   {"strategy": "group", "group_size": size}),
            },
        }
        for number, (size, names) in enumerate(found.items())
    }  # fmt: skip
