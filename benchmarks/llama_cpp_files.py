"""llama.cpp as a rival: GGUF files of the same model, and a score for quality.

It needs what benchmarks/rivals/llama_cpp.txt lists, built for this machine.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gblm.model.reader import Reader

HEADS = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
NORMS = ("q_norm", "k_norm")


def make_gguf(model: Path, kind: str, target: Path) -> Path:
    """Write a dense LLaMA or OLMoE as GGUF, all matrices of one kind, as "Q8_0"; no vocabulary.

    In LLaMA llama.cpp rotates neighbours where transformers rotates halves: rows of q and k change
    places. Routers stay as they are, as llama.cpp's own files have them. ik_llama.cpp knows no
    OLMoE: its file is a Qwen3-MoE, which normalises q and k head by head, for speed alone.
    """
    import gguf
    from transformers import AutoConfig

    from gblm.model.folder import ModelFolder
    from gblm.model.reader import Reader

    config = json.loads((model / "config.json").read_text())
    kinds = gguf.MODEL_ARCH
    arch = {"llama": kinds.LLAMA, "olmoe": kinds.QWEN3MOE}[config["model_type"]]
    writer = gguf.GGUFWriter(target, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(AutoConfig.from_pretrained(model).rope_parameters["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    if num_experts := config.get("num_experts"):
        writer.add_expert_count(num_experts)
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["intermediate_size"])
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    with Reader(ModelFolder.open(model)) as reader:
        for name, tensor in _matrices(reader, num_experts or 0):
            part = name.split(".")[-2]
            if arch == kinds.LLAMA and part in HEADS:
                tensor = neighbours(tensor, config[HEADS[part]])
            if part in NORMS:
                tensor = tensor[:head_dim]
            plain = tensor.ndim == 1 or part == "gate"
            quantised = gguf.GGMLQuantizationType["F32" if plain else kind]
            data = gguf.quants.quantize(tensor, quantised)
            writer.add_tensor(names.get_name(name, [".weight"]), data, raw_dtype=quantised)
            reader.release()
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def _matrices(reader: Reader, num_experts: int) -> Iterator[tuple[str, Any]]:
    """Yield names and float32 arrays; a linear's experts are one array [experts, out, in]."""
    import numpy as np

    for name in reader.headers:
        first, found, last = name.partition(".experts.0.")
        if found:
            every = [f"{first}.experts.{expert}.{last}" for expert in range(num_experts)]
            yield f"{first}.experts.{last}", np.stack([_array(reader, each) for each in every])
        elif ".experts." not in name:
            yield name, _array(reader, name)


def _array(reader: Reader, name: str) -> Any:
    import torch

    return reader.tensor(name).to(torch.float32).numpy()


def neighbours(weight: Any, heads: int) -> Any:
    """Rows of q or k [heads × 2 × half, in] so that each pair that is rotated lies together."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def importance(model: Path, windows: Any) -> dict[str, Any]:
    """Give squares [in] of the inputs of each linear, summed, by GGUF's name of its weight.

    Args:
        model: a dense LLaMA folder.
        windows: token ids [num_windows, seq_len] int64.
    """
    import gguf
    import torch
    from transformers import AutoModelForCausalLM

    from gblm.calibrate.stats import ActNorm
    from gblm.calibrate.walk import before_each_linear

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, loaded.config.num_hidden_layers)
    norms: dict[str, ActNorm] = {}

    def see(name: str, inputs: torch.Tensor) -> None:
        norms.setdefault(name, ActNorm()).update(inputs, 1)

    with torch.inference_mode(), before_each_linear(loaded.model.layers, see):
        for window in windows:
            loaded.model(window[None])
    return {
        names.get_name(f"model.layers.{name}.weight", [".weight"]): norm.mean.numpy()
        for name, norm in norms.items()
    }


def quantise(source: Path, kind: str, target: Path, squares: Mapping[str, Any]) -> Path:
    """Quantise a GGUF file as llama.cpp's own tool does, with an importance matrix.

    Args:
        source: a file of floats.
        kind: a file type of llama.cpp, such as "Q4_K_M", which mixes types.
        target: to make.
        squares: what `importance` gives; llama.cpp minds their ratios alone.
    """
    import ctypes

    import llama_cpp

    entries = (llama_cpp.llama_model_imatrix_data * (len(squares) + 1))()
    for entry, (name, own) in zip(entries, squares.items(), strict=False):
        entry.name, entry.size = name.encode(), own.size
        entry.data = own.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    how = llama_cpp.llama_model_quantize_default_params()
    how.ftype, how.imatrix = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}"), entries
    names = (str(path).encode() for path in (source, target))
    if llama_cpp.llama_model_quantize(*names, ctypes.byref(how)):
        raise RuntimeError(f"llama.cpp could not make {kind} of {source}.")
    return target


def mean_loss(path: Path, windows: list[list[int]], threads: int = 1) -> float:
    """Give the mean cross-entropy of windows of token ids, in nats a token."""
    import llama_cpp
    import numpy as np

    llm = llama_cpp.Llama(
        str(path), n_ctx=len(windows[0]), n_batch=512, n_threads=threads, n_threads_batch=threads,
        logits_all=True, verbose=False,
    )  # fmt: skip
    losses = []
    for window in windows:
        llm.reset()
        llm.eval(window)
        logits = np.asarray(llm.scores[: len(window) - 1], dtype=np.float64)
        top = logits.max(axis=1, keepdims=True)
        total = top[:, 0] + np.log(np.exp(logits - top).sum(axis=1))
        losses.append(float((total - logits[np.arange(len(logits)), window[1:]]).mean()))
    return sum(losses) / len(losses)
