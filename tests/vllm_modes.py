"""The ways to run vLLM, as settings of engines.py; and the models and adapters to run in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vllm_run import Answer

Mode = dict[str, Any]
# Blocks of the KV cache so small that the prompts share one; and few of them, for vLLM fills them.
# In production vLLM is told to keep account of what it loads (gblm.serve.launch); so it is here.
COMMON = {
    "block_size": 32,
    "kv_cache_memory_bytes": 1 << 27,
    "model_loader_extra_config": {"enable_weights_track": True},
}
EAGER = {"enforce_eager": True, **COMMON}
ONE = EAGER | {"distributed_executor_backend": "uni"}
SPECULATION = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3,
               "prompt_lookup_min": 1}  # fmt: skip
RANK, ALPHA = 8, 8
# The last one must be the last engine of its process: vLLM cannot start another one after it.
MODES: dict[str, Mode] = {
    "eager, prefix caching": {"settings": ONE, "sleep": True},
    "chunked prefill": {
        "settings": ONE | {"max_num_batched_tokens": 16, "max_num_seqs": 8},
        "sleep": True,
    },
    "LoRA": {"settings": ONE | {"enable_lora": True, "max_lora_rank": RANK}, "adapter": True},
    "torch.compile": {"settings": COMMON | {"distributed_executor_backend": "uni"}},
    "n-gram speculation": {"settings": ONE | {"speculative_config": SPECULATION}},
}
# Warming up is what makes the buffers between pipeline stages, and vLLM's CPU worker leaves it out
# of eager engines.
PIPELINE = COMMON | {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"}


def tensor_parallel(ranks: int) -> Mode:
    """Over so many processes."""
    return {"settings": EAGER | {"tensor_parallel_size": ranks}}


def engine(mode: Mode, folder: Path, backend: str | None = None) -> dict[str, Any]:
    """One engine for engines.py; an adapter lies beside the model."""
    made = {"folder": str(folder), "backend": backend, **mode}
    if mode.get("adapter"):
        made["adapter"] = str(folder.parent / "adapter")
    return made


def is_in_force(name: str, answer: Answer) -> bool:
    """Whether a mode did what it is there for."""
    if "without" in answer and answer["first"] == answer["without"]:
        return False
    if name == "n-gram speculation":
        return answer["counters"]["vllm:spec_decode_num_accepted_tokens"] > 0
    return answer["counters"]["vllm:prefix_cache_hits"] > 0


def write_adapter(model: Path, folder: Path) -> Path:
    """A random adapter of all linears of a LLaMA, in the files of peft."""
    import torch
    from safetensors.torch import save_file

    config = json.loads((model / "config.json").read_text())
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    heads, shared = (config["head_dim"] * config[key]
                     for key in ("num_attention_heads", "num_key_value_heads"))  # fmt: skip
    shapes = {
        "self_attn.q_proj": (heads, hidden), "self_attn.k_proj": (shared, hidden),
        "self_attn.v_proj": (shared, hidden), "self_attn.o_proj": (hidden, heads),
        "mlp.gate_proj": (wide, hidden), "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
    }  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for number in range(config["num_hidden_layers"]):
        for name, (rows, columns) in shapes.items():
            prefix = f"base_model.model.model.layers.{number}.{name}"
            for part, shape in (("lora_A", (RANK, columns)), ("lora_B", (rows, RANK))):
                drawn = torch.randn(shape, generator=generator) * 0.2
                tensors[f"{prefix}.{part}.weight"] = drawn.bfloat16()
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA,
        "bias": "none", "target_modules": [name.partition(".")[2] for name in shapes],
    }))  # fmt: skip
    return folder
