"""Shapes with random weights, and folders of gblm that several benchmarks make of a model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from pages import gblm
from safetensors.torch import save_file
from split_experts import split
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    OlmoeConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
)

from gblm.fetch import fetch
from gblm.model.folder import ModelFolder
from gblm.model.loading import skeleton

VOCAB, SCALE = 32000, 0.02
SPLIT = "smollm2-experts"
BOS, EOS = "<s>", "</s>"
COMMON = {
    "vocab_size": VOCAB, "max_position_embeddings": 4096, "tie_word_embeddings": False,
    "bos_token_id": 256, "eos_token_id": 257, "dtype": "bfloat16",
}  # fmt: skip
# OLMoE-1B-7B: 64 experts in each decoder layer, of which a token takes 8.
OLMOE = {
    "hidden_size": 2048, "intermediate_size": 1024, "num_attention_heads": 16,
    "num_key_value_heads": 16, "num_experts": 64, "num_experts_per_tok": 8, "pad_token_id": 257,
    "architectures": ["OlmoeForCausalLM"],
}  # fmt: skip
SHAPES: dict[str, PreTrainedConfig] = {
    "tinyllama": LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
        num_key_value_heads=4, architectures=["LlamaForCausalLM"], **COMMON,
    ),
    "llama2": LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32, architectures=["LlamaForCausalLM"], **COMMON,
    ),
    "olmoe": OlmoeConfig(num_hidden_layers=3, **OLMOE, **COMMON),
    "olmoe7b": OlmoeConfig(num_hidden_layers=16, **OLMOE, **COMMON),
    # Qwen3-30B-A3B, of whose 48 decoder layers one is in memory at a time.
    "qwen3moe": Qwen3MoeConfig(
        hidden_size=2048, moe_intermediate_size=768, num_hidden_layers=2, num_attention_heads=32,
        num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8,
        architectures=["Qwen3MoeForCausalLM"], **COMMON,
    ),
}  # fmt: skip


def model_folder(root: Path, name: str) -> Path:
    """Give the dense model of a name: a real one, that split into experts, or a random shape."""
    if name in SHAPES:
        return shape_folder(root, name)
    if name != SPLIT:
        return fetch(name)
    return folder if (folder := root / name).exists() else split(fetch("smollm2"), folder)


def make_packed(model: Path, pattern: str, values: str, folder: Path) -> None:
    """Pack a model, its zeros chosen by magnitude: speed and size do not depend on the method.

    A pattern such as "3.5bits" is a budget that is spread over 8:16 and dense linears.
    """
    command, words = "prune", f"--method magnitude --pattern {pattern}"
    if pattern == "dense":
        command, words = "export pack", "--pattern dense"
    elif pattern.endswith("bits"):
        words = f"--preset fast --budget {pattern} --pattern 8:16"
    gblm(f"{command} '{model}' {words} --values {values} --head {values} --output '{folder}'")


def shape_folder(root: Path, size: str) -> Path:
    """Make a model of this shape with random weights, one shard per decoder layer."""
    folder = root / size
    if (folder / "model.safetensors.index.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    SHAPES[size].save_pretrained(folder)
    save_byte_tokenizer(folder)
    weight_map = dict(write_shards(folder))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_shards(folder: Path) -> Iterator[tuple[str, str]]:
    """Draw and write shard after shard; yield each tensor's name and file."""
    shards: dict[str, dict[str, torch.Size]] = {}
    for name, parameter in skeleton(ModelFolder.open(folder), 10**6).named_parameters():
        parts = name.split(".")
        shard = parts[2] if parts[1] == "layers" else "frame"
        shards.setdefault(shard, {})[name] = parameter.shape
    for seed, (shard, shapes) in enumerate(shards.items()):
        generator = torch.Generator().manual_seed(seed)
        tensors = {
            name: (torch.randn(shape, generator=generator) * SCALE).bfloat16()
            if len(shape) > 1
            else torch.ones(shape, dtype=torch.bfloat16)
            for name, shape in shapes.items()
        }
        file = f"model-{shard}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        yield from ((name, file) for name in tensors)


def save_byte_tokenizer(folder: Path) -> None:
    """Write a tokenizer of 256 bytes, BOS 256 and EOS 257."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([BOS, EOS])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=EOS
    ).save_pretrained(folder)
