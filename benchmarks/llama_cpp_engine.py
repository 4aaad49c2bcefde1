"""llama.cpp as a rival of benchmarks/decoding.py: a GGUF file of the shape, and an engine.

As a module (needs `gguf`): make_gguf. As a script: the engine, run by a Python that has
llama-cpp-python built for this machine (CMAKE_ARGS=-DGGML_NATIVE=ON); it answers one line of
standard input after the other, as the engines of decoding.py do.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

PARTS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def make_gguf(model: Path, kind: str, target: Path) -> Path:
    """Write a dense LLaMA folder as GGUF with matrices of one kind, such as "Q8_0".

    Rotary dimensions stay in their order and there is no vocabulary: good for speed alone.
    """
    import gguf
    import torch

    from gblm.checkpoint.reader import Reader

    config = json.loads((model / "config.json").read_text())
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    with Reader(model) as reader:
        for name in reader.headers:
            tensor = reader.tensor(name).to(torch.float32).numpy()
            quantised = gguf.GGMLQuantizationType[kind if tensor.ndim > 1 else "F32"]
            data = gguf.quants.quantize(tensor, quantised)
            writer.add_tensor(gguf_name(name), data, raw_dtype=quantised)
            reader.release()
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def gguf_name(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` → `blk.3.ffn_up.weight`."""
    stem = name.removesuffix(".weight")
    if stem in OUTSIDE:
        return f"{OUTSIDE[stem]}.weight"
    _, _, index, part = stem.split(".", 3)
    return f"blk.{index}.{PARTS[part]}.weight"


def serve_work(path: str, threads: int) -> None:
    """Answer lines "SEQUENCES PROMPT TOKENS"; one sequence at a time only."""
    import llama_cpp
    import numpy as np

    llm = llama_cpp.Llama(
        path, n_ctx=1024, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False
    )
    for line in sys.stdin:
        answer: dict[str, Any] = {}
        if len(line.split()) == 3:
            sequences, prompt, tokens = map(int, line.split())
            if sequences > 1:
                print("ANSWER {}", flush=True)
                continue
            llm.reset()
            began = time.perf_counter()
            llm.eval([(7 * j) % 250 for j in range(prompt)])
            rest = time.perf_counter() - began
            if tokens:
                began = time.perf_counter()
                for _ in range(tokens):
                    llm.eval([int(np.argmax(llm.scores[llm.n_tokens - 1][:250]))])
                rest = time.perf_counter() - began
            answer = {"seconds": rest, "per_second": (tokens or prompt) / rest}
        print("ANSWER " + json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve_work(sys.argv[1], int(sys.argv[2]))
