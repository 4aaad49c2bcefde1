"""The files and folders that a report is made of: read, told apart, refused."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gblm.errors import InputError
from gblm.folder import read_json_object
from gblm.record import Record
from gblm.report.folders import PackedFacts, read_folder
from gblm.report.tables import Table, named

ONNX_REPORT = "onnx_report.json"


@dataclass
class Sources:
    """Everything that a report shows.

    Attributes:
        records: each with the name of its file.
        folders: packed ones.
        exports: a table of each folder that `gblm export onnx` wrote.
    """

    records: list[tuple[str, Record]] = field(default_factory=list)
    folders: list[PackedFacts] = field(default_factory=list)
    exports: list[Table] = field(default_factory=list)

    @property
    def invalid(self) -> list[str]:
        """Why figures of records do not stand."""
        return [
            f"{file}: {reason}"
            for file, record in self.records
            if not record.verdict.valid
            for reason in record.verdict.reasons or ("no reason is given",)
        ]

    @property
    def notes(self) -> list[str]:
        """What to mind although figures stand."""
        return [f"{file}: {note}" for file, record in self.records for note in record.verdict.notes]

    @property
    def commands(self) -> list[str]:
        """What repeats it, each once."""
        found = [record.command for _, record in self.records]
        found += [
            f"gblm prune MODEL --recipe {folder.name}/recipe.json --output {folder.name}"
            for folder in self.folders
            if folder.method
        ]
        return list(dict.fromkeys(found))

    def environments(self) -> Iterator[Table]:
        """Tell where each record was measured; those of one environment stand together."""
        alike: dict[tuple[tuple[str, str], ...], list[str]] = {}
        for file, record in self.records:
            # The time differs in each and says nothing of the machine.
            known = [(key, _said(value)) for key, value in record.provenance.items()
                     if key != "created"]  # fmt: skip
            alike.setdefault(tuple(known), []).append(file)
        for rows, files in alike.items():
            yield Table(", ".join(files), "", ("", ""), rows)


def read_sources(paths: Sequence[Path], layers: Sequence[int]) -> Sources:
    """Read records, packed and exported folders.

    Args:
        paths: JSON files and folders.
        layers: decoder layers whose masks are shown.

    Raises:
        InputError: one is neither, is damaged, or was written by another version.
    """
    found = Sources()
    for path in paths:
        if (path / ONNX_REPORT).is_file():
            found.exports.append(_export(path))
        elif path.is_dir():
            folder = read_folder(path, layers)
            if any(folder.name == other.name for other in found.folders):
                raise InputError(
                    f"{path}: two folders are called {folder.name!r}; rename one of them, as names "
                    "join quality and speed."
                )
            found.folders.append(folder)
        else:
            found.records.append((path.name, Record.read(path)))
    return found


def _export(folder: Path) -> Table:
    """What the report of an export says of it, and whether it was validated."""
    report = read_json_object(folder / ONNX_REPORT)
    checked = report.get("validation")
    outcome = "not validated"
    if isinstance(checked, dict):
        outcome = "passed" if checked.get("passed") is True else "FAILED"
    known = ("source", "target", "precision", "sparse", "bytes_total")
    rows = [(key.replace("_", " "), _said(report[key])) for key in known if key in report]
    return named(folder.resolve().name, (*rows, ("validation", outcome)))


def _said(value: object) -> str:
    """A value of JSON in words."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_said(inner)}" for key, inner in value.items())
    return str(value)
