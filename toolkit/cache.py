"""gblm's cache folder: things that can be made again, in files that are whole or not there."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gblm.errors import MachineError

logger = logging.getLogger(__name__)

VARIABLE = "GBLM_CACHE"
# Files of the folders that gblm makes which are alike in no two of them.
UNIQUE = ("MANIFEST.json", "onnx_report.json")


def cache_folder() -> Path:
    """Name the cache: $GBLM_CACHE, else gblm's folder in the user's cache."""
    if chosen := os.environ.get(VARIABLE):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "gblm"


def keep(path: Path, content: bytes) -> bool:
    """Write a file at once or not at all, and say which; a cache may be read-only or full."""
    part = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
            part = Path(file.name)
            file.write(content)
        part.replace(path)
    except OSError:
        if part is not None:
            part.unlink(missing_ok=True)
        return False
    return True


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Let one process at a time make a folder of the cache; the others wait, and find it made.

    Raises:
        MachineError: the cache cannot be written to.
    """
    lock = folder.parent / f".{folder.name}.lock"
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("w")
    except OSError as error:
        raise MachineError(f"{lock.parent} cannot hold {folder.name}: {error}.") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("waiting for another process that makes %s", folder)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def remember(folder: Path, facts: dict[str, Any]) -> None:
    """Keep facts that only this machine should know of a folder, which others may be given."""
    if (place := _memory(folder)) is not None:
        keep(place, json.dumps(facts).encode())


def recall(folder: Path) -> dict[str, Any]:
    """Give what `remember` kept of a folder, wherever that lies by now; else nothing."""
    place = _memory(folder)
    if place is None or not place.is_file():
        return {}
    found: dict[str, Any] = json.loads(place.read_bytes())
    return found


def _memory(folder: Path) -> Path | None:
    for name in UNIQUE:
        if (folder / name).is_file():
            digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
            return cache_folder() / "made" / f"{digest}.json"
    return None
