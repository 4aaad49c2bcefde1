"""The files and folders that a report is made of: read, told apart, refused.

Record files may come from anywhere: they are bounded in size, and each figure is checked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gblm.errors import DAMAGE, InputError, damage
from gblm.folder import read_json_object
from gblm.report import quality, speed
from gblm.report.facts import Facts, Record
from gblm.report.folders import PackedFacts, read_folder
from gblm.report.gpu import gpu_check
from gblm.report.models import models

MAX_BYTES = 64 * 2**20
ONNX_REPORT = "onnx_report.json"
READERS: dict[str, Callable[[Record], Facts]] = {
    "evaluation": quality.evaluation,
    "perplexity": quality.perplexity,
    "search": quality.search,
    "budget": quality.search,
    "frontier": quality.frontier,
    "onnx export": quality.onnx_export,
    "onnx": speed.onnx,
    "bench serving": speed.serving,
    "bench models": models,
    "bench kernels": speed.kernels,
    "bench watch": speed.watch,
    "gpu check": gpu_check,
}


@dataclass(frozen=True)
class Origin:
    """Where one record comes from.

    Attributes:
        file: its name, without folders.
        kind: of the record.
        provenance: as recorded; empty if it was not.
        command: that made it; None if it was not recorded.
    """

    file: str
    kind: str
    provenance: dict[str, Any]
    command: str | None


@dataclass
class Sources:
    """Everything that a report shows."""

    facts: Facts = field(default_factory=Facts)
    folders: list[PackedFacts] = field(default_factory=list)
    origins: list[Origin] = field(default_factory=list)


def read_sources(paths: Sequence[Path], layers: Sequence[int]) -> Sources:
    """Read records, packed and exported folders.

    Args:
        paths: JSON files and folders.
        layers: decoder layers whose masks are shown.

    Raises:
        InputError: one is neither, is damaged, or is of a kind that no report shows.
    """
    found = Sources()
    for path in paths:
        if (path / ONNX_REPORT).is_file():
            _read_export(found, path)
        elif path.is_dir():
            folder = read_folder(path, layers)
            if any(folder.name == other.name for other in found.folders):
                raise InputError(
                    f"{path}: two folders are called {folder.name!r}; rename one of them, as names "
                    "join quality and speed."
                )
            found.folders.append(folder)
        else:
            for record in read_records(path):
                found.facts.add(parse(path, record))
                found.origins.append(_origin(path, record))
    return found


def _read_export(found: Sources, folder: Path) -> None:
    """An exported folder by its report, in which older versions did not name the kind."""
    path = folder / ONNX_REPORT
    record = {**read_json_object(path), "kind": "onnx export", "folder": folder.resolve().name}
    found.facts.add(parse(path, record))
    origin = _origin(path, record)
    found.origins.append(replace(origin, file=f"{record['folder']}/{ONNX_REPORT}"))


def read_records(path: Path) -> list[Record]:
    """The records of one file: itself, or those that it holds under "runs".

    Raises:
        InputError: it is no record.
    """
    if path.is_file() and path.stat().st_size > MAX_BYTES:
        raise InputError(f"{path} is larger than {MAX_BYTES >> 20} MiB; that is no record.")
    record = read_json_object(path)
    inner = record.get("runs")
    held = [run for run in inner if isinstance(run, dict)] if isinstance(inner, list) else []
    kinds = {run.get("kind") for run in held}
    if held and kinds <= READERS.keys():
        return held
    if not isinstance(record.get("kind"), str) or record["kind"] not in READERS:
        kind = str(record.get("kind"))[:40]
        raise InputError(
            f"{path}: records of kind {kind!r} have no place in a report; it shows "
            f"{', '.join(READERS)}, and packed folders."
        )
    return [record]


def parse(path: Path, record: Record) -> Facts:
    """The facts of one record.

    Raises:
        InputError: something in it is missing or is not what it must be.
    """
    try:
        return READERS[record["kind"]](record)
    except DAMAGE as error:
        raise InputError(
            f"{path}: is not a record of kind {record['kind']!r} as gblm writes it: "
            f"{damage(error)}."
        ) from error


def _origin(path: Path, record: Record) -> Origin:
    provenance, command = record.get("provenance"), record.get("command")
    return Origin(
        path.name,
        record["kind"],
        provenance if isinstance(provenance, dict) else {},
        command if isinstance(command, str) else None,
    )
