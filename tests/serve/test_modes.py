"""The modes of vLLM that need one process: packed models against their dense-with-zeros selves.

Compiled engines: test_vllm_plugin.py.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from vllm_modes import MODES, engine, is_in_force, write_adapter
from vllm_run import Answer, answers, farthest, is_same, skip_without

from gblm.export.dense import export_dense
from gblm.model.folder import ModelFolder

pytestmark = pytest.mark.vllm
Pack = Callable[..., Path]
# Pattern, values, and how far cpu may be off: it rounds activations to int8 where it meets codes,
# and the dense model itself rounds otherwise where vLLM finds AMX (0.35 in the first case).
CASES = {
    "chunked prefill": ("2:4", "int4", 0.5),
    "LoRA": ("2:4", "float", 0.1),
    "n-gram speculation": ("0.5", "float", 0.1),
}


# One test, for pytest-xdist would let each of its workers start the engines of a fixture.
def test_answers_in_every_mode_are_those_of_the_dense_model(
    pack_tiny: Pack, tmp_path: Path
) -> None:
    places = {mode: tmp_path / str(number) for number, mode in enumerate(CASES)}
    for mode, (pattern, values, _) in CASES.items():
        packed = shutil.copytree(pack_tiny("wanda", pattern, values), places[mode] / "packed")
        export_dense(ModelFolder.open(Path(packed)), places[mode] / "dense")
        write_adapter(Path(packed), places[mode] / "adapter")
    want, _ = serve(places, "dense", None)
    got, log = serve(places, "packed", "dense")
    for mode in CASES:
        assert is_in_force(mode, want[mode]), mode
        assert is_in_force(mode, got[mode]), mode
        assert is_same(got[mode], want[mode]), mode
    assert log.count("8 linears run on backend dense (expanded at load)") == len(CASES)
    skip_without("cpu")
    got, log = serve(places, "packed", "cpu")
    for mode, (_, _, bound) in CASES.items():
        assert is_in_force(mode, got[mode]), mode
        assert farthest(got[mode], want[mode]) < bound, mode
    assert log.count("8 linears run on backend cpu (packed in memory)") == len(CASES)


def serve(places: dict[str, Path], kind: str, backend: str | None) -> tuple[dict[str, Answer], str]:
    """What one backend answers in each mode, and the log."""
    rows, log = answers([engine(MODES[mode], places[mode] / kind, backend) for mode in CASES])
    assert len(rows) == len(CASES), log
    found = dict(zip(CASES, rows, strict=True))
    chunked = found["chunked prefill"]
    # Prefixes come from the cache the second time; asleep or not, vLLM's CPU worker serves on.
    assert chunked["again"] == chunked["first"] == chunked["awake"]
    assert "sleep mode is not supported on CPU" in log
    return found, log


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
