"""What a report is made of: records, and facts and sparsities of packed folders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gblm.checkpoint.inspect import inspect
from gblm.errors import InputError
from gblm.files import read_json
from gblm.model.folder import ModelFolder
from gblm.model.packed_reader import RECIPE_FILE, PackedReader
from gblm.record import Record
from gblm.report.tables import Table, said

# Keys of the groups that `gblm inspect` shows.
GROUPED = ("pattern", "dtype", "linears", "weights", "sparsity", "bits_per_weight", "bytes")


@dataclass(frozen=True)
class Folder:
    """A folder is a packed model; the command makes it again, None if it does not say.

    Sparsities go by part of a decoder layer and its index, such as ("self_attn.q_proj", 0).
    """

    name: str
    table: Table
    command: str | None = None
    sparsity: dict[tuple[str, int], float] = field(default_factory=dict)


@dataclass
class Sources:
    """The sources are all that a report shows; each record has the name of its file."""

    records: list[tuple[str, Record]] = field(default_factory=list)
    folders: list[Folder] = field(default_factory=list)

    @property
    def invalid(self) -> list[str]:
        """Say why figures of records do not stand."""
        return [
            f"{file}: {reason}"
            for file, record in self.records
            if not record.verdict.valid
            for reason in record.verdict.reasons or ("no reason is given",)
        ]

    @property
    def notes(self) -> list[str]:
        """Say what to mind although figures stand."""
        return [f"{file}: {note}" for file, record in self.records for note in record.verdict.notes]

    @property
    def commands(self) -> list[str]:
        """List the commands that repeat it, each once."""
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


def read_sources(paths: Sequence[Path]) -> Sources:
    """Read records and packed folders.

    Raises:
        InputError: one is neither, is damaged, or was written by another version.
    """
    found = Sources()
    for path in paths:
        if not path.is_dir():
            found.records.append((path.name, Record.read(path)))
            continue
        folder = read_folder(path)
        if any(folder.name == other.name for other in found.folders):
            raise InputError(
                f"{path}: two folders are called {folder.name!r}; rename one of them, as names "
                "join quality and speed."
            )
        found.folders.append(folder)
    return found


def read_folder(folder: Path) -> Folder:
    """Read one folder.

    Raises:
        InputError: it is none, or is damaged.
    """
    opened = ModelFolder.open(folder)
    if opened.kind != "packed":
        raise InputError(
            f"{folder}: is no packed folder; give folders that "
            "`gblm prune` or `gblm export pack` wrote, and record files."
        )
    sparsity: dict[tuple[str, int], float] = {}
    with PackedReader(opened) as packed:
        for linear in packed.linears.values():
            place = _place(linear.name)
            if place is None:
                continue
            # The parts are checked first, as a folder may come from anywhere.
            parts = packed.parts(linear.name)
            linear.fmt.validate(linear.name, parts, linear.shape)
            mask = linear.fmt.mask(parts)
            sparsity[place] = 1 - int(mask.sum()) / mask.numel()
    name, recipe = folder.resolve().name, folder / RECIPE_FILE
    made = read_json(recipe) if recipe.exists() else {}
    command = f"gblm prune MODEL --recipe {name}/{RECIPE_FILE} --output {name}" if made else None
    table = _table(name, inspect(opened), made.get("method"))
    return Folder(name, table, command, sparsity)


def _table(name: str, facts: dict[str, Any], method: object) -> Table:
    """Show linears of one pattern and value type in one row."""
    line = f"{facts['architecture']}, {facts['bytes'] / 1e6:.1f} MB, {facts['size_ratio']} of dense"
    return Table(
        name,
        line + (f"; pruned with {method}" if method else ""),
        tuple(key.replace("_", " ") for key in GROUPED),
        tuple(tuple(said(group[key]) for key in GROUPED) for group in facts["groups"]),
    )


def _place(name: str) -> tuple[str, int] | None:
    """Split a name at its decoder layer; None for what lies in no numbered layer."""
    pieces = name.split(".")
    index = next((i for i, piece in enumerate(pieces) if piece.isdigit()), None)
    return None if index is None else (".".join(pieces[index + 1 :]), int(pieces[index]))
