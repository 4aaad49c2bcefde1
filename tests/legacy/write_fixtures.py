"""Write the fixtures: tiny checkpoints saved by compressed-tensors itself, never by gblm.

Run it where the old library is installed, once with compressed-tensors 0.9.4 and once with 0.8.1
(beside torch and transformers); each version writes the fixtures that it is the source of:

    python tests/legacy/write_fixtures.py tests/legacy/fixtures

Every fixture is a folder of config.json and model.safetensors. The weights that the library had
before it packed them lie beside the folders: unstructured.safetensors and 2of4.safetensors; what it
unpacks quantised ones to lies beside them under the folder's name. Those in `served` have heads of
a size that vLLM serves; no truth lies beside them.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import compressed_tensors
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.config import SparsityCompressionConfig
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from compressed_tensors.quantization.lifecycle.forward import quantize
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

OLD = compressed_tensors.__version__.startswith("0.8.")
SERVED = "served"


def tiny_model(**fields: Any) -> LlamaForCausalLM:
    """One seeded decoder layer; `in` is a multiple of 32 everywhere."""
    torch.manual_seed(0)
    shape = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 24,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
        "max_position_embeddings": 64, "tie_word_embeddings": False, "initializer_range": 0.2,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**(shape | fields))).to(torch.bfloat16).eval()


def linears(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """Those of the decoder layers."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    return {name: linear for name, linear in found.items() if ".layers." in name}


@torch.no_grad()
def prune(modules: Iterable[torch.nn.Linear], two_of_four: bool) -> None:
    """By magnitude: 2 of 4, with a group that keeps less; or half of each row, unevenly."""
    for linear in modules:
        weight = linear.weight
        if two_of_four:
            groups = weight.reshape(-1, 4)
            kept = groups.abs().topk(2, dim=1).indices
            mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, kept, True)
            mask[0, :3] = False
            mask[1] = False
            mask = mask.reshape(weight.shape)
        else:
            mask = weight.abs() > 0.15
            mask[0] = False
        weight.copy_(torch.where(mask, weight, torch.zeros_like(weight)))


def save(folder: Path, model: Any, compressor: ModelCompressor) -> None:
    """As save_pretrained of the old days did: packed tensors, then the config beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    tensors = compressor.compress(model)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    compressor.update_config(str(folder))
    print(folder.name, sum(f.stat().st_size for f in folder.iterdir()), "bytes")


def sparse(folder: Path, name: str, **shape: int) -> None:
    """Floats in one of the two bitmask formats, or dense with a sparsity_config."""
    model, two_of_four = tiny_model(**shape), name != "sparse-bitmask"
    prune(linears(model).values(), two_of_four)
    truth = folder.parent / f"{'2of4' if two_of_four else 'unstructured'}.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    if folder.parent.name != SERVED:
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, truth)
    fields = {} if OLD else {"targets": ["Linear"], "ignore": ["lm_head"]}
    config = SparsityCompressionConfig.load_from_registry(
        name, global_sparsity=0.5,
        sparsity_structure="2:4" if two_of_four else "unstructured", **fields,
    )  # fmt: skip
    save(folder, model, ModelCompressor(sparsity_config=config))


@torch.no_grad()
def quantized(folder: Path, kind: str, weights: dict[str, Any], **shape: int) -> None:
    """Codes in sparse-24-bitmask, with activations to quantise beside them; and the truth."""
    model = tiny_model(**shape)
    prune(linears(model).values(), two_of_four=True)
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "symmetric": True, **weights}}
    group["input_activations"] = {
        "num_bits": 8, "type": weights["type"], "strategy": "token", "dynamic": True,
    }  # fmt: skip
    config = QuantizationConfig(config_groups={"group_0": group}, ignore=["lm_head"], format=kind)
    apply_quantization_config(model, config)
    for linear in linears(model).values():
        args = linear.quantization_scheme.weights
        rows = linear.weight.reshape(linear.out_features, -1, args.group_size or linear.in_features)
        scales, _ = calculate_qparams(rows.amin(dim=-1), rows.amax(dim=-1), args)
        linear.weight_scale.copy_(scales.reshape(linear.weight_scale.shape))
    sparse_config = SparsityCompressionConfig.load_from_registry(
        "sparse-24-bitmask", global_sparsity=0.5, targets=["Linear"], ignore=["lm_head"],
    )  # fmt: skip
    save(folder, model, ModelCompressor(sparse_config, config))
    if weights["type"] == "float" or folder.parent.name == SERVED:
        return  # the library unpacks floats on a GPU only
    fresh = tiny_model()
    ModelCompressor(sparse_config, config).decompress(str(folder), fresh)
    truth = {f"{n}.weight": m.weight.detach().clone() for n, m in linears(fresh).items()}
    save_file(truth, folder.parent / f"{folder.name}.safetensors")


@torch.no_grad()
def marlin(folder: Path, bits: int, own_scales: bool = False, **shape: int) -> None:
    """marlin-24, which the library only writes: the truth are hashes of codes and scales.

    The library's own scales give many rows a code of -2^(bits - 1), others none.
    """
    sizes = {"hidden_size": 64, "num_key_value_heads": 2, "head_dim": 32}
    model = tiny_model(**(sizes | shape))
    prune(linears(model).values(), two_of_four=True)
    way = {"num_bits": bits, "type": "int", "symmetric": True}
    groups = {
        "group_0": {"targets": ["re:.*down_proj"],
                    "weights": {**way, "strategy": "group", "group_size": 128}},
        "group_1": {"targets": ["re:.*(self_attn|gate_proj|up_proj).*"],
                    "weights": {**way, "strategy": "channel"}},
    }  # fmt: skip
    if model.config.intermediate_size % 128:
        groups["group_0"]["weights"] = groups["group_1"]["weights"]
    config = QuantizationConfig(config_groups=groups, ignore=["lm_head"], format="marlin-24")
    apply_quantization_config(model, config)
    truth = {}
    for name, linear in linears(model).items():
        args = linear.quantization_scheme.weights
        rows = linear.weight.reshape(linear.out_features, -1, args.group_size or linear.in_features)
        scales = rows.abs().amax(dim=-1) / (2 ** (bits - 1) - 1)
        if own_scales:
            scales, _ = calculate_qparams(rows.amin(dim=-1), rows.amax(dim=-1), args)
        linear.weight_scale.copy_(scales.reshape(linear.weight_scale.shape))
        half = linear.weight_scale.half()
        zeros = torch.zeros_like(linear.weight_scale)
        codes = quantize(linear.weight.half(), half, zeros, args).to(torch.int8)
        truth[name] = [digest(codes), digest(half)]
    save(folder, model, ModelCompressor(quantization_config=config))
    (folder.parent / f"{folder.name}.json").write_text(json.dumps(truth, indent=1) + "\n")


def digest(tensor: Tensor) -> str:
    """Of all bytes."""
    data = tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(data).hexdigest()


def main(root: Path) -> None:
    """Write all that this version is the source of."""
    if OLD:
        sparse(root / "bitmask-0.8", "sparse-bitmask")
        sparse(root / SERVED / "bitmask-0.8", "sparse-bitmask", head_dim=32)
        return
    sparse(root / "bitmask", "sparse-bitmask")
    sparse(root / "24-bitmask", "sparse-24-bitmask")
    sparse(root / "dense", "dense")
    channel, group = {"strategy": "channel"}, {"strategy": "group", "group_size": 32}
    quantized(root / "24-int8-channel", "int-quantized", {"type": "int", **channel})
    quantized(root / "24-int8-group", "int-quantized", {"type": "int", **group})
    quantized(root / "24-fp8", "float-quantized", {"type": "float", **channel})
    sparse(root / SERVED / "24-bitmask", "sparse-24-bitmask", head_dim=32)
    quantized(
        root / SERVED / "24-int8-group", "int-quantized", {"type": "int", **group}, head_dim=32
    )
    marlin(root / "marlin-int4", 4, intermediate_size=384)
    marlin(root / "marlin-int8", 8, intermediate_size=64)
    for bits in (4, 8):
        marlin(root / f"marlin-int{bits}-own", bits, own_scales=True, intermediate_size=64)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
