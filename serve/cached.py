"""Make the folders that `gblm serve` serves: once, into gblm's cache, and complete or not at all.

Zeros of a dense model are packed (`--pack`), and a sparse folder of compressed-tensors, which
nothing else reads any more, is converted. The name of the made folder carries a hash of all that
decides its content, so that the next start finds it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gblm.cache import alone, cache_folder
from gblm.checkpoint.write import folder_bytes, side_files
from gblm.export.legacy import export_legacy
from gblm.export.pack import export_pack
from gblm.files import sha256
from gblm.model.folder import ModelFolder, model_name
from gblm.model.reader import Reader
from gblm.progress import Progress, no_progress
from gblm.provenance import computing_versions
from gblm.serve.vllm_cli import check_version

logger = logging.getLogger(__name__)


def folder_to_serve(
    model: str | Path, pack: bool = False, progress: Progress = no_progress
) -> Path:
    """Find the folder of a model, or the packed one in the cache; make that if it is not there.

    Args:
        model: a folder or hub id.
        pack: pack the zeros of a dense model first; every value stays as it is.
        progress: for progress bars.

    Raises:
        GblmError: whatever `gblm export pack` refuses, and a vLLM that would refuse the result. The
            cache then holds nothing new.
    """
    source = ModelFolder.open(model)
    if is_legacy(source):
        return _made(
            model, source, "converted", lambda out: export_legacy(source, out, False, progress)
        )
    if pack:
        source.check_dense()
        return _made(
            model, source, "packed", lambda out: export_pack(source, out, progress=progress)
        )
    return source.path


def is_legacy(folder: ModelFolder) -> bool:
    """Tell whether compressed-tensors wrote a folder that vLLM refuses and gblm converts.

    vLLM serves plain weights beside a `sparsity_config`, unless that names targets.
    """
    if folder.legacy_format != "dense":
        return folder.legacy_format is not None
    return bool(folder.config["quantization_config"]["sparsity_config"].get("targets"))


def _made(model: str | Path, source: ModelFolder, title: str, make: Callable[[Path], Any]) -> Path:
    """Find the folder in the cache, or make it if no earlier start has."""
    check_version()  # making takes long: what would be refused afterwards is refused now
    folder = _place(f"{model_name(model)}-{title}", source)
    with alone(folder):
        if folder.exists():
            logger.info("using what an earlier start made of %s", model)
        else:
            logger.info("making %s of %s", folder, model)
            make(folder)
    logger.info("serving from %s, %.1f MB", folder, folder_bytes(folder) / 1e6)
    return folder


def _place(title: str, source: ModelFolder) -> Path:
    """Name a folder of the cache; the name changes with whatever could change its content."""
    side = {name: sha256(file) for name, file in side_files(source.path).items()}
    with Reader(source) as reader:
        content = reader.sha256()
    facts = {"title": title, "model": content, "side": side, "versions": computing_versions()}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    return cache_folder() / "served" / f"{re.sub(r'[^A-Za-z0-9._-]+', '_', title)}-{digest}"
