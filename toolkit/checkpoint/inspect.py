"""Describe a model folder from its headers: what is packed, in how many bits, against dense.

Of data it reads the zeros of dense folders and the masks of patterns with a rule of their own.
"""

from __future__ import annotations

import math
from typing import Any

from gblm.errors import CheckpointError
from gblm.model.folder import ModelFolder
from gblm.model.packed_reader import PackedLinear, PackedReader
from gblm.model.reader import Reader

COUNTS = ("linears", "weights", "kept", "bytes", "bytes_dense")


def inspect(folder: ModelFolder) -> dict[str, Any]:
    """Facts of a packed or dense model folder.

    Packed: groups of linears with pattern, bits per weight including mask, codes and scales; the
    output head, if it is packed; size against what `gblm export dense` writes. Dense: sizes, and
    the share of zeros in the matrices of numbered layers.

    Raises:
        CheckpointError: the folder is not readable, or a mask of 8:16 breaks its rule.
    """
    folder.check_current()
    if folder.kind == "packed":
        with PackedReader(folder) as packed:
            facts = _packed(packed)
    elif folder.kind == "dense":
        with Reader(folder) as dense:
            facts = _dense(dense)
    else:
        raise CheckpointError(
            f"{folder}: weights are stored as {folder.quant_method!r}, which gblm cannot read."
        )
    return {"folder": str(folder), "architecture": folder.config.get("model_type"), **facts}


def _packed(packed: PackedReader) -> dict[str, Any]:
    groups: dict[str, dict[str, Any]] = {}
    head: dict[str, Any] | None = None
    for linear in packed.linears.values():
        _check_rule(packed, linear)
        facts = _linear(packed, linear)
        if head is None and not _in_a_layer(linear.name):
            head = _with_shares({"name": linear.name, **facts})
            continue
        group = groups.setdefault(
            f"{linear.fmt.spec} {facts['dtype']}", facts | dict.fromkeys(COUNTS, 0)
        )
        for key in COUNTS:
            group[key] += facts[key]
    found = [_with_shares(group) for group in groups.values()]
    rest = sum(map(packed.num_bytes, packed.dense_names()))
    every = [*found, *([head] if head else [])]
    total = rest + sum(group["bytes"] for group in every)
    dense = rest + sum(group["bytes_dense"] for group in every)
    return {
        "kind": "packed",
        "groups": found,
        **({"head": head} if head else {}),
        "bytes_dense_tensors": rest,
        "bytes": total,
        "bytes_if_dense": dense,
        "size_ratio": round(total / dense, 4),
    }


def _check_rule(packed: PackedReader, linear: PackedLinear) -> None:
    """What is called 8:16 here should be served as 8:16."""
    if linear.fmt.has_rule:
        bitmask = packed.tensor(f"{linear.name}.bitmask")
        linear.fmt.check_rule(linear.name, {"bitmask": bitmask})
        packed.release()


def _linear(packed: PackedReader, linear: PackedLinear) -> dict[str, Any]:
    floats, value_dtype = linear.fmt.values.is_float, linear.headers["values"][1]
    count = linear.shape[0] * linear.shape[1]
    return {
        "format": linear.fmt.name,
        "pattern": str(linear.fmt.pattern),
        "dtype": str(value_dtype).removeprefix("torch.") if floats else str(linear.fmt.values),
        "linears": 1,
        "weights": count,
        "kept": _kept(packed, linear),
        "bytes": sum(packed.num_bytes(f"{linear.name}.{part}") for part in linear.headers),
        "bytes_dense": count * (value_dtype if floats else packed.dtype).itemsize,
    }


def _with_shares(group: dict[str, Any]) -> dict[str, Any]:
    return group | {
        "bits_per_weight": round(8 * group["bytes"] / group["weights"], 4),
        "sparsity": round(1 - group["kept"] / group["weights"], 6),
    }


def _in_a_layer(name: str) -> bool:
    """Whether a tensor or module is part of a numbered layer; the output head is not."""
    return any(piece.isdigit() for piece in name.split("."))


def _kept(packed: PackedReader, linear: PackedLinear) -> int:
    """How many positions are kept; bytes of 4-bit codes do not tell, because rows are padded."""
    if not linear.fmt.values.in_nibbles:
        return math.prod(linear.headers["values"][0])
    if "row_offsets" in linear.fmt.parts:
        return int(packed.tensor(f"{linear.name}.row_offsets")[-1])
    return round(math.prod(linear.shape) * (1 - linear.fmt.pattern.sparsity))


def _dense(dense: Reader) -> dict[str, Any]:
    zeros = weights = 0
    for name, (shape, dtype) in dense.headers.items():
        if len(shape) == 2 and dtype.is_floating_point and _in_a_layer(name):
            zeros += int((dense.tensor(name) == 0).sum())
            weights += math.prod(shape)
    return {
        "kind": "dense",
        "bytes": sum(map(dense.num_bytes, dense)),
        "layer_weights": weights,
        "sparsity": round(zeros / weights, 6) if weights else 0.0,
    }
