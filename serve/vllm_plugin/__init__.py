"""The plugin teaches vLLM `quant_method: gblm`, by its public registration calls only."""

from __future__ import annotations

import logging

from gblm.serve.vllm_cli import is_tested, vllm_version

logger = logging.getLogger(__name__)


def register() -> None:
    """vLLM calls this entry point (`vllm.general_plugins`) in every process, perhaps twice.

    A vLLM that was not tested is refused when a packed model is loaded, not here: whoever serves
    other models with it must not notice that gblm is installed.
    """
    try:
        _register()
    except Exception as error:
        found = vllm_version()
        if is_tested(found):
            raise
        logger.warning("gblm: packed models cannot be served by vLLM %s: %s", found, error)


def _register() -> None:
    from vllm.model_executor.layers.quantization import (
        QUANTIZATION_METHODS,
        register_quantization_config,
    )

    if "gblm" in QUANTIZATION_METHODS:
        return
    from gblm.serve.vllm_plugin.config import SparseConfig

    register_quantization_config("gblm")(SparseConfig)
