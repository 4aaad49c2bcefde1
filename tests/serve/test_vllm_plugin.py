"""The plugin in vLLM on CPU: tokens of packed models against their dense-with-zeros selves.

Of both patterns with every kind of values: test_family_roads.py; in vLLM's modes: test_modes.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Pack
from damage import config, damaged, tensors
from legacy_cases import FIXTURES, PUBLISHED, published
from vllm_run import Question, ask, engine, farthest, is_same

from gblm.errors import UsageError
from gblm.export.dense import export_dense
from gblm.model.folder import ModelFolder
from gblm.prune import prune
from gblm.recipe import Recipe
from gblm.serve.cached import folder_to_serve

pytestmark = pytest.mark.vllm


def test_packed_models_answer_as_their_dense_selves(
    tiny: Path, pack_tiny: Pack, tmp_path: Path, best_backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Expanded with the same tokens and log-probs; packed in memory but for rounding."""
    monkeypatch.setenv("GBLM_CACHE", str(tmp_path / "cache"))
    # q/k/v and gate/up are fused in vLLM: four linears in each of the two layers.
    floats, rows = pack_tiny(), pack_tiny(pattern="dense", values="int4:row")
    codes = pack_tiny("wanda", "0.5", "int8", "int8")
    both = (best_backend, "reference")
    ask(
        unfit(tiny, pack_tiny, tmp_path),
        expanded_and_packed(floats, tmp_path / "floats", {None: best_backend}, 8),
        expanded_and_packed(rows, tmp_path / "rows", {best_backend: best_backend}, 8),
        expanded_and_packed(codes, tmp_path / "codes", {b: b for b in both}, 9),
        wide([floats, codes], pack_tiny(tied=False)),
        partly_dense(tiny, tmp_path / "partly"),
        *(converted(folder, tmp_path) for folder in old_folders(tmp_path / "old")),
    )


def expanded_and_packed(
    folder: Path, dense: Path, backends: dict[str | None, str], linears: int
) -> Question:
    """Backends that are asked for, or none, and those that gblm takes."""
    export_dense(ModelFolder.open(folder), dense)
    kernels = [engine(folder, asked) for asked in backends]
    want, expanded, *packed = yield [engine(dense), engine(folder, "dense"), *kernels]
    assert is_same(expanded, want)
    assert f"{linears} linears run on backend dense (expanded at load)" in expanded.log
    for answer, taken in zip(packed, backends.values(), strict=True):
        assert f"{linears} linears run on backend {taken} (packed in memory)" in answer.log
        # cpu rounds activations to int8 where it meets codes.
        is_exact = "int" not in folder.name or taken == "reference"
        assert farthest(answer, want) < (0.1 if is_exact else 0.3)


def wide(folders: list[Path], untied: Path) -> Question:
    """Linears in float32, and logits in float32."""
    engines = [engine(folder, dtype="float32") for folder in folders]
    found = yield [*engines, engine(untied, hf_overrides={"head_dtype": "float32"})]
    assert all(answer.rows for answer in found), [answer.log for answer in found]


def partly_dense(tiny: Path, folder: Path) -> Question:
    prune_tiny(tiny, folder / "packed", ignore=("down_proj",))
    export_dense(ModelFolder.open(folder / "packed"), folder / "dense")
    want, got = yield [engine(folder / "dense"), engine(folder / "packed", "dense")]
    assert is_same(got, want)
    assert "6 linears run on backend dense" in got.log


def old_folders(root: Path) -> list[Path]:
    """Folders of compressed-tensors; of two that become alike but for their codes the older one."""
    names = [name for name in PUBLISHED if name != "2of4-FP8-dynamic"]
    return [FIXTURES / "served/bitmask-0.8", *(published(name, root / name) for name in names)]


def converted(old: Path, root: Path) -> Question:
    folder, dense = folder_to_serve(old), root / f"{old.name}-dense"
    export_dense(ModelFolder.open(folder), dense)
    short = {"max_model_len": 64, "skip_tokenizer_init": True}
    want, got = yield [engine(dense, **short), engine(folder, "dense", **short)]
    assert is_same(got, want), old


def prune_tiny(source: Path, output: Path, **fields: object) -> None:
    prune(Recipe(model=str(source), method="magnitude", calibration=None, **fields), output)


# Every part of every format: test_complete.py, without an engine.
def unfit(tiny: Path, pack_tiny: Pack, tmp_path: Path) -> Question:
    """What cannot be served is refused in one sentence, and the next engine starts."""
    prune_tiny(tiny, tmp_path / "half", ignore=("k_proj",))
    names = [f"model.layers.1.self_attn.k_proj.{p}" for p in ("values", "bitmask", "row_offsets")]
    incomplete = damaged(
        pack_tiny("wanda", "0.5"), tmp_path / "incomplete",
        tensors(lambda weights: [weights.pop(name) for name in names]),
    )  # fmt: skip
    tied = damaged(
        pack_tiny(head="int8"), tmp_path / "tied",
        config(lambda found: found.update(tie_word_embeddings=True)),
    )  # fmt: skip
    sentences = {
        tmp_path / "half": "vLLM fuses q_proj, k_proj, v_proj, but they are stored in different",
        incomplete: "model.layers.1.self_attn.qkv_proj",
        tied: "lm_head: packed, but config.json ties it to the embeddings",
    }
    refused = yield [engine(folder) for folder in sentences]
    for answer, sentence in zip(refused, sentences.values(), strict=True):
        assert not answer.rows
        assert sentence in answer.log


def test_a_dense_model_cannot_be_called_packed() -> None:
    from gblm.serve.vllm_plugin.config import SparseConfig

    with pytest.raises(UsageError, match=r"this model is not packed.*--pack"):
        SparseConfig()
