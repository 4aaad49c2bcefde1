"""The modes of vLLM that need one process: packed models against their dense-with-zeros selves."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import Pack
from safetensors.torch import load_file, save_file
from vllm_run import Answer, Question, ask, engine, farthest, is_same

from gblm.export.dense import export_dense
from gblm.model.folder import ModelFolder

pytestmark = pytest.mark.vllm
RANK, ALPHA = 8, 8
SPECULATION = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3,
               "prompt_lookup_min": 1}  # fmt: skip


class Mode(NamedTuple):
    """Which model answers in it, how far off when packed, what it is asked, and the settings.

    cpu rounds activations to int8 where it meets codes, and the dense model itself rounds otherwise
    where vLLM finds AMX (0.35 in the first mode).
    """

    pattern: str
    values: str
    bound: float
    asks: tuple[str, ...]
    settings: dict[str, Any]
    head: str = "float"


MODES = {
    "chunked prefill": Mode(
        "2:4", "int4", 0.5, ("first", "again", "prompts", "awake"),
        {"max_num_batched_tokens": 16, "max_num_seqs": 8},
    ),
    "LoRA": Mode(
        "2:4", "float", 0.1, ("first", "again", "without"),
        {"enable_lora": True, "max_lora_rank": RANK},
    ),
    "torch.compile": Mode("2:4", "float", 0.3, ("first",), {"enforce_eager": False}, "int4"),
    "n-gram speculation": Mode(
        "0.5", "float", 0.1, ("first", "again", "prompts"), {"speculative_config": SPECULATION},
    ),
}  # fmt: skip


def is_in_force(mode: str, answer: Answer) -> bool:
    """Whether a mode did what it is there for."""
    if mode == "LoRA" and answer.rows["first"] == answer.rows["without"]:
        return False
    if mode == "torch.compile":
        return "Warming up model for the compilation" in answer.log
    if mode == "n-gram speculation":
        # As other CPUs round, the random model's answers happen to take none of the drafts.
        takes = torch.backends.cpu.get_cpu_capability() == "AVX512"
        counted = "accepted" if takes else "draft"
        return answer.counters[f"vllm:spec_decode_num_{counted}_tokens"] > 0
    return answer.counters["vllm:prefix_cache_hits"] > 0


def write_adapter(dense: Path, folder: Path) -> None:
    """A random adapter of all linears, in the files of peft."""
    generator = torch.Generator().manual_seed(1)
    tensors, names = {}, set()
    for name, weight in load_file(dense / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            continue
        linear = name.removesuffix(".weight")
        names.add(linear.rpartition(".")[2])
        for part, shape in (("lora_A", (RANK, weight.shape[1])), ("lora_B", (len(weight), RANK))):
            drawn = torch.randn(shape, generator=generator) * 0.2
            tensors[f"base_model.model.{linear}.{part}.weight"] = drawn.bfloat16()
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA,
        "bias": "none", "target_modules": sorted(names),
    }))  # fmt: skip


def test_answers_in_every_mode_are_those_of_the_dense_model(
    pack_tiny: Pack, tmp_path: Path, best_backend: str
) -> None:
    ask(*(held_to_dense(name, pack_tiny, tmp_path / name, best_backend) for name in MODES))


def held_to_dense(name: str, pack_tiny: Pack, place: Path, backend: str) -> Question:
    mode = MODES[name]
    packed = pack_tiny("wanda", mode.pattern, mode.values, mode.head, tied=mode.head == "float")
    export_dense(ModelFolder.open(packed), place / "dense")
    engines = [
        engine(folder, asked, mode.asks, **mode.settings)
        for folder, asked in ((place / "dense", None), (packed, "dense"), (packed, backend))
    ]
    if name == "LoRA":
        write_adapter(place / "dense", place / "adapter")
        engines = [one | {"adapter": str(place / "adapter")} for one in engines]
    found = yield engines
    want, expanded, kernel = found
    assert all(is_in_force(name, answer) for answer in found), name
    assert is_same(expanded, want), name
    assert farthest(kernel, want) < mode.bound, name
    linears = 8 + (mode.head != "float")
    assert f"{linears} linears run on backend dense (expanded at load)" in expanded.log
    assert f"{linears} linears run on backend {backend} (packed in memory)" in kernel.log
    for answer in found if name == "chunked prefill" else ():
        # Prefixes come from the cache the second time; asleep or not, vLLM's CPU worker serves on.
        assert answer.rows["again"] == answer.rows["first"] == answer.rows["awake"]
        assert "sleep mode is not supported on CPU" in answer.log


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
