"""The files and folders that a report is made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gblm.errors import InputError
from gblm.record import Record
from gblm.report.folders import Folder, read_folder
from gblm.report.tables import Table, said


@dataclass
class Sources:
    """Everything that a report shows; each record with the name of its file."""

    records: list[tuple[str, Record]] = field(default_factory=list)
    folders: list[Folder] = field(default_factory=list)

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
        found += [folder.command for folder in self.folders if folder.command]
        return list(dict.fromkeys(found))

    def environments(self) -> Iterator[Table]:
        """Tell where each record was measured; those of one environment stand together."""
        alike: dict[tuple[tuple[str, str], ...], list[str]] = {}
        for file, record in self.records:
            # The time differs in each and says nothing of the machine.
            known = {key: said(v) for key, v in record.provenance.items() if key != "created"}
            alike.setdefault(tuple(known.items()), []).append(file)
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
        if not path.is_dir():
            found.records.append((path.name, Record.read(path)))
            continue
        folder = read_folder(path, layers)
        if any(folder.name == other.name for other in found.folders):
            raise InputError(
                f"{path}: two folders are called {folder.name!r}; rename one of them, as names "
                "join quality and speed."
            )
        found.folders.append(folder)
    return found
