"""What a side of a comparison is: a model in an engine, started, put under loads and stopped.

Below stands what sides of any kind do with the processes that they start.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from gblm.bench.requests import Load, Seen
from gblm.model.folder import ModelFolder

logger = logging.getLogger(__name__)

STOP_SECONDS = 60
TENSOR_FILES = ("*.safetensors", "*.onnx", "*.data")


@dataclass(frozen=True)
class Setup:
    """The setup is what all sides of a comparison share.

    The log takes the output of their processes. Threads and the backend (of packed weights) are
    the engine's choice if None; `options` go to vLLM. In each round all loads are put on every
    side. With `restart` a side starts anew in every round, so that one at a time is in memory;
    with `allow_noise` noisy rounds count, too.
    """

    loads: tuple[Load, ...]
    log: Path
    threads: int | None = None
    backend: str | None = None
    options: tuple[str, ...] = ()
    rounds: int = 7
    restart: bool = False
    allow_noise: bool = False


class Side(ABC):
    """A side is a model in an engine, under the name of its rows.

    The model is an opened folder or, for llama.cpp, a GGUF file.
    """

    def __init__(self, name: str, engine: str, model: ModelFolder | Path, setup: Setup) -> None:
        self.name, self.engine, self.model, self.setup = name, engine, model, setup

    @property
    def path(self) -> Path:
        """Give the path of the model, which a process of its own will open."""
        return self.model.path if isinstance(self.model, ModelFolder) else self.model

    def check(self) -> None:  # noqa: B027 (most sides can have any load)
        """Refuse a load that this side cannot have, before anything is started.

        Raises:
            UsageError: with the way out.
        """

    @abstractmethod
    def start(self) -> None:
        """Load the model.

        Raises:
            MachineError: the engine failed; its last words are quoted.
        """

    @abstractmethod
    def load(self, load: Load) -> Seen:
        """Run a warm-up request, then the load.

        Raises:
            MachineError: the engine or the load generator failed.
        """

    @abstractmethod
    def stop(self) -> None:
        """End the engine's processes."""

    @property
    @abstractmethod
    def process(self) -> psutil.Process:
        """Find the engine's process, or the first of them, while it runs."""

    @property
    def backend(self) -> str | None:
        """Give the backend that is asked for, where the model is packed; dense ones have none."""
        if not isinstance(self.model, ModelFolder) or self.model.kind != "packed":
            return None
        return self.setup.backend

    def facts(self) -> dict[str, Any]:
        """Describe this side for the record."""
        found = {"engine": self.engine, "folder": self.path.name, "bytes": self._bytes()}
        if self.backend is not None:
            found["backend"] = self.backend
        return found

    def _bytes(self) -> int:
        """Add up all files that hold tensors."""
        if self.path.is_file():
            return self.path.stat().st_size
        files = {file for ending in TENSOR_FILES for file in self.path.glob(ending)}
        return sum(file.stat().st_size for file in files)


def child_environment(options: Sequence[str] = ()) -> dict[str, str]:
    """Give the environment of engines, which have these options, and of load generators.

    Imports never come from the current folder. On CPU every vLLM gets a cache of 1 GiB, unless the
    user sets another size: one that follows the free memory would differ between sides.
    """
    # vLLM would take the variable where the option is given, too.
    given = any(word.partition("=")[0] == "--kv-cache-memory-bytes" for word in options)
    cache = {} if given else {"VLLM_CPU_KVCACHE_SPACE": "1"}
    return cache | os.environ | {"PYTHONSAFEPATH": "1"}


def bound_to(threads: int | None) -> dict[str, str]:
    """Give the variables that bind vLLM on CPU to the first cores."""
    if threads is None:
        return {}
    return {
        "OMP_NUM_THREADS": str(threads), "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}",
    }  # fmt: skip


def memory_mb(pid: int) -> float:
    """Find the memory of a process and all below it; pages that they share count once (PSS)."""
    root = psutil.Process(pid)
    found = 0
    for process in (root, *root.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            memory = process.memory_full_info()
            found += getattr(memory, "pss", memory.rss)
    return found / 1e6


def last_error(log: Path, start: int) -> str:
    """Quote the last error, or else the last line, of a log from a place on."""
    text = log.read_bytes()[start:].decode("utf-8", errors="replace")
    errors = [line for line in text.splitlines() if "Error" in line]
    last = (errors or text.splitlines() or ["no output"])[-1].strip()
    return f"{last[:300]} (whole log: {log})"


def size_of(log: Path) -> int:
    """Count the bytes that a log holds so far."""
    return log.stat().st_size if log.exists() else 0


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process that leads a group: SIGTERM first; what is left of the group is killed."""
    try:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        logger.warning("process %d ignored SIGTERM for %d s", process.pid, STOP_SECONDS)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
