"""Run by `make vllm-cuda` beside vLLM's CUDA build: what works there without a device."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

import gblm.serve.vllm_plugin
from gblm.errors import CheckpointError
from gblm.serve.vllm_cli import is_tested, vllm_version


def test_this_is_a_tested_cuda_build() -> None:
    torch = pytest.importorskip("torch")
    assert torch.version.cuda is not None
    assert is_tested(vllm_version())
    from vllm import LLM

    assert callable(LLM)


def test_every_module_of_the_plugin_imports() -> None:
    names = [module.name for module in pkgutil.iter_modules(gblm.serve.vllm_plugin.__path__)]
    assert {"config", "linear", "head", "ragged"} <= set(names)
    for name in names:
        importlib.import_module(f"gblm.serve.vllm_plugin.{name}")


def test_vllm_finds_the_plugin_by_its_entry_point() -> None:
    from vllm.model_executor.layers.quantization import get_quantization_config
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    config = get_quantization_config("gblm")
    assert config.__name__ == "SparseConfig"
    with pytest.raises(CheckpointError):
        config.from_config({})
