"""vLLM's own int8 and int4 as rivals: folders of compressed-tensors made of a dense LLaMA model.

W8A8 has int8 weights with a scale per row, activations rounded per token; W4A16 int4 weights with a
scale per group. Both round to the nearest; embeddings and head stay as they are.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

KINDS = ("W8A8", "W4A16")
GROUP = 64  # divides the columns of SmolLM2 and of the 1.1B shape
BITS = {"W8A8": 8.0, "W4A16": 4 + 16 / GROUP}  # per weight; W8A8 has one scale per row


def make_folder(model: Path, kind: str, target: Path) -> Path:
    """Write a model that vLLM serves with its own integer kernels.

    Args:
        model: a dense HF folder.
        kind: "W8A8" or "W4A16".
        target: to make.
    """
    from safetensors.torch import save_file

    from gblm.model.folder import ModelFolder
    from gblm.model.reader import Reader

    target.mkdir(parents=True)
    for path in model.iterdir():
        if path.is_file() and "safetensors" not in path.name:
            shutil.copy(path, target)
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = quantization(kind)
    (target / "config.json").write_text(json.dumps(config, indent=2))
    tensors: dict[str, Tensor] = {}
    with Reader(ModelFolder.open(model)) as reader:
        for name in reader.headers:
            tensor = reader.tensor(name).clone()
            if name.endswith("_proj.weight"):
                tensors |= rounded(name.removesuffix(".weight"), tensor, kind)
            else:
                tensors[name] = tensor
            reader.release()
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def rounded(stem: str, weight: Tensor, kind: str) -> dict[str, Tensor]:
    """The tensors of one linear [out, in], as compressed-tensors names and stores them."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    limit, group = (127, weight.shape[1]) if kind == "W8A8" else (7, GROUP)
    grouped = weight.float().unflatten(1, (-1, group))
    scales = grouped.abs().amax(-1, keepdim=True).clamp(min=1e-8) / limit
    scales = scales.to(weight.dtype)
    codes = (grouped / scales.float()).round().clamp(-limit - 1, limit).flatten(1).to(torch.int8)
    found = {f"{stem}.weight_scale": scales.squeeze(-1)}
    if kind == "W8A8":
        return found | {f"{stem}.weight": codes}
    return found | {
        f"{stem}.weight_packed": pack_to_int32(codes, 4),
        f"{stem}.weight_shape": torch.tensor(weight.shape),
    }


def quantization(kind: str) -> dict[str, Any]:
    """The `quantization_config` of a kind."""
    weights: dict[str, Any] = {"type": "int", "symmetric": True, "dynamic": False}
    group: dict[str, Any] = {"targets": ["Linear"], "weights": weights}
    if kind == "W8A8":
        weights |= {"num_bits": 8, "strategy": "channel"}
        group["input_activations"] = {
            "num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True,
        }  # fmt: skip
    else:
        weights |= {"num_bits": 4, "strategy": "group", "group_size": GROUP}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized" if kind == "W8A8" else "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }
