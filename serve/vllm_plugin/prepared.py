"""What a worker holds of a model that others made: the facts that /metrics shows of it.

Folders of ours say how they are stored. Others are packed while they are loaded, so that each
worker counts what it has prepared, and the server adds it up. Imports nothing of vLLM.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gblm.checkpoint.writer import sha256
from gblm.formats import Format, Parts, Shape

HASHED_AT_ONCE = 4
WAY, COUNTS = ("part", "format", "pattern", "values"), ("linears", "bytes", "bytes_dense")


class Stored(NamedTuple):
    """How one linear's weight is packed on this rank.

    Attributes:
        format: name of the format.
        pattern: of the format.
        values: the dtype of floats, or the value type.
        num_bytes: of all parts.
        dense_bytes: of the weight in the dtype of the activations.
    """

    format: str
    pattern: str
    values: str
    num_bytes: int
    dense_bytes: int

    @classmethod
    def of(cls, fmt: Format, parts: Parts, shape: Shape, dtype: torch.dtype) -> Stored:
        """Of the parts of a weight [out, in] that is served in `dtype`."""
        name = str(dtype).removeprefix("torch.")
        return cls(
            fmt.name, str(fmt.pattern), name if fmt.values.is_float else str(fmt.values),
            sum(tensor.nbytes for tensor in parts.values()), shape[0] * shape[1] * dtype.itemsize,
        )  # fmt: skip


def grouped(stored: Iterable[Stored]) -> list[dict[str, Any]]:
    """Rows of linears that are packed alike, with the keys WAY and COUNTS."""
    rows: dict[tuple[str, ...], dict[str, Any]] = {}
    for one in stored:
        way = ("linears", one.format, one.pattern, one.values)
        row = rows.setdefault(way, dict(zip(WAY, way, strict=True)) | dict.fromkeys(COUNTS, 0))
        row["linears"] += 1
        row["bytes"] += one.num_bytes
        row["bytes_dense"] += one.dense_bytes
    return list(rows.values())


def added_up(reports: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of all workers of a model.

    Ranks of one pipeline stage share its linears, and each holds bytes of its own.

    Args:
        reports: of workers, with "stage" and, as "prepared", what `grouped` gives.
    """
    total: dict[tuple[str, ...], dict[str, Any]] = {}
    linears: dict[tuple[str, ...], dict[int, int]] = {}
    for one in reports:
        for row in one.get("prepared", ()):
            way = tuple(str(row[key]) for key in WAY)
            entry = total.setdefault(way, row | dict.fromkeys(COUNTS, 0))
            entry["bytes"] += row["bytes"]
            entry["bytes_dense"] += row["bytes_dense"]
            stages = linears.setdefault(way, {})
            stages[one["stage"]] = max(stages.get(one["stage"], 0), row["linears"])
    for way, entry in total.items():
        entry["linears"] = sum(linears[way].values())
    return list(total.values())


def weights_sha256(folder: Path) -> str:
    """The hash of a folder's weights: what `sha256sum *.safetensors | sha256sum` says in it."""
    files = sorted(folder.glob("*.safetensors"))
    with ThreadPoolExecutor(HASHED_AT_ONCE) as pool:
        lines = [f"{digest}  {file.name}\n" for file, digest in zip(files, pool.map(sha256, files),
                                                                    strict=True)]  # fmt: skip
    return hashlib.sha256("".join(lines).encode()).hexdigest()
