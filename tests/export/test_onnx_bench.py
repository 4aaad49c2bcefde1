"""`gblm bench onnx`: rows, ratios and refusals on tiny exports; how fast they are is no matter."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Outcome

pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")

from gblm.export.onnx_model.export import Wanted, export_onnx
from gblm.export.onnx_model.runtime import REPORT_FILE

Run = Callable[..., Outcome]
SMALL = ("--rounds", 2, "--prompt-len", 4, "--output-len", 2)


@pytest.fixture(scope="module")
def folders(
    tiny: Path, pack_tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> list[Path]:
    """The dense model in ONNX Runtime's own operators, and a packed one."""
    root = tmp_path_factory.mktemp("bench")
    export_onnx(tiny, root / "dense", Wanted(validate=0))
    export_onnx(pack_tiny(), root / "packed", Wanted(sparse=True, validate=0))
    return [root / "dense", root / "packed"]


def test_rows_hold_what_was_measured(gblm: Run, folders: list[Path], tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    done = gblm("bench", "onnx", *folders, *SMALL, "--output", record)
    assert done.code == 0, done
    found = json.loads(record.read_text())
    dense, packed = found["rows"]
    assert (dense["name"], packed["name"]) == ("dense", "packed")
    for row, other, folder in ((dense, "packed", folders[0]), (packed, "dense", folders[1])):
        assert row["providers"] == ["CPUExecutionProvider"]
        assert row["file_bytes"] == sum(p.stat().st_size for p in folder.glob("model.onnx*"))
        assert min(row["memory_bytes"], row["load_s"]) > 0
        for phase in ("prefill", "decode"):
            assert row[f"{phase}_ms"]["median"] > 0
            assert row[f"{phase}_speedup"][other]["median"] > 0
    there, back = packed["decode_speedup"]["dense"], dense["decode_speedup"]["packed"]
    assert there["min"] * back["max"] == pytest.approx(1)  # of the same round
    assert "2 interleaved rounds of 4 + 2 tokens" in done.out


def test_folders_of_one_name_and_of_cuda_are_refused(
    gblm: Run, folders: list[Path], tmp_path: Path
) -> None:
    done = gblm("bench", "onnx", folders[0], folders[0], *SMALL)
    assert (done.code, "different names" in done.err) == (2, True)
    moved = Path(shutil.copytree(folders[0], tmp_path / "cuda"))
    report = json.loads((moved / REPORT_FILE).read_text())
    (moved / REPORT_FILE).write_text(json.dumps(report | {"target": "cuda"}))
    done = gblm("bench", "onnx", moved, *SMALL)
    assert (done.code, "was exported for CUDA" in done.err) == (2, True)
