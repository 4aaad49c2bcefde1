"""Exported folders as sides of `gblm bench`; how fast they are is no matter."""

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
def test_exported_folders_are_sides(gblm: Run, exported: Path, tiny: Path, tmp_path: Path) -> None:
    """The dense model in ONNX Runtime's own operators, and a packed one."""
    folders = [tmp_path / "dense", Path(shutil.copytree(exported, tmp_path / "packed"))]
    export_onnx(tiny, folders[0], Wanted(validate=0))
    done = gblm("bench", *folders, *SMALL, "--output", "record.json")
    assert done.code == 0, done
    found = Record.read(tmp_path / "record.json")
    load = found.loads[0]
    for name, folder in zip(("dense", "packed"), folders, strict=True):
        assert found.sides[name]["engine"] == "onnx"
        assert found.sides[name]["bytes"] == sum(
            p.stat().st_size for p in folder.glob("model.onnx*")
        )
        for metric in ("tpot_ms_p50", "memory_mb", "load_s", "cpu_ms_per_token"):
            assert (found.value(name, load, metric) or 0) > 0
    assert found.ratio("packed", load, "decode_tok_s") is not None


@pytest.mark.slow
def test_a_folder_for_cuda_is_refused(gblm: Run, exported: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(exported, tmp_path / "cuda"))
    config = json.loads((moved / "genai_config.json").read_text())
    config["model"]["decoder"]["session_options"]["provider_options"] = [{"cuda": {}}]
    (moved / "genai_config.json").write_text(json.dumps(config))
    done = gblm("bench", moved, *SMALL)
    assert (done.code, "was exported for CUDA" in done.err) == (3, True)
