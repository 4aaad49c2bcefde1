"""Files: JSON that is read with care, and writes that are there completely or not at all.

A file written here is also whole after a power cut.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from gblm.errors import InputError, MachineError

if TYPE_CHECKING:
    from torch import Tensor


def read_json(path: Path) -> dict[str, Any]:
    """Read one JSON object from a file.

    Raises:
        InputError: the file is missing, unreadable, or holds something else, or a key twice.
    """
    if path.exists() and not path.is_file():
        raise InputError(f"{path} cannot be read as JSON: it is no ordinary file.")
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} must hold one JSON object.")
    return value


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file under a temporary name, force it to disk, rename it.

    Raises:
        MachineError: the disk is full or refuses the write.
    """
    plain = {name: tensor.contiguous() for name, tensor in tensors.items()}
    _publish(path, lambda temporary: _save(plain, temporary, metadata))


def write_scratch(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file that need not survive anything.

    Raises:
        MachineError: the disk is full or refuses the write.
    """
    try:
        _save(dict(tensors), path)
    except (SafetensorError, OSError) as error:
        raise MachineError(f"{path} cannot be written: {error}") from error


def write_json(path: Path, value: Any) -> None:
    """Write one JSON value, readable and with a final newline, in the same way.

    Raises:
        MachineError: the disk is full or refuses the write.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write any content in the same way.

    Raises:
        MachineError: the disk is full or refuses the write.
    """
    _publish(path, lambda temporary: temporary.write_bytes(content))


def append_line(path: Path, value: Any) -> None:
    """Add one JSON line and force it to disk; a reader must expect a torn last line.

    Raises:
        MachineError: the disk is full or refuses the write.
    """
    try:
        with path.open("ab") as stream:
            stream.write(json.dumps(value, ensure_ascii=False).encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())
        flush(path.parent)
    except OSError as error:
        raise MachineError(f"writing {path} failed: {error}.") from error


def sha256(path: Path) -> str:
    """Hash a file's content; returns hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Force a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_folder(folder: Path) -> None:
    """Force a folder's files to disk, so that a rename never publishes an empty one."""
    for path in (*folder.rglob("*"), folder):
        flush(path)


def _save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    # Every command reads JSON; torch, which takes a second to import, writes tensors only.
    from safetensors.torch import save_file

    save_file(tensors, path, metadata=metadata)


def _publish(path: Path, write: Callable[[Path], Any]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        flush(temporary)
        temporary.replace(path)
        flush(path.parent)
    except (SafetensorError, OSError) as error:
        temporary.unlink(missing_ok=True)
        raise MachineError(f"writing {path} failed: {error}.") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a key that stands twice: one reader may take its first value, another its last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [key for key, _ in pairs]
        twice = next(key for key in names if names.count(key) > 1)
        raise ValueError(f"the key {twice[:80]!r} stands there twice")
    return found
