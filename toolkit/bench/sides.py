"""What a side of a comparison is: a model in an engine, started, put under loads and stopped."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from gblm.bench.requests import Load, Seen
from gblm.model.folder import ModelFolder

TENSOR_FILES = ("*.safetensors", "*.onnx", "*.data")


@dataclass(frozen=True)
class Setup:
    """The setup is what all sides of a comparison share.

    The log takes the output of their processes. Threads (of engines without a server) and the
    backend (of packed weights) are the engine's choice if None; `options` go to vLLM. In each round
    all loads are put on every side. With `restart` a side starts anew in every round, so that one
    at a time is in memory; with `allow_noise` noisy rounds count, too.
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
