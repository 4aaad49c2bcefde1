"""Models that others made in vLLM on CPU, against the dense models that they stand for."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from legacy_cases import FIXTURES
from vllm_run import drift, generate_each

from gblm.export.dense import export_dense
from gblm.export.legacy import export_legacy
from gblm.kernels import native

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm")

TINY = {"enforce_eager": True, "max_model_len": 64, "skip_tokenizer_init": True}
PACKING = {**TINY, "quantization": "gblm"}
FLOATS, CODES, OLD = (
    FIXTURES / "served" / name for name in ("24-bitmask", "24-int8-group", "bitmask-0.8")
)
BEST = "reference" if native.refusal() else "cpu"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """The dense model that a sparse checkpoint stands for."""
    root = tmp_path_factory.mktemp("dense")
    known: dict[Path, Path] = {}

    def get(folder: Path) -> Path:
        if folder not in known:
            place = root / str(len(known))
            export_legacy(folder, place / "ours")
            export_dense(place / "ours", place / "dense")
            known[folder] = place / "dense"
        return known[folder]

    return get


@pytest.fixture(scope="module")
def beside_a_sparsity_config(
    dense: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Plain weights, and the config.json that compressed-tensors wrote beside such."""
    folder = tmp_path_factory.mktemp("dense") / "plain"
    shutil.copytree(dense(FLOATS), folder)
    text = (FIXTURES / "dense/config.json").read_text()
    (folder / "config.json").write_text(text.replace('"head_dim": 16', '"head_dim": 32'))
    return folder


def serve(jobs: dict[str, tuple[Path, str | None, dict]]) -> tuple[dict[str, list[dict]], str]:
    rows, log = generate_each(list(jobs.values()))
    assert all(rows), log
    return dict(zip(jobs, rows, strict=True)), log


def test_floats_are_served_as_the_dense_model(
    dense: Callable[[Path], Path], beside_a_sparsity_config: Path
) -> None:
    got, log = serve({
        "dense": (dense(FLOATS), None, TINY),
        "legacy expanded": (FLOATS, "dense", TINY),
        "legacy packed": (FLOATS, BEST, TINY),
        "sparsity_config packed": (beside_a_sparsity_config, BEST, TINY),
        "plain expanded": (dense(FLOATS), "dense", PACKING),
    })  # fmt: skip
    assert got["dense"] == got["legacy expanded"] == got["plain expanded"]
    assert drift(got["legacy packed"], got["dense"]) < 0.1
    # Whichever way it was packed, the parts are the same.
    assert got["sparsity_config packed"] == got["legacy packed"]
    assert log.count(f"4 linears run on backend {BEST} (packed in memory)") == 2
    assert log.count("4 linears run on backend dense (expanded at load)") == 2


def test_old_names_and_codes_are_served_as_the_dense_model(dense: Callable[[Path], Path]) -> None:
    got, _ = serve({
        "old dense": (dense(OLD), None, TINY),
        "old": (OLD, "dense", TINY),
        "codes dense": (dense(CODES), None, TINY),
        "codes": (CODES, "dense", TINY),
    })  # fmt: skip
    assert got["old"] == got["old dense"]
    assert got["codes"] == got["codes dense"]
