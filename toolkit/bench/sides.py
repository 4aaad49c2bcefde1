"""Sides of a comparison: a name, an engine, a model. The list of engines is closed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gblm.errors import InputError, UsageError
from gblm.folder import model_name, quant_method, read_config, resolve
from gblm.formats.manifest import QUANT_METHOD

# Engine → what runs it.
ENGINES = {
    "vllm": "vLLM's server, under a load generator",
    "hf": "a loop over the transformers model",
    "ort": "a loop over an exported folder in ONNX Runtime",
    "llama.cpp": "a loop over a GGUF file in llama-cpp-python",
}
# Engine → the module that runs it in a process of its own; one request at a time.
LOOPS = {
    "hf": "gblm.bench.loop_hf",
    "ort": "gblm.export.onnx_model.loop",
    "llama.cpp": "gblm.bench.loop_llama",
}
ORT_FILE = "genai_config.json"


@dataclass(frozen=True)
class Side:
    """One model in one engine.

    Attributes:
        name: of its rows.
        engine: of ENGINES.
        path: a folder, or a GGUF file.
    """

    name: str
    engine: str
    path: Path

    @classmethod
    def parse(cls, text: str) -> Side:
        """Read "[NAME=][ENGINE:]MODEL".

        Without an engine, a GGUF file runs in llama.cpp, an exported folder in ONNX Runtime, and
        any other model in vLLM. Without a name, it is the model's.

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
        if not model or (equals and not name and text[:1] == "="):
            raise UsageError(
                f"side {text!r}: write [NAME=][ENGINE:]MODEL; engines: {', '.join(ENGINES)}."
            )
        path = Path(model).expanduser()
        if path.suffix == ".gguf":
            if not path.is_file():
                raise InputError(f"{path}: no such file.")
        else:
            path = resolve(model)
        return cls(name or _name_of(model), engine or _engine_of(path), path)

    def backend(self, wanted: str | None) -> str | None:
        """The backend that is asked for, where the model is packed; dense ones have none."""
        is_packed = self.path.is_dir() and quant_method(read_config(self.path)) == QUANT_METHOD
        return wanted if is_packed else None

    @property
    def num_bytes(self) -> int:
        """Of the model's weights as stored: all files that hold tensors."""
        if self.path.is_file():
            return self.path.stat().st_size
        endings = ("*.safetensors", "*.onnx", "*.onnx.data", "*.data")
        files = {file for ending in endings for file in self.path.glob(ending)}
        return sum(file.stat().st_size for file in files)


def parse_sides(texts: Sequence[str]) -> list[Side]:
    """All sides of a comparison; the first is the baseline.

    Raises:
        UsageError: there are fewer than two, or two of one name.
    """
    if len(texts) < 2:
        raise UsageError("bench models: give two models or more; the first is the baseline.")
    sides = [Side.parse(text) for text in texts]
    names = [side.name for side in sides]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"two sides are called {twice!r}: give them names (NAME=MODEL).")
    return sides


def _engine_of(path: Path) -> str:
    if path.suffix == ".gguf":
        return "llama.cpp"
    return "ort" if (path / ORT_FILE).exists() else "vllm"


def _name_of(model: str) -> str:
    return Path(model).name if model.endswith(".gguf") else model_name(model)
