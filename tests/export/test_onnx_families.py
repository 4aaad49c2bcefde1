"""What docs/onnx.md says of each family is what happens; its table's rows are these tests."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from test_families import save_family

pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai: make dev installs it")

from transformers import AutoConfig

from gblm.errors import InputError
from gblm.export.onnx.config import graph_config
from gblm.export.onnx.export import Wanted, export_onnx
from gblm.model.folder import ModelFolder
from gblm.prune import prune
from gblm.recipe import Recipe

PAGE = (Path(__file__).resolve().parents[2] / "docs/onnx.md").read_text()
TABLE = PAGE.split("<!-- families: begin -->")[1].split("<!-- families: end -->")[0]
ROWS = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", TABLE, re.MULTILINE)[1:])
SCALED = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
LONG = {
    "rope_type": "longrope", "short_factor": [1.5] * 8, "long_factor": [4.0] * 8,
    "rope_theta": 1e4,
}  # fmt: skip
# Row of the table → a key of FAMILIES and what its config.json says besides.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "LLaMA 1 and 2": ("llama 1/2", {}),
    "LLaMA 3": ("llama 3", {}),
    "LLaMA, dynamic positions": (
        "llama 3", {"rope_parameters": {**SCALED, "rope_type": "dynamic"}},
    ),
    "Mistral, sliding window": ("mistral", {}),
    "Qwen2": ("qwen2", {}),
    "Qwen3": ("qwen3", {}),
    "Gemma 2": ("gemma2", {"hidden_size": 96}),  # the root has many digits
    "Gemma 3 text": (
        "gemma3 text", {"layer_types": ["sliding_attention", "full_attention"]},
    ),
    "Gemma 3 text, linear positions": (
        "gemma3 text", {"rope_parameters": {
            "full_attention": SCALED, "sliding_attention": {"rope_type": "default"}}},
    ),
    "Phi-3": ("phi3 (fused)", {"sliding_window": 16}),
    "Phi-3, longrope, before its original length": (
        "phi3 (fused)", {"rope_parameters": LONG, "original_max_position_embeddings": 256},
    ),
    "Phi-3, longrope, beyond it": (
        "phi3 (fused)", {"rope_parameters": LONG, "original_max_position_embeddings": 100},
    ),
    "SmolLM3, layers without positions": ("smollm3", {"no_rope_layers": [1, 0]}),
    "Granite": ("granite", {}),
    "Gemma 3, a vision tower": ("gemma3", {}),
    "LLaVA": ("llava", {}),
    "Mixtral": ("mixtral", {}),
    "OLMoE": ("olmoe", {}),
    "Qwen3, mixture of experts": ("qwen3 moe", {}),
}  # fmt: skip


def test_every_row_of_the_table_is_tested() -> None:
    assert list(ROWS) == list(CASES)


@pytest.mark.slow
@pytest.mark.parametrize("row", CASES)
def test_a_family_does_what_its_row_says(row: str, tmp_path: Path) -> None:
    """Packed weights in our operators, and ONNX Runtime's own int4."""
    family, changed = CASES[row]
    source, packed = save_family(family, tmp_path / "model", **changed), tmp_path / "packed"
    prune(Recipe(model=str(source), method="magnitude", pattern="2:4"), packed)
    for wanted in (Wanted(sparse=True, validate=16), Wanted(precision="int4", validate=16)):
        output = tmp_path / str(wanted.precision)
        if ROWS[row] == "passed":
            assert export_onnx(packed, output, wanted)["validation"]["passed"]
            continue
        with pytest.raises(InputError) as refused:
            export_onnx(packed, output, wanted)
        assert ROWS[row].removeprefix("refused: ") in str(refused.value)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "packed"]


def test_other_readers_find_their_rotary_bases(tmp_path: Path) -> None:
    config = graph_config(ModelFolder.open(save_family("gemma3 text", tmp_path / "model")))
    rope = config["rope_parameters"]
    assert (config["rope_theta"], rope["rope_local_base_freq"]) == (1e6, 1e4)
    again = AutoConfig.for_model(**config).rope_parameters
    assert [again[kind]["rope_theta"] for kind in ("full_attention", "sliding_attention")] == [
        1e6, 1e4,
    ]  # fmt: skip
