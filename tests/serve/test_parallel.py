"""Several workers of vLLM: tensor and pipeline parallel, Ray; packed models against dense ones."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from conftest import save_tiny_model
from test_families import save_family
from vllm_modes import EAGER, PIPELINE, engine, tensor_parallel
from vllm_run import answers, farthest, is_same, skip_without

from gblm.export.dense import export_dense
from gblm.model.folder import ModelFolder
from gblm.prune import prune
from gblm.recipe import Recipe

pytestmark = pytest.mark.vllm
# Bound to a core, a worker would wait for whatever else runs there.
BIND = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
# Pattern, values, how many heads hold keys and values, for two ranks to split or both to hold; and
# whether q/k/v and gate/up are fused on disk.
CASES = (("2:4", "int4:32", 2, False), ("0.5", "float", 1, False), ("0.5", "int8:32", 1, True))
BOUNDS = {"float": 0.1, "int4:32": 0.3, "int8:32": 0.3}


def pack(root: Path, pattern: str, values: str, kv_heads: int = 2, fused: bool = False) -> Path:
    """A packed model, and its dense self beside it."""
    if fused:
        save_family("phi3 (fused)", root / "model", head_dim=32, num_key_value_heads=kv_heads)
    else:
        save_tiny_model(root / "model", num_key_value_heads=kv_heads)
    recipe = Recipe(model=str(root / "model"), method="magnitude", pattern=pattern, values=values,
                    calibration=None)  # fmt: skip
    prune(recipe, root / "packed")
    export_dense(ModelFolder.open(root / "packed"), root / "dense")
    return root / "packed"


# One test, for each start of several ranks costs the import of vLLM for each.
def test_two_tensor_parallel_ranks_answer_as_those_of_the_dense_model(tmp_path: Path) -> None:
    mode = tensor_parallel(2)
    engines = []
    for number, case in enumerate(CASES):
        packed = pack(tmp_path / str(number), *case)
        engines += [engine(mode, packed.parent / "dense")]
        engines += [engine(mode, packed, backend) for backend in ("dense", "cpu")]
    engines += [engine(mode, cut_groups(tmp_path / "cut"))]
    rows, log = answers(engines, 2)
    assert len(rows) == 3 * len(CASES), log
    assert "model.layers.0.mlp.down_proj: 96 columns do not divide into groups of 64" in log
    assert "192 columns were split over 2 tensor-parallel ranks; sizes that work: 1, 3." in log
    for number, (_, values, *_) in enumerate(CASES):
        want, expanded, kernel = rows[3 * number : 3 * number + 3]
        assert is_same(expanded, want)
        skip_without("cpu")
        assert farthest(kernel, want) < BOUNDS[values]
    assert log.count("8 linears run on backend cpu (packed in memory)") == len(CASES)


def cut_groups(root: Path) -> Path:
    """A packed model with groups that two ranks would cut."""
    save_tiny_model(root / "model", intermediate_size=192)
    recipe = Recipe(model=str(root / "model"), method="magnitude", pattern="2:4",
                    values="int8:64", calibration=None)  # fmt: skip
    prune(recipe, root / "packed")
    return root / "packed"


def test_two_pipeline_stages_answer_as_those_of_the_dense_model(tmp_path: Path) -> None:
    packed = pack(tmp_path, "0.5", "float")
    # Traced, but not compiled: see PIPELINE.
    mode = {"settings": PIPELINE | {"compilation_config": {"mode": 2, "backend": "eager"}}}
    engines = [engine(mode, tmp_path / "dense"), engine(mode, packed, "dense")]
    (want, got), log = answers(engines, **BIND)
    assert is_same(got, want), log
    # One of the two layers on each stage.
    assert log.count("4 linears run on backend dense (expanded at load)") == 2


def test_ray_is_refused_by_vllm_for_cpu_whatever_the_model(tmp_path: Path) -> None:
    if importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed")
    save_tiny_model(tmp_path / "model")
    settings = EAGER | {"tensor_parallel_size": 2, "distributed_executor_backend": "ray"}
    rows, log = answers([engine({"settings": settings}, tmp_path / "model")])
    assert not rows
    assert "current platform cpu does not support ray" in log
