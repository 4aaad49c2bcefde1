"""gblm's cache folder: things that can be made again, in files that are whole or not there."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

VARIABLE = "GBLM_CACHE"


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
