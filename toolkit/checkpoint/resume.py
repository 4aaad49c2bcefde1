"""WorkFolder: the finished decoder layers of a run that is not done yet.

It lies beside the output, as `.NAME.work`. A layer counts as finished once its file is on disk and
a line of journal.jsonl gives the file's sha256. A run is continued only under the same fingerprint.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from gblm.errors import InputError, MachineError
from gblm.files import append_line, read_json, sha256, write_bytes, write_json, write_tensors

logger = logging.getLogger(__name__)
JOURNAL, RUN, COMPLETE, EXACT = "journal.jsonl", "run.json", "complete.json", "exact:"
# The folder of gradient norms, which holds COMPLETE once all layers' are there.
GRADIENTS = "gradients"
# Of `gblm recover`: parameters with their moments, and what the dense model made of the text.
STATE, TEACHER = "state.safetensors", "teacher-*"


@dataclass(frozen=True)
class FinishedLayer:
    """One decoder layer as the journal describes it.

    Attributes:
        path: safetensors with the packed parts of its linears, by full name; and, under `exact:`,
            values as they were before rounding to the checkpoint's dtype.
        rows: the linears' rows of the sparsity report.
    """

    path: Path
    rows: list[dict[str, Any]]

    def packed(self) -> dict[str, Tensor]:
        """Read the packed parts."""
        return {name: t for name, t in load_file(self.path).items() if not name.startswith(EXACT)}

    def exact_values(self) -> dict[str, Tensor]:
        """Read the values before rounding, by the full name of the part."""
        with safe_open(self.path, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(EXACT)]  # noqa: SIM118
            return {name.removeprefix(EXACT): file.get_tensor(name).clone() for name in names}


class WorkFolder:
    """An unfinished run lies here, locked by this process; `open_work` makes it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.finished: list[FinishedLayer] = []

    @property
    def has_gradients(self) -> bool:
        """Tell whether the gradient norms of all layers are there."""
        return (self.path / GRADIENTS / COMPLETE).exists()

    @property
    def has_training(self) -> bool:
        """Tell whether a recovery left a state, or hidden states of the dense model."""
        return (self.path / STATE).exists() or any(self.path.glob(TEACHER))

    @property
    def kept(self) -> str:
        """Say in words what a later run goes on from; nothing if there is nothing."""
        if self.has_training:
            return "the state of training is"
        if not self.finished and not self.has_gradients:
            return ""
        gradients = " and the gradients" if self.has_gradients else ""
        return f"{len(self.finished)} finished decoder layers{gradients} are"

    def mark_complete(self, output: Path) -> None:
        """Note that nothing but publishing is left, and what stands in the output's place now."""
        write_json(self.path / COMPLETE, {"replaces": _identity(output)})

    def add(
        self,
        packed: Mapping[str, Tensor],
        rows: list[dict[str, Any]],
        exact_values: Mapping[str, Tensor],
    ) -> None:
        """Make the next decoder layer durable; see FinishedLayer."""
        index = len(self.finished)
        path = self.path / f"layer-{index:05d}.safetensors"
        exact = {EXACT + name: tensor for name, tensor in exact_values.items()}
        write_tensors(path, {**packed, **exact})
        line = {"layer": index, "file": path.name, "sha256": sha256(path), "rows": rows}
        append_line(self.path / JOURNAL, line)
        self.finished.append(FinishedLayer(path, rows))

    def load(self, fingerprint: dict[str, Any]) -> None:
        """Take up what an earlier process finished, or start.

        Raises:
            InputError: what is there belongs to a different run.
        """
        for stale in (*self.path.glob("scratch-*"), *self.path.glob(".*.partial-*")):
            shutil.rmtree(stale)
        started = (self.path / JOURNAL).exists() or self.has_gradients or self.has_training
        if not started:
            _empty(self.path)
            write_json(self.path / RUN, fingerprint)
            return
        _check_same(read_json(self.path / RUN), fingerprint, self.path)
        intact = list(self._intact())
        kept = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line, _ in intact).encode()
        journal = self.path / JOURNAL
        if journal.exists() and journal.read_bytes() != kept:
            write_bytes(journal, kept)
        self.finished = [layer for _, layer in intact]

    def _intact(self) -> Iterator[tuple[dict[str, Any], FinishedLayer]]:
        """Give the journalled layers from the first one on, up to the first damage."""
        journal = self.path / JOURNAL
        lines = journal.read_bytes().split(b"\n") if journal.exists() else []
        for index, text in enumerate(lines):
            try:
                line = json.loads(text)
                path = self.path / f"layer-{index:05d}.safetensors"
                if line["layer"] != index or line["sha256"] != sha256(path):
                    break
                rows = list(line["rows"])
                load_file(path)
            except (ValueError, KeyError, TypeError, OSError, SafetensorError):
                break  # torn by a crash; this layer and those after it are made again
            yield line, FinishedLayer(path, rows)


def work_path(output: Path) -> Path:
    """Return where the unfinished run of an output lies."""
    output = output.resolve()
    return output.parent / f".{output.name}.work"


def remove_leftovers(output: Path) -> None:
    """Clean up after a run that was cut off when its output was already in place."""
    path = work_path(output)
    if not (path / COMPLETE).exists() or not output.exists():
        return
    if read_json(path / COMPLETE).get("replaces") != _identity(output):
        lock = _lock(path)
        _remove(path)
        lock.close()


def _identity(output: Path) -> int | None:
    return output.stat().st_ino if output.exists() else None


@contextmanager
def open_work(output: Path, fingerprint: dict[str, Any], resume: bool) -> Iterator[WorkFolder]:
    """Lock the work folder of an output and take up what is in it.

    It is removed when the block succeeds, or fails before the first layer is finished.

    Args:
        output: the folder that the run will make.
        fingerprint: JSON facts that must be equal for finished layers to count.
        resume: False throws away what an earlier run left.

    Raises:
        MachineError: another process works on this output.
        InputError: the rest of a different run is there.
    """
    path = work_path(output)
    lock = _lock(path)
    try:
        work = WorkFolder(path)
        if not resume:
            _empty(path)
        work.load(fingerprint)
        if work.finished:
            logger.info("going on after %d finished decoder layers", len(work.finished))
        try:
            yield work
        except BaseException as error:
            if work.kept:
                way = "--no-resume starts anew"
                if not isinstance(error, InputError):  # other input would be another run
                    way = f"the same command goes on from there, {way}"
                logger.warning("%s kept in %s: %s.", work.kept, path, way)
            else:
                _remove(path)
            raise
        _remove(path)
        for replaced in path.parent.glob(f".{output.name}.old-*"):
            shutil.rmtree(replaced, ignore_errors=True)
    finally:
        lock.close()


@contextmanager
def only_one(output: Path) -> Iterator[None]:
    """Refuse a second process for a whole run that opens several work folders for an output.

    Raises:
        MachineError: another process works on this output.
    """
    output = output.resolve()
    path = output.parent / f".{output.name}.lock"
    lock = _lock(path)
    try:
        yield
    finally:
        _remove(path)
        lock.close()


def _lock(path: Path) -> IO[bytes]:
    """Make the folder and lock it; the lock goes with the process, however it ends."""
    while True:
        try:
            path.mkdir(parents=True, exist_ok=True)
            stream = (path / "lock").open("wb")
        except FileNotFoundError:
            continue  # removed by the process that just finished
        except OSError as error:
            raise MachineError(f"{path} cannot be made: {error.strerror}.") from error
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if (path / "lock").stat().st_ino == os.fstat(stream.fileno()).st_ino:
                return stream
        except BlockingIOError as error:
            stream.close()
            raise MachineError(
                f"another process is working on this output ({path} is locked). "
                "Wait for it, or choose another --output."
            ) from error
        except FileNotFoundError:
            pass
        stream.close()


def _remove(path: Path) -> None:
    """Delete the folder, its lock last: whoever gets a new one must not find a half of it."""
    _empty(path)
    shutil.rmtree(path, ignore_errors=True)


def _empty(path: Path) -> None:
    for entry in path.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != "lock":
            entry.unlink()


def _check_same(found: dict[str, Any], wanted: dict[str, Any], path: Path) -> None:
    for key in (*wanted, *found):
        if found.get(key) != wanted.get(key):
            raise InputError(
                f"{path} holds finished layers of another run: {key} was {found.get(key)!r}, now "
                f"it is {wanted.get(key)!r}. Repeat the old command, or pass --no-resume to "
                "start anew."
            )
