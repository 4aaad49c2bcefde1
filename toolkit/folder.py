"""A model folder before anything in it is believed: where it is, its JSON, its file names.

Code that a checkpoint brings along is never run, pickle files are never opened.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gblm.errors import CheckpointError, InputError

HUB_FILES = ["*.json", "*.safetensors", "tokenizer*", "*.model", "*.txt", "*.jinja", "LICENSE*"]
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
# How compressed-tensors wrote sparse weights until it dropped them. The list is closed: elsewhere a
# format's name was looked up as code (transformers#46342).
LEGACY_METHOD = "compressed-tensors"
LEGACY_FORMATS = ("sparse-24-bitmask", "sparse-bitmask", "marlin-24", "dense")


def resolve(model: str | Path, revision: str | None = None) -> Path:
    """The local folder of a model: itself, or a snapshot of a hub id.

    Args:
        model: a folder or hub id.
        revision: branch, tag or commit of the hub id.

    Raises:
        InputError: neither a folder nor a reachable hub id.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    text = str(model)
    if path.exists() or text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise InputError(f"model {text}: there is no such folder.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(text, revision=revision, allow_patterns=HUB_FILES))
    except Exception as error:
        raise InputError(
            f"model {text}: no such folder, and the hub could not give it "
            f"({type(error).__name__}). Name a local HF folder, or run `gblm fetch smollm2`."
        ) from error


def model_name(model: str | Path) -> str:
    """What to call a model: the name of its folder, or the end of its hub id."""
    path = Path(model).expanduser()
    return (path.resolve() if path.is_dir() else path).name


def read_json_object(path: Path) -> dict[str, Any]:
    """One JSON object from a file.

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


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys differ: of two readers one may take the first value, one the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [key for key, _ in pairs]
        twice = next(key for key in names if names.count(key) > 1)
        raise ValueError(f"the key {twice[:80]!r} stands there twice")
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder, refused when it would run code or is not JSON."""
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder} is no model folder: config.json is missing.")
    config = read_json_object(path)
    if "auto_map" in config:
        raise InputError(
            f"{path} names Python code to run (auto_map); gblm never executes code from a "
            "checkpoint. If transformers knows the architecture, remove the auto_map entry."
        )
    return config


def quant_method(config: dict[str, Any]) -> str | None:
    """How config.json says the weights are stored; None = as they are."""
    fields = config.get("quantization_config")
    if fields is None:
        return None
    return str(fields.get("quant_method")) if isinstance(fields, dict) else "unknown"


def legacy_format(config: dict[str, Any]) -> str | None:
    """The name in LEGACY_FORMATS of a checkpoint that compressed-tensors wrote; None if it is none.

    "dense" are plain weights beside a `sparsity_config`, which vLLM refuses all the same.
    """
    if quant_method(config) != LEGACY_METHOD:
        return None
    fields = config["quantization_config"]
    if fields.get("format") == "marlin-24":
        return "marlin-24"
    sparse = fields.get("sparsity_config")
    name = sparse.get("format") if isinstance(sparse, dict) else None
    if name == "dense" and fields.get("config_groups"):
        return None
    return name if isinstance(name, str) and name in LEGACY_FORMATS else None


def legacy_sentence(folder: Path, config: dict[str, Any]) -> str | None:
    """What to do with a folder of `legacy_format`; None if it is none."""
    name = legacy_format(config)
    if name is None:
        return None
    return (
        f"{folder}: compressed-tensors wrote the weights as `{name}`, which current software no "
        f"longer reads; convert them first: `gblm export legacy {folder} --output OUT`."
    )


def check_weights(folder: Path) -> None:
    """Refuse a folder whose weights are pickles or missing."""
    if any(folder.glob("*.safetensors")):
        return
    for pattern in PICKLES:
        for file in folder.glob(pattern):
            raise InputError(
                f"{folder} holds {file.name}, a pickle that can run code when opened, and no "
                "safetensors. Convert it with transformers' save_pretrained() in a sandbox."
            )
    raise InputError(f"{folder} holds no *.safetensors file.")


def inside(folder: Path, file: str) -> Path:
    """A file of the folder, or of the blob store that a hub snapshot links to.

    Raises:
        CheckpointError: the name or a link leads elsewhere.
    """
    if "\0" in file or Path(file).name != file or file in ("", ".", ".."):
        raise CheckpointError(f"{folder}: file name {file!r} leads out of the folder.")
    path = folder / file
    target, root = path.resolve(), folder.resolve()
    if target.parent != root and target.parent != root.parent.parent / "blobs":
        raise CheckpointError(f"{path} is a link that leads out of the folder.")
    return path
