"""The modes of vLLM that need one process: packed models against their dense-with-zeros selves.

All value types in all modes: benchmarks/modes.py.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from vllm_modes import MODES, engine, is_in_force, write_adapter
from vllm_run import Answer, answers, farthest, is_same, skip_without

from gblm.export.dense import export_dense

pytestmark = pytest.mark.vllm
Pack = Callable[..., Path]
# Pattern and values for each mode; compiled engines are those of test_vllm_plugin.py.
CASES = {
    "eager, prefix caching": ("2:4", "int4"),
    "chunked prefill": ("0.5", "float"),
    "LoRA": ("2:4", "float"),
    "n-gram speculation": ("0.5", "float"),
}
Served = dict[str | None, tuple[dict[str, Answer], str]]


@pytest.fixture(scope="module")
def served(pack_tiny: Pack, tmp_path_factory: pytest.TempPathFactory) -> Served:
    """What each backend answers in each mode, and the log; None is the dense model."""
    root = tmp_path_factory.mktemp("modes")
    folders = {}
    for number, case in enumerate(sorted(set(CASES.values()))):
        place = root / str(number)
        packed = Path(shutil.copytree(pack_tiny("wanda", *case), place / "packed"))
        export_dense(packed, place / "dense")
        write_adapter(packed, place / "adapter")
        folders[case] = place
    found: Served = {}
    for backend in (None, "dense", "cpu"):
        kind = "dense" if backend is None else "packed"
        engines = [
            engine(MODES[mode], folders[case] / kind, backend) for mode, case in CASES.items()
        ]
        rows, log = answers(engines)
        assert len(rows) == len(CASES), log
        found[backend] = dict(zip(CASES, rows, strict=True)), log
    return found


@pytest.mark.parametrize("mode", CASES)
def test_expanded_answers_equal_those_of_the_dense_model(served: Served, mode: str) -> None:
    (want, _), (got, log) = served[None], served["dense"]
    assert is_in_force(mode, want[mode])
    assert is_in_force(mode, got[mode])
    assert is_same(got[mode], want[mode]), mode
    assert log.count("8 linears run on backend dense (expanded at load)") == len(CASES)


@pytest.mark.parametrize("mode", CASES)
def test_packed_in_memory_differs_by_rounding_only(served: Served, mode: str) -> None:
    skip_without("cpu")
    (want, _), (got, log) = served[None], served["cpu"]
    assert is_in_force(mode, got[mode])
    # cpu rounds activations to int8 where it meets codes.
    bound = 0.1 if CASES[mode][1] == "float" else 0.3
    assert farthest(got[mode], want[mode]) < bound
    assert log.count("8 linears run on backend cpu (packed in memory)") == len(CASES)


def test_cached_prefixes_give_the_answers_of_the_first_time(served: Served) -> None:
    for found, _ in served.values():
        for mode in ("eager, prefix caching", "chunked prefill"):
            assert found[mode]["again"] == found[mode]["first"]


def test_sleeping_and_waking_changes_nothing_and_vllm_says_so(served: Served) -> None:
    for found, log in served.values():
        answer = found["eager, prefix caching"]
        assert answer["awake"] == answer["first"]
        assert "sleep mode is not supported on CPU" in log
