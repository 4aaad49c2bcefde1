"""Every family is pruned by the same code: streamed from disk as in memory, and loadable after."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from alike import assert_same_tensors
from conftest import save_byte_tokenizer
from resident import Resident
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gblm import data, packed
from gblm.calibrate.gradients import gradient_norms
from gblm.calibrate.walk import Walk, walk
from gblm.checkpoint.inspect import verify
from gblm.errors import CheckpointError, InputError
from gblm.export.dense import export_dense
from gblm.export.pack import export_pack
from gblm.methods import make_method
from gblm.methods.pipeline import Pipeline
from gblm.model import experts
from gblm.model.folder import ModelFolder
from gblm.model.layers import stream
from gblm.model.linears import prunable
from gblm.model.loading import auto_class, load, load_tokenizer
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
    # A cap that the models' small logits reach.
    "gemma2": ("gemma2", {
        "sliding_window": 16, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 0.5,
    }),
    "gemma3 text": ("gemma3_text", {"sliding_window": 16, "query_pre_attn_scalar": 16}),
    "phi3 (fused)": ("phi3", {"pad_token_id": 0}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1, 1, 1, 0], "pad_token_id": 0}),
    "granite": ("granite", {
        "embedding_multiplier": 12.0, "attention_multiplier": 0.2, "residual_multiplier": 0.22,
        "logits_scaling": 8.0,
    }),
    "gemma3": ("gemma3", {"sliding_window": 16, "query_pre_attn_scalar": 16}),
    "llava": ("llava", {}),
}  # fmt: skip
# Mixtures of experts, as in FAMILIES. Their experts are as wide as MLPs of the others.
EXPERTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {}),
    "olmoe": ("olmoe", {"pad_token_id": 0}),
    "qwen3 moe": ("qwen3_moe", {"moe_intermediate_size": 128}),
    "qwen2 moe": ("qwen2_moe", {
        "moe_intermediate_size": 128, "shared_expert_intermediate_size": 64,
    }),
    "granite moe (fused)": ("granitemoe", {}),
    "llama 4 text (fused)": ("llama4_text", {"intermediate_size_mlp": 128, "pad_token_id": 0}),
}  # fmt: skip
NUM_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
# Those with a vision tower: the model_type of the text decoder and of the tower, and what else the
# config says. A tower has as many layers as the decoder.
TOWERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gemma3": (
        "gemma3_text", "siglip_vision_model",
        {"mm_tokens_per_image": 4, "boi_token_index": 259, "eoi_token_index": 260},
    ),
    "llava": ("llama", "clip_vision_model", {"image_seq_length": 16}),
}  # fmt: skip
IMAGE_TOKEN = 258
VISION = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 7, "projection_dim": 64, "vision_use_head": False,
}  # fmt: skip


def make_config(kind: str, fields: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    if kind not in TOWERS:
        return AutoConfig.for_model(kind, **fields)
    text, tower, more = TOWERS[kind]
    return AutoConfig.for_model(
        kind,
        text_config={"model_type": text, **fields, "vocab_size": 272},
        vision_config={
            "model_type": tower, **VISION, "num_hidden_layers": fields["num_hidden_layers"]
        },
        image_token_index=IMAGE_TOKEN,
        **more,
    )  # fmt: skip


def save_family(
    name: str, folder: Path, dtype: torch.dtype = torch.bfloat16, **changed: object
) -> Path:
    """A seeded model with the traits of its family; biases and norms are not all the same."""
    kind, more = (FAMILIES | EXPERTS)[name]
    more = more | NUM_EXPERTS if name in EXPERTS else more
    fields = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 258,
        "max_position_embeddings": 512, "initializer_range": 0.1, "bos_token_id": 256,
        "eos_token_id": 257,
    }  # fmt: skip
    torch.manual_seed(0)
    config = make_config(kind, fields | more | changed)
    model = auto_class(config).from_config(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    save_byte_tokenizer(folder)
    if kind in TOWERS:
        name_as_on_the_hub(folder)
        save_processor(kind, folder)
    return folder


def save_processor(kind: str, folder: Path) -> None:
    """What makes tokens of text and images; vLLM asks for it."""
    from transformers import (
        CLIPImageProcessorPil,
        Gemma3ImageProcessorPil,
        Gemma3Processor,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    image = {"image_token": "<image>", "boi_token": "<begin>", "eoi_token": "<end>"}
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, extra_special_tokens=image)
    assert tokenizer.convert_tokens_to_ids("<image>") == IMAGE_TOKEN
    tokenizer.add_tokens(["\n" * count for count in range(1, 5)])  # as Gemma's has them
    size = VISION["image_size"]
    if kind == "gemma3":
        pixels = Gemma3ImageProcessorPil(size={"height": size, "width": size})
        Gemma3Processor(pixels, tokenizer, image_seq_length=4).save_pretrained(folder)
        return
    pixels = CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )
    LlavaProcessor(
        pixels, tokenizer, patch_size=VISION["patch_size"], num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
    ).save_pretrained(folder)  # fmt: skip


def name_as_on_the_hub(folder: Path) -> None:
    """transformers drops a part of the towers' names that the files on the hub have."""
    tensors = load_file(folder / "model.safetensors")
    assert "language_model.model.embed_tokens.weight" in tensors
    named = {
        name.replace("vision_tower.", "vision_tower.vision_model."): tensor
        for name, tensor in tensors.items()
    }
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})


def pruned_in_memory(recipe: Recipe) -> torch.nn.Module:
    """Oracle: the whole model loaded by transformers, pruned without streaming."""
    model = load(Path(recipe.model))
    experts.unfuse(model)
    calibration = recipe.calibration
    assert calibration is not None
    windows = data.calibration_windows(
        data.read_documents(calibration.source, "calibration"),
        load_tokenizer(Path(recipe.model)),
        calibration.num_samples,
        calibration.seq_len,
        calibration.seed,
    )
    layers, names = Resident(model), frozenset(prunable(model))
    method = make_method(recipe.method, {})
    norms: dict[int, dict[str, dict[str, torch.Tensor]]] = {0: {}, 1: {}}
    if "grad_norm" in method.needs:
        samples = torch.tensor(float(len(windows)))
        for index, found in gradient_norms(layers, list(windows), names, "l2"):
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
    [*((family, "gblm") for family in (*FAMILIES, *EXPERTS)), ("llama 3", "sparsegpt"),
     ("gemma3 text", "sparsegpt"), ("phi3 (fused)", "sparsegpt"), ("qwen2 moe", "sparsegpt")],
)  # fmt: skip
def test_family(family: str, method: str, tmp_path: Path, text_file: Path) -> None:
    source = save_family(family, tmp_path / "model")
    calibration = Calibration(source=str(text_file), num_samples=3, seq_len=24)
    recipe = Recipe(model=str(source), method=method, pattern="2:4", calibration=calibration)
    report = prune(recipe, tmp_path / "out")
    others = {"phi3 (fused)": 8, "qwen2 moe": 38, "llama 4 text (fused)": 38}
    assert report["linears"] == others.get(family, 32 if family in EXPERTS else 14)
    assert report["sparsity"] == pytest.approx(0.5, abs=0.01)
    want = pruned_in_memory(recipe)
    got = packed.load(tmp_path / "out", backend="dense")
    ids = torch.arange(20).reshape(1, -1) * 7
    with torch.no_grad():
        torch.testing.assert_close(got(ids).logits, want(ids).logits, rtol=0, atol=0)


def test_attention_logits_are_capped(tmp_path: Path) -> None:
    """By the models that pruning and evaluation load; PyTorch's attention would leave it out."""
    source = save_family("gemma2", tmp_path / "model")
    prune(Recipe(model=str(source), method="magnitude", calibration=None), tmp_path / "packed")
    export_dense(ModelFolder.open(tmp_path / "packed"), tmp_path / "dense")
    ids = torch.arange(40).reshape(1, -1) * 5

    def logits(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return model(ids).logits

    def stated(**changes: Any) -> torch.Tensor:
        how = {"dtype": "auto", "attn_implementation": "eager", **changes}
        return logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense", **how).eval())

    capped, free = stated(), stated(attn_logit_softcapping=None)
    assert torch.equal(logits(load(tmp_path / "dense")), capped)
    assert torch.equal(logits(packed.load(tmp_path / "packed", "dense")), capped)
    assert (free - capped).norm() > 0.1 * capped.norm()
    with stream(ModelFolder.open(source)) as layers:
        assert layers.model.config._attn_implementation == "eager"


@pytest.mark.parametrize("family", TOWERS)
def test_towers_stay_as_they_are(
    family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They have as many layers as the text decoder, and come before it."""
    source = save_family(family, tmp_path / "model")
    recipe = Recipe(model=str(source), method="magnitude", calibration=None)
    with caplog.at_level("INFO"):
        report = prune(recipe, tmp_path / "out")
    said = "only the text decoder is pruned: vision_tower and multi_modal_projector stay dense"
    assert said in caplog.messages
    assert len(report["tensors"]) == 14
    assert all("language_model.layers" in row["name"] for row in report["tensors"])
    stored, kept = (load_file(f / "model.safetensors") for f in (source, tmp_path / "out"))
    beside = [n for n in stored if n.startswith(("vision_tower.", "multi_modal_projector."))]
    assert sum(".encoder.layers.1." in name for name in beside) == 16
    assert all(torch.equal(kept[name], stored[name]) for name in beside)
    # Zeros that are there already, under the names of the hub.
    export_dense(ModelFolder.open(tmp_path / "out"), tmp_path / "dense")
    dense, zeros = load_file(tmp_path / "dense/model.safetensors"), tmp_path / "zeros"
    shutil.copytree(source, zeros)
    for name in stored:
        new = name.replace("language_model.model.", "model.language_model.")
        stored[name] = dense.get(new, stored[name])
    save_file(stored, zeros / "model.safetensors", metadata={"format": "pt"})
    verify(ModelFolder.open(tmp_path / "out"), ModelFolder.open(zeros))
    export_pack(zeros, tmp_path / "packed")
    assert_same_tensors(tmp_path / "out", tmp_path / "packed")


@pytest.mark.parametrize("family", TOWERS)
def test_a_tower_that_lacks_a_tensor_is_refused(family: str, tmp_path: Path) -> None:
    source = save_family(family, tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    tensors.pop("vision_tower.vision_model.encoder.layers.1.mlp.fc1.weight")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    recipe = Recipe(model=str(source), method="magnitude", calibration=None)
    with pytest.raises(CheckpointError, match=r"vision_tower\.\S+fc1.weight is missing"):
        prune(recipe, tmp_path / "out")


@pytest.mark.parametrize("method", ["gblm", "sparsegpt"])
def test_float16_models(method: str, tmp_path: Path, text_file: Path) -> None:
    source = save_family("llama 3", tmp_path / "model", torch.float16)
    calibration = Calibration(source=str(text_file), num_samples=3, seq_len=24)
    recipe = Recipe(model=str(source), method=method, pattern="0.5", calibration=calibration)
    assert prune(recipe, tmp_path / "out")["sparsity"] == pytest.approx(0.5, abs=0.01)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["dtype"] == "float16"


def test_experts_that_are_not_known_are_refused(tmp_path: Path, text_file: Path) -> None:
    """Those of GPT-OSS have biases and a gate of their own."""
    from transformers import GptOssConfig

    config = GptOssConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2, vocab_size=258, head_dim=16,
        num_experts_per_tok=1,
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
