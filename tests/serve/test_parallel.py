"""Several workers of vLLM: tensor and pipeline parallel; packed models against dense ones."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import save_tiny_model
from test_families import save_family
from vllm_run import Question, ask, engine, farthest, is_same

from gblm.export.dense import export_dense
from gblm.model.folder import ModelFolder
from gblm.prune import prune
from gblm.recipe import Recipe

pytestmark = pytest.mark.vllm
TWICE = ("first", "again", "prompts")
# Pattern, values, how many heads hold keys and values, for two ranks to split or both to hold; and
# whether q/k/v and gate/up are fused on disk.
CASES = (("2:4", "int4:32", 2, False), ("0.5", "float", 1, False), ("0.5", "int8:32", 1, True),
         ("dense", "int3:32", 2, False))  # fmt: skip
BOUNDS = {"float": 0.1, "int4:32": 0.3, "int8:32": 0.3, "int3:32": 0.3}


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


def test_two_ranks_answer_as_the_dense_model(
    tmp_path: Path, mixture: Path, best_backend: str
) -> None:
    """Each of the two processes is a rank of all these engines, as under torchrun."""
    ask(
        *(
            tensor_parallel(pack(tmp_path / str(number), *case), case[1], best_backend)
            for number, case in enumerate(CASES)
        ),
        experts_on_two_ranks(tmp_path / "experts", best_backend),
        dense_experts(mixture),
        cut_groups(tmp_path / "cut"),
        two_stages(pack(tmp_path / "stages", "0.5", "float")),
        ranks=2,
    )


def tensor_parallel(packed: Path, values: str, backend: str) -> Question:
    folders = ((packed.parent / "dense", None), (packed, "dense"), (packed, backend))
    want, expanded, kernel = yield [
        engine(*folder, TWICE, tensor_parallel_size=2) for folder in folders
    ]
    assert is_same(expanded, want)
    assert farthest(kernel, want) < BOUNDS[values]
    assert f"8 linears run on backend {backend} (packed in memory)" in kernel.log


def experts_on_two_ranks(root: Path, backend: str) -> Question:
    """Each rank has a slice of every expert; on the backend cpu whole ones as well."""
    save_family("mixtral", root / "model", hidden_size=128, head_dim=32, num_experts_per_tok=4)
    recipe = Recipe(model=str(root / "model"), method="magnitude", pattern="2:4",
                    values="int8:32", calibration=None)  # fmt: skip
    prune(recipe, root / "packed")
    export_dense(ModelFolder.open(root / "packed"), root / "dense")
    ways = [(root / "dense", None, False), (root / "packed", "dense", False)]
    ways += [(root / "packed", backend, ep) for ep in (False, True)[: 1 + (backend == "cpu")]]
    want, expanded, *kernels = yield [
        engine(folder, by, TWICE, tensor_parallel_size=2, enable_expert_parallel=ep)
        for folder, by, ep in ways
    ]
    assert is_same(expanded, want)
    for kernel in kernels:
        assert farthest(kernel, want) < BOUNDS["int8:32"]
        if backend == "cpu":
            assert "linears run on backend cpu (packed in memory)" in kernel.log
            assert "on backend dense" not in kernel.log


def dense_experts(mixture: Path) -> Question:
    """Experts that are not packed are vLLM's own, which crash where ranks have whole ones."""
    way = {"tensor_parallel_size": 2, "enable_expert_parallel": True}
    (refused,) = yield [engine(mixture / "packed", **way)]
    assert not refused.rows
    assert "leave --enable-expert-parallel out" in refused.log


def cut_groups(root: Path) -> Question:
    """A packed model with groups that two ranks would cut is refused."""
    save_tiny_model(root / "model", intermediate_size=192)
    recipe = Recipe(model=str(root / "model"), method="magnitude", pattern="2:4",
                    values="int8:64", calibration=None)  # fmt: skip
    prune(recipe, root / "packed")
    (refused,) = yield [engine(root / "packed", tensor_parallel_size=2)]
    assert not refused.rows
    assert "down_proj: 96 columns do not divide into groups of 64" in refused.log
    assert "192 columns were split over 2 tensor-parallel ranks; sizes that work: 1, 3." in (
        refused.log
    )


def two_stages(packed: Path) -> Question:
    """One of the two layers on each stage; the first one has no log-probs of prompts to give.

    Warming up makes the buffers between the stages, and vLLM's CPU worker leaves it out of eager
    engines: so these are traced, but not compiled.
    """
    settings = {
        "enforce_eager": False,
        "compilation_config": {"mode": 2, "backend": "eager"},
        "pipeline_parallel_size": 2,
    }
    folders = ((packed.parent / "dense", None), (packed, "dense"))
    want, got = yield [engine(*folder, ("first", "again"), **settings) for folder in folders]
    assert is_same(got, want)
    assert "4 linears run on backend dense (expanded at load)" in got.log
