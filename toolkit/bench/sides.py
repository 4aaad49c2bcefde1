"""The sides of a comparison: a model in an engine that is started, put under loads and stopped."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from gblm.bench.requests import Load, Seen
from gblm.errors import InputError, UsageError
from gblm.model.folder import ModelFolder, model_name, resolve

# Engine → the module that runs its loop in a process of its own, and the paths of the repository
# whose code decides its figures. vLLM's server has no loop.
ENGINES: dict[str, tuple[str | None, tuple[str, ...]]] = {
    "vllm": (None, ("serve", "toolkit/bench/server.py")),
    "vllm-offline": (
        "gblm.bench.loop_vllm", ("serve/vllm_plugin", "toolkit/bench/loop_vllm.py")
    ),
    "transformers": (
        "gblm.bench.loop_hf", ("toolkit/packed.py", "toolkit/hf.py", "toolkit/bench/loop.py")
    ),
    "onnx": ("gblm.export.onnx_model.loop", ("export/onnx_model", "toolkit/bench/loop.py")),
    "llama.cpp": ("gblm.bench.loop_llama", ("toolkit/bench/loop.py",)),
}  # fmt: skip
ONNX_FILE = "genai_config.json"
TENSOR_FILES = ("*.safetensors", "*.onnx", "*.data")


@dataclass(frozen=True)
class Setup:
    """The setup is what all sides of a comparison share.

    Attributes:
        loads: that they will be put under.
        log: file for the output of their processes.
        seed: of the prompts; all sides get the same ones.
        threads: of engines without a server; their own choice if None.
        backend: for packed weights; the best one if None.
        options: for vLLM, server or not.
        slo: limits for goodput in the words of `vllm bench serve`, such as "ttft:500".
    """

    loads: tuple[Load, ...]
    log: Path
    seed: int = 0
    threads: int | None = None
    backend: str | None = None
    options: tuple[str, ...] = ()
    slo: tuple[str, ...] = ()


class Side(ABC):
    """A side is a model in an engine; its name is that of its rows, its path a folder or GGUF."""

    def __init__(self, name: str, engine: str, path: Path, setup: Setup) -> None:
        self.name, self.engine, self.path, self.setup = name, engine, path, setup

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
        if self.path.is_file() or ModelFolder.open(self.path).kind != "packed":
            return None
        return self.setup.backend

    @property
    def measures(self) -> tuple[str, ...]:
        """List the paths of the repository whose code decides this side's figures."""
        return ("toolkit/kernels", *ENGINES[self.engine][1])

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


def parse_side(text: str, setup: Setup) -> Side:
    """Read "[NAME=][ENGINE:]MODEL".

    Without an engine, a GGUF file runs in llama.cpp, an exported folder in ONNX Runtime, and any
    other model in vLLM's server. Without a name, it is the model's.

    Raises:
        UsageError: a part is empty.
        InputError: there is no such model.
    """
    name, equals, rest = text.partition("=")
    if not equals or "/" in name or ":" in name:
        name, rest = "", text
    engine, colon, model = rest.partition(":")
    if not colon or engine not in ENGINES:
        engine, model = "", rest
    if not model or text[:1] == "=":
        raise UsageError(
            f"side {text!r}: write [NAME=][ENGINE:]MODEL; engines: {', '.join(ENGINES)}."
        )
    path = Path(model).expanduser()
    if path.suffix != ".gguf":
        path = resolve(model)
    elif not path.is_file():
        raise InputError(f"{path}: no such file.")
    name = name or (path.name if path.suffix == ".gguf" else model_name(model))
    return _make(name, engine or _engine_of(path), path, setup)


def parse_sides(texts: Sequence[str], setup: Setup) -> list[Side]:
    """Read all sides of a comparison and check that they can have their loads.

    Raises:
        UsageError: there is none, two have one name, or one cannot have a load.
    """
    if not texts:
        raise UsageError("give a model, or several; the first one is the baseline.")
    sides = [parse_side(text, setup) for text in texts]
    names = [side.name for side in sides]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"two sides are called {twice!r}: give them names (NAME=MODEL).")
    if setup.slo and not any(side.engine == "vllm" for side in sides):
        raise UsageError("--slo needs a side in vLLM's server, whose load generator counts it.")
    for side in sides:
        side.check()
    return sides


def _make(name: str, engine: str, path: Path, setup: Setup) -> Side:
    from gblm.bench.loop import LoopSide
    from gblm.bench.server import ServerSide

    return (ServerSide if engine == "vllm" else LoopSide)(name, engine, path, setup)


def _engine_of(path: Path) -> str:
    if path.suffix == ".gguf":
        return "llama.cpp"
    return "onnx" if (path / ONNX_FILE).exists() else "vllm"
