"""What benchmarks and the generators of tables share: places, tables, where a record comes from."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

from gblm.record import without_folders

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def read(name: str) -> dict[str, Any]:
    """One record."""
    record: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return record


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def origin(record: dict[str, Any], *packages: str) -> str:
    """Machine, versions and commit of a record."""
    found = record["provenance"]
    commit, _, dirty = found["commit"].partition("-")
    versions = ", ".join(f"{p} {found['packages'][p]}" for p in packages)
    return (
        f"{found['machine']['cpu']}, {found['machine']['cores']} cores; Python {found['python']}, "
        f"{versions}; commit {commit[:12]}{dirty and f'-{dirty}'}."
    )


def made_by(folder: str = "benchmarks") -> str:
    """The call of this script in words, for its record; of absolute paths the last part."""
    words = [f"{folder}/{Path(sys.argv[0]).name}", *map(without_folders, sys.argv[1:])]
    return shlex.join(["python", *words])
