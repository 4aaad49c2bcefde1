"""Checkpoints of compressed-tensors for tests, whole and altered.

compressed-tensors 0.9.4 itself wrote them, and 0.8.1 the one that is named after it, never gblm:
tiny seeded models, pruned by magnitude. What their weights were before it packed them lies beside
the folders, in unstructured.safetensors and 2of4.safetensors; what it unpacks codes to, under the
folder's name. Those in `served` have heads of a size that vLLM serves.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

FIXTURES = Path(__file__).parent / "legacy/fixtures"
UP = "model.layers.0.mlp.up_proj"
Tensors = dict[str, Tensor]
Change = Callable[[Tensors], object]
Settings = Callable[[dict[str, Any]], object]


def altered(
    tmp_path: Path, fixture: str, change: Change | None = None, config: Settings | None = None
) -> Path:
    """Copy a fixture, with other tensors or another quantization_config."""
    folder = Path(shutil.copytree(FIXTURES / fixture, tmp_path / "altered"))
    tensors = load_file(folder / "model.safetensors")
    if change is not None:
        change(tensors)
        save_file(
            {n: t.clone().contiguous() for n, t in tensors.items()}, folder / "model.safetensors"
        )
    if config is not None:
        fields = json.loads((folder / "config.json").read_text())
        config(fields["quantization_config"])
        (folder / "config.json").write_text(json.dumps(fields))
    return folder


def drop(part: str) -> Change:
    """Remove a part of UP."""
    return lambda tensors: tensors.pop(f"{UP}.{part}")


def put(part: str, value: Callable[[Tensor], Tensor]) -> Change:
    """Put something else in the place of a part of UP."""
    return lambda tensors: tensors.update({f"{UP}.{part}": value(tensors[f"{UP}.{part}"])})


def each_scale(value: Callable[[Tensor], Tensor]) -> Change:
    """Change the scales of all weights."""
    return lambda tensors: tensors.update(
        {name: value(t) for name, t in tensors.items() if name.endswith("weight_scale")}
    )


def settings(**changes: object) -> Settings:
    """Say something else of the weights' codes."""
    return lambda config: config["config_groups"]["group_0"]["weights"].update(changes)


# How the sparse LLaMA 3.1 of Neural Magic and its quantised forms lie on the hub: several shards
# with an index, the config.json of transformers 4, and the quantization_config that
# compressed-tensors 0.9.4 writes; 0.8, of the time of their release, stored codes dense.
LLAMA_31 = {
    "architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16", "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
        "original_max_position_embeddings": 32, "rope_type": "llama3",
    },
    "transformers_version": "4.45.2",
}  # fmt: skip
DENSE_2OF4 = {
    "format": "dense", "global_sparsity": 0.4375, "ignore": ["lm_head"],
    "registry_requires_subclass": False, "sparsity_structure": "2:4", "targets": ["Linear"],
}  # fmt: skip
PUBLISHED = ("2of4", "2of4-FP8-dynamic", "2of4-FP8-dynamic-0.8", "2of4-quantized.w4a16")


def published(name: str, folder: Path) -> Path:
    """A folder laid out like one of PUBLISHED, of the fixtures' small shapes."""
    source = "marlin-int4-own" if name.endswith("w4a16") else "served/24-bitmask"
    tensors = load_file(FIXTURES / source / "model.safetensors")
    config = json.loads((FIXTURES / source / "config.json").read_text())
    del config["rope_parameters"]
    stored = config["quantization_config"]
    if "FP8" in name:
        stored = json.loads((FIXTURES / "24-fp8/config.json").read_text())["quantization_config"]
        to_fp8(tensors)
    if name.endswith("0.8"):
        to_dense(tensors)
    if name.endswith(("0.8", "w4a16")):
        stored["sparsity_config"] = DENSE_2OF4
    folder.mkdir(parents=True)
    config = config | LLAMA_31 | {"quantization_config": stored}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text('{"bos_token_id": 1, "temperature": 0.6}')
    (folder / "recipe.yaml").write_text("sparsity_stage: {}\n")
    save_sharded(tensors, folder)
    return folder


def save_sharded(tensors: Tensors, folder: Path, shards: int = 4) -> None:
    """Parts of one weight lie in different shards, as they may when a shard is full."""
    files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    places = {name: files[i % shards] for i, name in enumerate(sorted(tensors))}
    for file in files:
        own = {name: tensors[name] for name, place in places.items() if place == file}
        save_file(own, folder / file, metadata={"format": "pt"})
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def to_fp8(tensors: Tensors) -> None:
    """Codes and a scale for each row in place of the kept values."""
    for name in [name for name in tensors if name.endswith(".compressed")]:
        values = tensors[name].float()
        scale = (values.abs().amax(dim=1, keepdim=True) / 448).bfloat16()
        tensors[name] = (values / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
        tensors[name.replace(".compressed", ".weight_scale")] = scale


def to_dense(tensors: Tensors) -> None:
    """Codes at their places, and no mask."""
    for name in [name for name in tensors if name.endswith(".compressed")]:
        prefix = name.removesuffix(".compressed")
        codes, bitmask = tensors.pop(name), tensors.pop(f"{prefix}.bitmask")
        del tensors[f"{prefix}.shape"]
        bits = (bitmask.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1
        mask = bits.reshape(len(codes), -1).bool()
        dense = torch.zeros(mask.shape, dtype=torch.uint8)
        dense[mask] = codes.view(torch.uint8).flatten()
        tensors[f"{prefix}.weight"] = dense.view(torch.float8_e4m3fn)
