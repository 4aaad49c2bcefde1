"""The modes of vLLM that need one process: packed models against their dense-with-zeros selves.

Compiled engines: test_vllm_plugin.py.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Pack
from safetensors.torch import save_file
from vllm_run import Answer, answers, engine, farthest, is_same, skip_without

from gblm.export.dense import export_dense
from gblm.model.folder import ModelFolder

pytestmark = pytest.mark.vllm
RANK, ALPHA = 8, 8
SPECULATION = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3,
               "prompt_lookup_min": 1}  # fmt: skip
# Pattern, values, how far cpu may be off, what is asked, and the settings. cpu rounds activations
# to int8 where it meets codes, and the dense model itself rounds otherwise where vLLM finds AMX
# (0.35 in the first case). vLLM cannot start another engine after the last one.
CASES: dict[str, tuple[str, str, float, tuple[str, ...], dict[str, Any]]] = {
    "chunked prefill": (
        "2:4", "int4", 0.5, ("first", "again", "prompts", "awake"),
        {"max_num_batched_tokens": 16, "max_num_seqs": 8},
    ),
    "LoRA": (
        "2:4", "float", 0.1, ("first", "again", "without"),
        {"enable_lora": True, "max_lora_rank": RANK},
    ),
    "n-gram speculation": (
        "0.5", "float", 0.1, ("first", "again", "prompts"), {"speculative_config": SPECULATION},
    ),
}  # fmt: skip


def is_in_force(mode: str, answer: Answer) -> bool:
    """Whether a mode did what it is there for."""
    if mode == "LoRA" and answer.rows["first"] == answer.rows["without"]:
        return False
    if mode == "n-gram speculation":
        return answer.counters["vllm:spec_decode_num_accepted_tokens"] > 0
    return answer.counters["vllm:prefix_cache_hits"] > 0


def write_adapter(model: Path, folder: Path) -> None:
    """A random adapter of all linears of a LLaMA, in the files of peft."""
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


# One test, for pytest-xdist would let each of its workers start the engines of a fixture.
def test_answers_in_every_mode_are_those_of_the_dense_model(
    pack_tiny: Pack, tmp_path: Path
) -> None:
    places = {mode: tmp_path / str(number) for number, mode in enumerate(CASES)}
    for mode, (pattern, values, *_) in CASES.items():
        packed = shutil.copytree(pack_tiny("wanda", pattern, values), places[mode] / "packed")
        export_dense(ModelFolder.open(Path(packed)), places[mode] / "dense")
        write_adapter(Path(packed), places[mode] / "adapter")
    want = serve(places, "dense", None)
    got = serve(places, "packed", "dense")
    for mode in CASES:
        assert is_in_force(mode, want[mode]), mode
        assert is_in_force(mode, got[mode]), mode
        assert is_same(got[mode], want[mode]), mode
        assert "8 linears run on backend dense (expanded at load)" in got[mode].log
    skip_without("cpu")
    got = serve(places, "packed", "cpu")
    for mode, (_, _, bound, *_) in CASES.items():
        assert is_in_force(mode, got[mode]), mode
        assert farthest(got[mode], want[mode]) < bound, mode
        assert "8 linears run on backend cpu (packed in memory)" in got[mode].log


def serve(places: dict[str, Path], kind: str, backend: str | None) -> dict[str, Answer]:
    """What one backend answers in each mode."""
    engines = []
    for mode, (*_, asks, settings) in CASES.items():
        engines.append(engine(places[mode] / kind, backend, asks, **settings))
        if mode == "LoRA":
            engines[-1]["adapter"] = str(places[mode] / "adapter")
    found = dict(zip(CASES, answers(engines), strict=True))
    chunked = found["chunked prefill"]
    # Prefixes come from the cache the second time; asleep or not, vLLM's CPU worker serves on.
    assert chunked.rows["again"] == chunked.rows["first"] == chunked.rows["awake"]
    assert "sleep mode is not supported on CPU" in chunked.log
    return found


def test_compiled_graphs_of_two_backends_have_two_keys(
    pack_tiny: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.engine.arg_utils import EngineArgs

    monkeypatch.setattr("os.environ", os.environ.copy())  # vLLM writes to it
    keys = []
    for backend in ("dense", "cpu", "cpu"):
        monkeypatch.setenv("GBLM_BACKEND", backend)
        keys.append(EngineArgs(str(pack_tiny())).create_engine_config().compute_hash())
    assert keys[0] != keys[1] == keys[2]
