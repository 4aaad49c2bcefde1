"""Writing a model folder: safetensors shards, side files, and publication by one rename.

A killed or failed run leaves nothing under the final name.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from gblm.errors import InputError, MachineError
from gblm.files import flush, flush_folder, sha256, write_json
from gblm.model.folder import TEMPLATES, inside
from gblm.model.reader import INDEX, SINGLE

# Facts of the source folder that go along unchanged; weights, cards and records do not.
SIDE_FILES = ("*.json", "*.model", "*.txt", "*.jinja", "LICENSE*")
NOT_COPIED = {
    "config.json",
    "MANIFEST.json",
    "recipe.json",
    "sparsity_report.json",
    "quantize_config.json",
    "quantization_config.json",
}


def check_output(output: Path, overwrite: bool, need_bytes: int = 0, *sources: Path) -> None:
    """Fail before any work: the name must be free, the parent writable, the disk large enough.

    Nothing is made.

    Raises:
        InputError: the output exists and `overwrite` is not set, or it may not be replaced: it
            is no model folder, or holds one of `sources` or the current folder.
        MachineError: the disk has less than `need_bytes` free, or the parent is not writable or
            cannot be made.
    """
    if output.exists() and not overwrite:
        raise InputError(f"output {output} exists; choose another name or pass --overwrite.")
    if output.exists():
        _check_replaceable(output, sources)
    parent = next(folder for folder in output.resolve().parents if folder.exists())
    if not parent.is_dir():
        raise MachineError(f"folder {output.parent} cannot be made: {parent} is a file.")
    if not os.access(parent, os.W_OK):
        raise MachineError(f"folder {parent} is not writable.")
    free = shutil.disk_usage(parent).free
    if free < need_bytes:
        raise MachineError(
            f"{parent} has {free / 1e9:.2f} GB free; up to {need_bytes / 1e9:.2f} GB are needed."
        )


@contextmanager
def new_folder(output: Path, overwrite: bool = False, within: Path | None = None) -> Iterator[Path]:
    """Give a temporary folder; rename it to `output` when the block succeeds.

    Args:
        output: the folder to make.
        overwrite: replace an existing folder.
        within: where the temporary folder lies, on the same disk; beside `output` if None.

    Raises:
        InputError: the output exists and `overwrite` is not set.
        MachineError: the disk is full or refuses a write.
    """
    check_output(output, overwrite)
    output = output.resolve()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MachineError(f"folder {output.parent} cannot be made: {error}") from error
    work = Path(tempfile.mkdtemp(prefix=f".{output.name}.partial-", dir=within or output.parent))
    try:
        yield work
        _open_modes(work)
        flush_folder(work)
        _publish(work, output, overwrite)
        flush(output.parent)
    except (SafetensorError, OSError) as error:
        raise MachineError(f"writing {output} failed: {error}.") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


class ShardWriter:
    """The writer collects tensors and writes them as shards of at most `shard_bytes`."""

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self.folder = folder
        self.shard_bytes = shard_bytes
        self.total_bytes = 0
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """Take one tensor; it is on disk at the latest after `finish`."""
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self.shard_bytes:
            self._write_shard()
        self._pending[name] = tensor.cpu().contiguous()
        self._pending_bytes += size
        self.total_bytes += size

    def finish(self) -> None:
        """Write the rest, give the shards their final names, write the index."""
        self._write_shard()
        count = len(self._shards)
        if count == 1:
            self._temporary(0).rename(self.folder / SINGLE)
            return
        weight_map = {}
        for number, names in enumerate(self._shards):
            file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            self._temporary(number).rename(self.folder / file)
            weight_map.update(dict.fromkeys(names, file))
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
        write_json(self.folder / INDEX, index)

    def _write_shard(self) -> None:
        if self._pending:
            save_file(self._pending, self._temporary(len(self._shards)), metadata={"format": "pt"})
            self._shards.append(list(self._pending))
            self._pending, self._pending_bytes = {}, 0

    def _temporary(self, number: int) -> Path:
        return self.folder / f"shard-{number}.tmp"


def side_files(source: Path) -> dict[str, Path]:
    """Find what goes along unchanged: tokenizer, templates, generation settings, licence.

    Returns:
        By its name within the folder, where a file lies.

    Raises:
        CheckpointError: a link leads out of the folder.
    """
    found: dict[str, Path] = {}
    for within in ("", TEMPLATES):
        for pattern in SIDE_FILES:
            for file in sorted((source / within).glob(pattern)):
                weights = ".safetensors" in file.name  # an index of weights that stay behind
                if file.is_file() and not weights and file.name not in NOT_COPIED:
                    found[str(Path(within, file.name))] = inside(source, file.name, within)
    return found


def copy_side_files(source: Path, folder: Path) -> None:
    """Copy the `side_files` of a model folder into another."""
    for name, file in side_files(source).items():
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(file, folder / name)


def file_hashes(folder: Path) -> dict[str, dict[str, Any]]:
    """Return sha256 and size in bytes of every file in a folder, by its name within it."""
    return {
        str(file.relative_to(folder)): {"sha256": sha256(file), "size": file.stat().st_size}
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def folder_bytes(folder: Path) -> int:
    """Return the size of all files below a folder; 0 if there is none."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _check_replaceable(output: Path, sources: Iterable[Path]) -> None:
    """Refuse to delete the input, the current folder, or a folder of something else."""
    if not output.is_dir():
        raise InputError(f"output {output} is a file, not a folder.")
    for kept in (Path.cwd(), *sources):
        if kept.resolve().is_relative_to(output.resolve()):
            raise InputError(f"output {output} cannot be replaced: it holds {kept}.")
    if any(output.iterdir()) and not (output / "config.json").exists():
        raise InputError(f"output {output} is no model folder and is not replaced; remove it.")


def _publish(work: Path, output: Path, overwrite: bool) -> None:
    """Rename into place; an older folder is moved aside first and removed last."""
    if not output.exists():
        work.rename(output)
        return
    check_output(output, overwrite)
    aside = Path(tempfile.mkdtemp(prefix=f".{output.name}.old-", dir=output.parent))
    output.rename(aside / "old")
    try:
        work.rename(output)
    except BaseException:
        (aside / "old").rename(output)
        aside.rmdir()
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _open_modes(folder: Path) -> None:
    """Let others read: mkdtemp and safetensors write for the owner, a server is often another."""
    # What a new folder gets tells the umask. os.umask can only be read by changing it, which the
    # files of other threads would feel.
    probe = folder / "probe"
    probe.mkdir()
    mode = probe.stat().st_mode & 0o777
    probe.rmdir()
    folder.chmod(mode)
    for path in folder.rglob("*"):
        path.chmod(mode if path.is_dir() else mode & 0o666)
