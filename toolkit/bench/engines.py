"""Which engines there are, and the sides of a comparison out of the words of a user."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gblm.bench.loop import LOOPS, LoopSide
from gblm.bench.server import ServerSide
from gblm.bench.sides import Setup, Side
from gblm.errors import InputError, UsageError
from gblm.kernels import check_backend
from gblm.model.folder import ModelFolder, model_name

ENGINES: dict[str, type[Side]] = {"vllm": ServerSide} | dict.fromkeys(LOOPS, LoopSide)
VLLM = ("vllm", "vllm-offline")
ONNX_FILE = "genai_config.json"


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
    file = Path(model).expanduser()
    if file.suffix != ".gguf":
        folder = ModelFolder.open(model)
        engine = engine or ("onnx" if (folder.path / ONNX_FILE).exists() else "vllm")
        return ENGINES[engine](name or model_name(model), engine, folder, setup)
    if not file.is_file():
        raise InputError(f"{file}: no such file.")
    engine = engine or "llama.cpp"
    return ENGINES[engine](name or file.name, engine, file, setup)


def parse_sides(texts: Sequence[str], setup: Setup) -> list[Side]:
    """Read all sides of a comparison and check that they can have their loads.

    Raises:
        UsageError: there is none, two have one name, one cannot have a load, or no side has a use
            for the backend or the options.
    """
    if not texts:
        raise UsageError("give a model, or several; the first one is the baseline.")
    sides = [parse_side(text, setup) for text in texts]
    names = [side.name for side in sides]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"two sides are called {twice!r}: give them names (NAME=MODEL).")
    if setup.options and not any(side.engine in VLLM for side in sides):
        raise UsageError(f"{' '.join(setup.options)}: these go to vLLM, in which no side runs.")
    if setup.backend is not None:
        check_backend(setup.backend)
        if not any(side.backend for side in sides):
            raise UsageError("--backend is of packed folders, and no side is one.")
    for side in sides:
        side.check()
    return sides
