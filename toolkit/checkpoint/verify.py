"""Verify a packed folder: hashes, headers, masks, patterns, exact unpacking."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gblm.checkpoint.write import sha256
from gblm.errors import CheckpointError
from gblm.files import read_json
from gblm.model.folder import ModelFolder, inside
from gblm.model.packed_reader import MANIFEST_FILE, REPORT_FILE, PackedReader
from gblm.model.reader import Reader
from gblm.progress import Progress, no_progress

CHUNK_WEIGHTS = 1 << 22


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
        files = _check_hashes(folder.path)
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


def _check_hashes(folder: Path) -> int:
    listed = read_json(folder / MANIFEST_FILE).get("files")
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(f"{folder / MANIFEST_FILE} lists no files.")
    for name, facts in listed.items():
        path = inside(folder, name)
        if not path.is_file():
            raise CheckpointError(f"{path} is missing, though {MANIFEST_FILE} lists it.")
        if not isinstance(facts, dict) or sha256(path) != facts.get("sha256"):
            raise CheckpointError(f"{path} was changed: its sha256 is not the one written down.")
    for path in folder.iterdir():
        if path.name not in listed and path.name != MANIFEST_FILE:
            raise CheckpointError(f"{path} does not stand in {MANIFEST_FILE}.")
    return len(listed)


def _check_round_trip(
    packed: PackedReader, name: str, parts: dict[str, torch.Tensor], row: dict[str, Any]
) -> None:
    linear, zeros = packed.linears[name], 0
    # Packing a whole head at once would take ten times its size.
    block = getattr(linear.fmt.pattern, "block_rows", 1)
    step = block * max(1, CHUNK_WEIGHTS // (block * linear.shape[1]))
    for start in range(0, linear.shape[0], step):
        own = linear.fmt.rows(parts, start, min(start + step, linear.shape[0]))
        weight = linear.fmt.unpack(own)
        again = linear.fmt.pack(name, weight)
        for part, tensor in own.items():
            if not _same_bits(again[part], tensor):
                raise CheckpointError(
                    f"{name}.{part}: packing the unpacked weight gives other bytes."
                )
        zeros += int(weight.is_zero.sum())
    if (row.get("zeros"), row.get("shape")) != (zeros, list(linear.shape)):
        raise CheckpointError(f"{name}: {REPORT_FILE} does not describe the stored weight.")


def _compare(packed: PackedReader, against: ModelFolder) -> None:
    with Reader(against) as dense:
        wanted = {f"{name}.weight" for name in packed.linears} | {*packed.dense_names()}
        if missing := wanted ^ {*dense}:
            raise CheckpointError(f"{sorted(missing)[0]}: is in one of the two folders only.")
        for name in packed.linears:
            weight = packed.weight(name)
            # + 0.0: packing writes −0.0 as +0.0.
            if not _same_bits(weight, dense.tensor(f"{name}.weight") + 0.0):
                raise CheckpointError(f"{name}: the packed weight is not the one in {against}.")
        for name in packed.dense_names():
            if not _same_bits(packed.tensor(name), dense.tensor(name)):
                raise CheckpointError(f"{name}: is not the tensor in {against}.")


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def _report_rows(path: Path) -> dict[str, dict[str, Any]]:
    """The rows of sparsity_report.json by name of the weight, that of the output head included."""
    report = read_json(path)
    rows = report.get("tensors")
    if isinstance(rows, list) and "head" in report:
        rows = [*rows, report["head"]]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise CheckpointError(f"{path} has no list of tensors.")
    return {str(row.get("name")): row for row in rows}
