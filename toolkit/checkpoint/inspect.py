"""Describe a model folder from its headers: what is packed, in how many bits, against dense."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from gblm.checkpoint.packed_folder import PackedLinear, PackedReader
from gblm.checkpoint.reader import Reader
from gblm.errors import CheckpointError
from gblm.folder import quant_method, read_config
from gblm.formats.manifest import QUANT_METHOD


def inspect(folder: Path) -> dict[str, Any]:
    """Facts of a packed or dense model folder.

    Packed: groups of linears with pattern, bits per weight including mask, codes and scales, and
    size against dense. Dense: sizes, and the share of zeros in the matrices of numbered layers.

    Raises:
        CheckpointError: the folder is not readable.
    """
    config = read_config(folder)
    method = quant_method(config)
    if method == QUANT_METHOD:
        with PackedReader(folder) as packed:
            facts = _packed(packed)
    elif method is None:
        with Reader(folder) as dense:
            facts = _dense(dense)
    else:
        raise CheckpointError(
            f"{folder}: weights are stored as {method!r}, which gblm cannot read."
        )
    return {"folder": str(folder), "architecture": config.get("model_type"), **facts}


def _packed(packed: PackedReader) -> dict[str, Any]:
    groups: dict[str, dict[str, Any]] = {}
    for linear in packed.linears.values():
        floats, value_dtype = linear.fmt.values.is_float, linear.headers["values"][1]
        dtype = str(value_dtype).removeprefix("torch.") if floats else str(linear.fmt.values)
        group = groups.setdefault(
            f"{linear.fmt.spec} {dtype}",
            {
                "format": linear.fmt.name,
                "pattern": str(linear.fmt.pattern),
                "dtype": dtype,
                "linears": 0,
                "weights": 0,
                "kept": 0,
                "bytes": 0,
                "bytes_dense": 0,
            },
        )
        count = linear.shape[0] * linear.shape[1]
        group["linears"] += 1
        group["weights"] += count
        group["kept"] += _kept(packed, linear)
        group["bytes"] += sum(packed.num_bytes(f"{linear.name}.{p}") for p in linear.headers)
        group["bytes_dense"] += count * (value_dtype if floats else packed.dtype).itemsize
    for group in groups.values():
        group["bits_per_weight"] = round(8 * group["bytes"] / group["weights"], 4)
        group["sparsity"] = round(1 - group["kept"] / group["weights"], 6)
    rest = sum(map(packed.num_bytes, packed.dense_names()))
    total = rest + sum(group["bytes"] for group in groups.values())
    dense = rest + sum(group["bytes_dense"] for group in groups.values())
    return {
        "kind": "packed",
        "groups": list(groups.values()),
        "bytes_dense_tensors": rest,
        "bytes": total,
        "bytes_if_dense": dense,
        "size_ratio": round(total / dense, 4),
    }


def _kept(packed: PackedReader, linear: PackedLinear) -> int:
    """How many positions are kept; bytes of int4 codes do not tell, because rows are padded."""
    if linear.fmt.values.kind != "int4":
        return math.prod(linear.headers["values"][0])
    if "row_offsets" in linear.fmt.parts:
        return int(packed.tensor(f"{linear.name}.row_offsets")[-1])
    return round(math.prod(linear.shape) * (1 - linear.fmt.pattern.sparsity))


def _dense(dense: Reader) -> dict[str, Any]:
    zeros = weights = 0
    for name, (shape, dtype) in dense.headers.items():
        in_a_layer = any(piece.isdigit() for piece in name.split("."))
        if len(shape) == 2 and dtype.is_floating_point and in_a_layer:
            zeros += int((dense.tensor(name) == 0).sum())
            weights += math.prod(shape)
    return {
        "kind": "dense",
        "bytes": sum(map(dense.num_bytes, dense)),
        "layer_weights": weights,
        "sparsity": round(zeros / weights, 6) if weights else 0.0,
    }
