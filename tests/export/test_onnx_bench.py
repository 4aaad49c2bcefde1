"""Exported folders, and a loop in transformers, as sides of `gblm bench`, however fast they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import Run

pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai: make dev installs it")

from gblm.export.onnx.export import Wanted, export_onnx
from gblm.record import Record

SMALL = ("--rounds", 1, "--num-prompts", 2, "--prompt-len", 4, "--output-len", 2, "--threads", 1,
         "--allow-noise")  # fmt: skip


@pytest.mark.slow
def test_exported_folders_and_a_loop_are_measured_alike(
    gblm: Run, exported: Path, tiny: Path, tmp_path: Path
) -> None:
    """The dense model in ONNX Runtime's own operators, and a packed one."""
    folders = {"dense": tmp_path / "dense", "packed": exported, "loop": tiny}
    export_onnx(tiny, folders["dense"], Wanted(validate=0))
    sides = ("dense", f"packed={exported}", f"loop=transformers:{tiny}")
    done = gblm("bench", *sides, *SMALL, "--output", "record.json")
    assert done.code == 0, done
    found = Record.read(tmp_path / "record.json")
    assert found.verdict.valid
    for side, folder in folders.items():
        weights = folder.glob("*.safetensors" if side == "loop" else "model.onnx*")
        assert found.sides[side]["bytes"] == sum(path.stat().st_size for path in weights)
        assert found.sides[side]["engine"] == ("transformers" if side == "loop" else "onnx")
        known = {row.metric: row.value for row in found.rows if row.side == side}
        assert 0 < known["ttft_ms_p50"] <= known["e2e_ms_p50"] <= known["e2e_ms_p99"]
        assert min(known["tpot_ms_p50"], known["memory_mb"], known["load_s"]) > 0
        assert known["cpu_ms_per_token"] > 0
    assert found.ratio("packed", found.loads[0], "decode_tok_s") is not None


@pytest.mark.slow
def test_a_folder_for_cuda_is_refused(gblm: Run, exported: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(exported, tmp_path / "cuda"))
    config = json.loads((moved / "genai_config.json").read_text())
    config["model"]["decoder"]["session_options"]["provider_options"] = [{"cuda": {}}]
    (moved / "genai_config.json").write_text(json.dumps(config))
    done = gblm("bench", moved, *SMALL)
    assert (done.code, "was exported for CUDA" in done.err) == (3, True)
