"""Every family is pruned by the same code: streamed from disk as in memory, and loadable after."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_byte_tokenizer

from gblm import data, packed
from gblm.calibrate.gradients import Gradients, gradient_norms
from gblm.calibrate.walk import Walk, walk
from gblm.errors import InputError
from gblm.methods import make_method
from gblm.methods.pipeline import Pipeline
from gblm.model.layers import Layers
from gblm.model.linears import prunable
from gblm.model.loading import load, load_tokenizer
from gblm.prune import prune
from gblm.prune.job import Job
from gblm.prune.layer import prune_layer
from gblm.recipe import Calibration, Recipe
from gblm.sparse.formats import format_for
from gblm.sparse.patterns import parse

LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
# Name → model_type and what differs from the common fields.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama 1/2": ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": False}),
    "llama 3": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "multi-query": ("llama", {"num_key_value_heads": 1}),
    "mistral": ("mistral", {"sliding_window": 16}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "gemma2": ("gemma2", {"sliding_window": 16, "query_pre_attn_scalar": 16}),
    "gemma3 text": ("gemma3_text", {"sliding_window": 16, "query_pre_attn_scalar": 16}),
    "phi3 (fused)": ("phi3", {"pad_token_id": 0}),
}


def save_family(
    name: str, folder: Path, dtype: torch.dtype = torch.bfloat16, **changed: object
) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, more = FAMILIES[name]
    fields = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 258,
        "max_position_embeddings": 512, "initializer_range": 0.1, "bos_token_id": 256,
        "eos_token_id": 257,
    }  # fmt: skip
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(fields | more | changed))
    AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder)
    return save_byte_tokenizer(folder)


def pruned_in_memory(recipe: Recipe) -> torch.nn.Module:
    """Oracle: the whole model loaded by transformers, pruned without streaming."""
    model = load(Path(recipe.model))
    calibration = recipe.calibration
    assert calibration is not None
    windows = data.calibration_windows(
        data.read_documents(calibration.source, "calibration"),
        load_tokenizer(Path(recipe.model)),
        calibration.num_samples,
        calibration.seq_len,
        calibration.seed,
    )
    layers, names = Layers(model), frozenset(prunable(model))
    method = make_method(recipe.method, {})
    norms: dict[int, dict[str, dict[str, torch.Tensor]]] = {0: {}, 1: {}}
    if "grad_norm" in method.needs:
        samples = torch.tensor(float(len(windows)))
        for index, found in gradient_norms(layers, list(windows), Gradients("l2", names)):
            norms[index] = {
                name.removeprefix(layers.name(index) + "."): {
                    "grad_norm": norm, "num_samples": samples
                }
                for name, norm in found.items()
            }  # fmt: skip
    how = Walk(frozenset({"act_norm", "hessian"}) & method.needs)
    formats = dict.fromkeys(names, format_for(parse(recipe.pattern)))
    job = Job(recipe, layers, formats, Pipeline(method))
    for layer in walk(layers, list(windows.split(1)), how):
        prune_layer(job, layer, norms.__getitem__)
    return model


@pytest.mark.parametrize(
    ("family", "method"),
    [*((family, "gblm") for family in FAMILIES), ("llama 3", "sparsegpt"),
     ("gemma3 text", "sparsegpt"), ("phi3 (fused)", "sparsegpt")],
)  # fmt: skip
def test_family(family: str, method: str, tmp_path: Path, text_file: Path) -> None:
    source = save_family(family, tmp_path / "model")
    calibration = Calibration(source=str(text_file), num_samples=3, seq_len=24)
    recipe = Recipe(model=str(source), method=method, pattern="2:4", calibration=calibration)
    report = prune(recipe, tmp_path / "out")
    fused = family.startswith("phi3")
    assert report["linears"] == (8 if fused else 14)
    assert report["sparsity"] == pytest.approx(0.5, abs=0.01)
    want = pruned_in_memory(recipe)
    got = packed.load(tmp_path / "out", backend="dense")
    ids = torch.arange(20).reshape(1, -1) * 7
    with torch.no_grad():
        torch.testing.assert_close(got(ids).logits, want(ids).logits, rtol=0, atol=0)


@pytest.mark.parametrize("method", ["gblm", "sparsegpt"])
def test_float16_models(method: str, tmp_path: Path, text_file: Path) -> None:
    source = save_family("llama 3", tmp_path / "model", torch.float16)
    calibration = Calibration(source=str(text_file), num_samples=3, seq_len=24)
    recipe = Recipe(model=str(source), method=method, pattern="0.5", calibration=calibration)
    assert prune(recipe, tmp_path / "out")["sparsity"] == pytest.approx(0.5, abs=0.01)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["dtype"] == "float16"


def test_fused_experts_are_refused(tmp_path: Path, text_file: Path) -> None:
    from transformers import AutoModelForCausalLM, MixtralConfig

    config = MixtralConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2, vocab_size=258,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    save_byte_tokenizer(tmp_path / "model")
    recipe = Recipe(
        model=str(tmp_path / "model"), method="wanda",
        calibration=Calibration(source=str(text_file), num_samples=2, seq_len=16),
    )  # fmt: skip
    with pytest.raises(InputError, match="mixture-of-experts"):
        prune(recipe, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
