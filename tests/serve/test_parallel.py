"""Several workers of vLLM: tensor and pipeline parallel; packed models against dense ones."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import save_tiny_model
from test_families import save_family
from vllm_run import answers, engine, farthest, is_same, skip_without

from gblm.export.dense import export_dense
from gblm.model.folder import ModelFolder
from gblm.prune import prune
from gblm.recipe import Recipe

pytestmark = pytest.mark.vllm
# Bound to a core, a worker would wait for whatever else runs there.
BIND = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
TWICE = ("first", "again", "prompts")
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
    engines = []
    for number, case in enumerate(CASES):
        packed = pack(tmp_path / str(number), *case)
        for folder, backend in (
            (packed.parent / "dense", None),
            (packed, "dense"),
            (packed, "cpu"),
        ):
            engines.append(engine(folder, backend, TWICE, tensor_parallel_size=2))
    engines.append(engine(cut_groups(tmp_path / "cut"), tensor_parallel_size=2))
    *found, refused = answers(engines, ranks=2)
    assert not refused.rows
    assert "down_proj: 96 columns do not divide into groups of 64" in refused.log
    assert "192 columns were split over 2 tensor-parallel ranks; sizes that work: 1, 3." in (
        refused.log
    )
    for number in range(len(CASES)):
        want, expanded, _ = found[3 * number : 3 * number + 3]
        assert is_same(expanded, want)
    skip_without("cpu")
    for number, (_, values, *_) in enumerate(CASES):
        want, _, kernel = found[3 * number : 3 * number + 3]
        assert farthest(kernel, want) < BOUNDS[values]
        assert "8 linears run on backend cpu (packed in memory)" in kernel.log


def cut_groups(root: Path) -> Path:
    """A packed model with groups that two ranks would cut."""
    save_tiny_model(root / "model", intermediate_size=192)
    recipe = Recipe(model=str(root / "model"), method="magnitude", pattern="2:4",
                    values="int8:64", calibration=None)  # fmt: skip
    prune(recipe, root / "packed")
    return root / "packed"


def test_two_pipeline_stages_answer_as_those_of_the_dense_model(tmp_path: Path) -> None:
    packed = pack(tmp_path, "0.5", "float")
    # Warming up makes the buffers between the stages, and vLLM's CPU worker leaves it out of eager
    # engines: so these are traced, but not compiled.
    settings = {
        "enforce_eager": False,
        "compilation_config": {"mode": 2, "backend": "eager"},
        "pipeline_parallel_size": 2,
        "distributed_executor_backend": "mp",
    }
    folders = ((tmp_path / "dense", None), (packed, "dense"))
    want, got = answers([engine(*one, TWICE, **settings) for one in folders], **BIND)
    assert is_same(got, want)
    # One of the two layers on each stage.
    assert got.log.count("4 linears run on backend dense (expanded at load)") == 2
