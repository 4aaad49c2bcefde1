"""What a model folder holds, and whether a packed one is intact.

To describe a folder its headers are read, and a dense one's zeros; to verify it, everything is.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from gblm.errors import CheckpointError
from gblm.files import read_json, sha256
from gblm.model.folder import ModelFolder, inside
from gblm.model.loading import rename_as_in_memory
from gblm.model.packed_reader import MANIFEST_FILE, REPORT_FILE, PackedLinear, PackedReader
from gblm.model.reader import Reader
from gblm.progress import Progress, no_progress
from gblm.sparse.passes import row_blocks
from gblm.sparse.weights import same_bits

COUNTS = ("linears", "weights", "kept", "bytes", "bytes_dense")


def inspect(folder: ModelFolder) -> dict[str, Any]:
    """Describe a packed or dense model folder.

    Packed: groups of linears with pattern, bits per weight including mask, codes and scales; the
    output head, if it is packed; size against what `gblm export dense` writes. Dense: sizes, and
    the share of zeros in the matrices of numbered layers.

    Raises:
        CheckpointError: the folder is not readable.
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


def sizes(folder: ModelFolder) -> dict[str, Any]:
    """Measure a folder of any kind, so that two can be compared.

    Returns:
        "bytes" of the weights and "values"; where gblm reads them, "sparsity" of the pruned
        linears, and of packed ones "bits_per_weight".
    """
    if folder.kind in ("legacy", "quantised"):
        files = (file.stat().st_size for file in folder.path.glob("*.safetensors"))
        return {"bytes": sum(files), "values": folder.quant_method}
    facts = inspect(folder)
    if facts["kind"] == "dense":
        return {"bytes": facts["bytes"], "sparsity": facts["sparsity"], "values": "dense"}
    groups = facts["groups"]
    weights = sum(group["weights"] for group in groups)
    return {
        "bytes": facts["bytes"],
        "sparsity": round(1 - sum(group["kept"] for group in groups) / weights, 6),
        "values": ", ".join(f"{group['pattern']} {group['dtype']}" for group in groups),
        "bits_per_weight": round(8 * sum(group["bytes"] for group in groups) / weights, 4),
    }


def verify(
    folder: ModelFolder, against: ModelFolder | None = None, progress: Progress = no_progress
) -> dict[str, Any]:
    """Re-open a packed folder and check everything that can be checked.

    Args:
        folder: a packed model folder.
        against: a dense model folder whose tensors must equal the unpacked ones, zeros included.
        progress: for a progress bar.

    Returns:
        Counts of what was checked.

    Raises:
        CheckpointError: the first thing that is wrong.
        PatternError: a weight breaks its pattern.
    """
    with PackedReader(folder) as packed:
        files = _check_hashes(folder)
        rows = _report_rows(folder.path / REPORT_FILE)
        if missing := rows.keys() - packed.linears.keys():
            raise CheckpointError(f"{sorted(missing)[0]}: reported, but not stored.")
        step = progress("verifying", len(packed.linears))
        for name, linear in packed.linears.items():
            parts = packed.parts(name)
            linear.fmt.validate(name, parts, linear.shape)
            _check_round_trip(packed, name, parts, rows.get(name, {}))
            step()
        if against is not None:
            _compare(packed, against)
        return {
            "folder": str(folder),
            "files": files,
            "linears": len(packed.linears),
            "dense_tensors": len(packed.dense_names()),
            "compared_with": None if against is None else str(against),
            "ok": True,
        }


def _packed(packed: PackedReader) -> dict[str, Any]:
    groups: dict[str, dict[str, Any]] = {}
    head: dict[str, Any] | None = None
    for linear in packed.linears.values():
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
    """Tell whether a tensor or module is part of a numbered layer; the output head is not."""
    return any(piece.isdigit() for piece in name.split("."))


def _kept(packed: PackedReader, linear: PackedLinear) -> int:
    """Count the kept positions; bytes of 4-bit codes do not tell, because rows are padded."""
    if linear.fmt.values.bits >= 8:
        return math.prod(linear.headers["values"][0])
    if "row_offsets" in linear.fmt.parts:
        return int(packed.tensor(f"{linear.name}.row_offsets")[-1])
    return round(math.prod(linear.shape) * (1 - linear.fmt.pattern.sparsity))


def _dense(dense: Reader) -> dict[str, Any]:
    zeros = weights = 0
    for name, (shape, dtype) in dense.headers.items():
        if len(shape) == 2 and dtype.is_floating_point and _in_a_layer(name):
            zeros += math.prod(shape) - int(dense.tensor(name).count_nonzero())
            weights += math.prod(shape)
    return {
        "kind": "dense",
        "bytes": sum(map(dense.num_bytes, dense)),
        "layer_weights": weights,
        "sparsity": round(zeros / weights, 6) if weights else 0.0,
    }


def _check_hashes(folder: ModelFolder) -> int:
    manifest = folder.path / MANIFEST_FILE
    listed = read_json(manifest).get("files")
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(f"{manifest} lists no files.")
    for name, facts in listed.items():
        within, _, file = name.rpartition("/")
        path = inside(folder.path, file, within)
        if not path.is_file():
            raise CheckpointError(f"{path} is missing, though {MANIFEST_FILE} lists it.")
        if not isinstance(facts, dict) or sha256(path) != facts.get("sha256"):
            raise CheckpointError(f"{path} was changed: its sha256 is not the one written down.")
    for path in folder.path.rglob("*"):
        name = str(path.relative_to(folder.path))
        if not path.is_dir() and name not in listed and name != MANIFEST_FILE:
            raise CheckpointError(f"{path} does not stand in {MANIFEST_FILE}.")
    return len(listed)


def _check_round_trip(
    packed: PackedReader, name: str, parts: dict[str, torch.Tensor], row: dict[str, Any]
) -> None:
    linear, zeros = packed.linears[name], 0
    for rows in row_blocks(linear.shape):
        own = linear.fmt.rows(parts, rows.start, rows.stop)
        weight = linear.fmt.unpack(own)
        again = linear.fmt.pack(name, weight)
        for part, tensor in own.items():
            if not same_bits(again[part], tensor):
                raise CheckpointError(
                    f"{name}.{part}: packing the unpacked weight gives other bytes."
                )
        zeros += weight.zeros
    if (row.get("zeros"), row.get("shape")) != (zeros, list(linear.shape)):
        raise CheckpointError(f"{name}: {REPORT_FILE} does not describe the stored weight.")


def _compare(packed: PackedReader, against: ModelFolder) -> None:
    with Reader(against) as dense:
        rename_as_in_memory(packed)
        rename_as_in_memory(dense)
        linears = {f"{name}.weight": name for name in packed.linears} | packed.tied
        if missing := {*linears, *packed.dense_names()} ^ {*dense}:
            raise CheckpointError(f"{sorted(missing)[0]}: is in one of the two folders only.")
        for stored, name in linears.items():
            weight = packed.weight(name)
            # + 0.0: packing writes −0.0 as +0.0.
            if not same_bits(weight, dense.tensor(stored) + 0.0):
                raise CheckpointError(f"{name}: the packed weight is not the one in {against}.")
        for name in packed.dense_names():
            if not same_bits(packed.tensor(name), dense.tensor(name)):
                raise CheckpointError(f"{name}: is not the tensor in {against}.")


def _report_rows(path: Path) -> dict[str, dict[str, Any]]:
    """Read the rows of sparsity_report.json by name of the weight, the output head's included."""
    report = read_json(path)
    rows = report.get("tensors")
    if isinstance(rows, list) and "head" in report:
        rows = [*rows, report["head"]]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise CheckpointError(f"{path} has no list of tensors.")
    return {str(row.get("name")): row for row in rows}
