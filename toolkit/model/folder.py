"""ModelFolder: a model folder that has been found, whose config.json has been read and believed.

Whoever is given a path or a hub id opens it here once, and hands on what was opened. Code that a
checkpoint brings along is never run, pickle files are never opened.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gblm.errors import CheckpointError, InputError
from gblm.files import read_json

HUB_FILES = [
    "*.json", "*.safetensors", "tokenizer*", "*.model", "*.txt", "*.jinja", "LICENSE*", "README.md",
]  # fmt: skip
# Where a tokenizer's further chat templates lie, the only files that are not in the folder itself.
TEMPLATES = "additional_chat_templates"
# What every config.json of a language model that names it gives as a positive number.
SIZES = {
    "hidden_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers",
    "vocab_size",
}  # fmt: skip
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
LONGEST_NAME = 255  # bytes, on Linux
PACKED_METHOD = "gblm"
# How compressed-tensors wrote sparse weights until it dropped them. The list is closed: elsewhere a
# format's name was looked up as code (transformers#46342).
LEGACY_METHOD = "compressed-tensors"
LEGACY_FORMATS = ("sparse-24-bitmask", "sparse-bitmask", "marlin-24", "dense")
# How it stored codes, beneath a sparse format or dense.
CODE_FORMATS = ("int-quantized", "float-quantized", "naive-quantized")

# "dense": weights as transformers stores them. "packed": ours. "legacy": a sparse format that
# compressed-tensors wrote. "quantised": anything else that config.json declares.
Kind = Literal["dense", "packed", "legacy", "quantised"]


@dataclass(frozen=True)
class ModelFolder:
    """A model folder and what its config.json says; as text it is its path."""

    path: Path
    config: dict[str, Any]

    @classmethod
    def open(cls, model: str | Path | ModelFolder) -> ModelFolder:
        """Find a model and read its config.json.

        Args:
            model: a local folder, a hub id that is then downloaded, or what was opened before.

        Raises:
            InputError: there is no such model, or its config.json is unreadable or would run code.
        """
        if isinstance(model, ModelFolder):
            return model
        path = resolve(model)
        return cls(path, _read_config(path))

    def __str__(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        """Name the model by its folder."""
        return self.path.resolve().name

    @property
    def text_config(self) -> dict[str, Any]:
        """Give what config.json says of the text model."""
        found: dict[str, Any] = self.config.get("text_config", self.config)
        return found

    @property
    def dtype(self) -> str:
        """Name the dtype of config.json as torch does, such as "torch.bfloat16"; it may be none."""
        return f"torch.{self.config.get('dtype', self.config.get('torch_dtype'))}"

    @property
    def quant_method(self) -> str | None:
        """Tell how config.json says the weights are stored; None where it declares nothing."""
        fields = self.config.get("quantization_config")
        if fields is None:
            return None
        return str(fields.get("quant_method")) if isinstance(fields, dict) else "unknown"

    @property
    def legacy_format(self) -> str | None:
        """Name the sparse format that compressed-tensors wrote the weights in, or None.

        "dense" are plain weights, or codes of pruned ones, beside a `sparsity_config`, which vLLM
        refuses all the same.
        """
        if self.quant_method != LEGACY_METHOD:
            return None
        fields = self.config["quantization_config"]
        if fields.get("format") == "marlin-24":
            return "marlin-24"
        sparse = fields.get("sparsity_config")
        name = sparse.get("format") if isinstance(sparse, dict) else None
        if name == "dense" and fields.get("config_groups") and not has_pruned_codes(fields):
            return None
        return name if isinstance(name, str) and name in LEGACY_FORMATS else None

    @property
    def kind(self) -> Kind:
        """Tell how the weights are stored, which decides who can read them."""
        if self.quant_method is None:
            return "dense"
        if self.quant_method == PACKED_METHOD:
            return "packed"
        return "legacy" if self.legacy_format else "quantised"

    def check_dense(self) -> None:
        """Raise InputError with a way out when the weights are stored packed or quantised."""
        self.check_current()
        if self.kind != "dense":
            packed = self.kind == "packed"
            way_out = "it is packed already" if packed else "start from the dense model"
            raise InputError(f"{self}: the weights are stored as `{self.quant_method}`; {way_out}.")

    def check_current(self) -> None:
        """Raise CheckpointError when only `gblm export pack` can read the weights."""
        if self.kind == "legacy":
            raise CheckpointError(
                f"{self}: compressed-tensors wrote the weights as `{self.legacy_format}`, which "
                "current software no longer reads; convert them first: "
                f"`gblm export pack {self} --output OUT`."
            )

    def file(self, name: str) -> Path:
        """Return a file of the folder, or of the blob store that a hub snapshot links to.

        Raises:
            CheckpointError: the name or a link leads elsewhere.
        """
        return inside(self.path, name)

    def place_of(self, named: str) -> Path:
        """Say where a model that a recipe names would lie: where it was, or beside this folder.

        On the machine that made this folder it is named by its whole path, elsewhere by its name.
        """
        return self.path.parent / Path(named).expanduser()


def resolve(model: str | Path) -> Path:
    """Find the local folder of a model: itself, or a snapshot of a hub id.

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
        return Path(snapshot_download(text, allow_patterns=HUB_FILES))
    except Exception as error:
        raise InputError(
            f"model {text}: no such folder, and the hub could not give it "
            f"({type(error).__name__}). Name a local HF folder, or run `gblm fetch smollm2`."
        ) from error


def model_name(model: str | Path) -> str:
    """Name a model: by its folder, or by the end of its hub id."""
    path = Path(model).expanduser()
    return (path.resolve() if path.is_dir() else path).name


def _read_config(folder: Path) -> dict[str, Any]:
    """Read config.json; refuse one that would run code or is not JSON."""
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder} is no model folder: config.json is missing.")
    config = read_json(path)
    if "auto_map" in config:
        raise InputError(
            f"{path} names Python code to run (auto_map); gblm never executes code from a "
            "checkpoint. If transformers knows the architecture, remove the auto_map entry."
        )
    _check_sizes(path, config)
    fields = config.pop("compression_config", None)  # as compressed-tensors called it until 0.6
    if isinstance(fields, dict):
        config.setdefault("quantization_config", {"quant_method": LEGACY_METHOD, **fields})
    return config


def _check_sizes(path: Path, config: dict[str, Any]) -> None:
    """Refuse sizes that are no numbers, on which libraries would stumble anywhere."""
    text = config.get("text_config", config)
    if not isinstance(text, dict):
        raise CheckpointError(f"{path}: text_config is no JSON object.")
    for name in SIZES & text.keys():
        if type(text[name]) is not int or text[name] < 1:
            raise CheckpointError(
                f"{path}: {name} is {str(text[name])[:40]!r}, not a whole number above 0."
            )


def has_pruned_codes(fields: dict[str, Any]) -> bool:
    """Tell whether a "quantization_config" is of codes of 2:4 weights that are stored dense."""
    sparse = fields.get("sparsity_config")
    structure = sparse.get("sparsity_structure") if isinstance(sparse, dict) else None
    return structure == "2:4" and fields.get("format") in CODE_FORMATS


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


def inside(folder: Path, file: str, within: str = "") -> Path:
    """Return a file of the folder, or of the blob store that a hub snapshot links to.

    Args:
        folder: a model folder.
        file: the name of the file, without a folder.
        within: TEMPLATES for a file of that folder.

    Raises:
        CheckpointError: the name or a link leads elsewhere.
    """
    if not _can_be_named(file):
        raise CheckpointError(f"{folder}: no file can have the name {file[:80]!r}.")
    plain = Path(file).name == file and file not in ("", ".", "..")
    if not plain or within not in ("", TEMPLATES):
        name = f"{within}/{file}" if within else file
        raise CheckpointError(f"{folder}: file name {name!r} leads out of the folder.")
    path = folder / within / file
    target, root = path.resolve(), folder.resolve()
    if target.parent != root / within and target.parent != root.parent.parent / "blobs":
        raise CheckpointError(f"{path} is a link that leads out of the folder.")
    return path


def _can_be_named(file: str) -> bool:
    try:
        return "\0" not in file and len(os.fsencode(file)) <= LONGEST_NAME
    except UnicodeEncodeError:
        return False
