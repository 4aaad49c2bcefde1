"""A copy of what a build of the project reads, for tests that build it in another way."""

from __future__ import annotations

import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("toolkit", "export", "serve", "deploy")
FILES = ("setup.py", "pyproject.toml", "README.md", "LICENSE")


def copy_sources(to: Path) -> None:
    """Copy the folders and files of a build, but nothing that was built."""
    for name in FOLDERS:
        shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns("*.so", "__py*"))
    for name in FILES:
        shutil.copy(ROOT / name, to)
