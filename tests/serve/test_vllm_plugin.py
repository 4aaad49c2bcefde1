"""The plugin in vLLM on CPU: tokens of packed models against their dense-with-zeros selves.

Few tests with many engines: most of what a start of vLLM costs are its imports.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Pack
from damage import config, damaged, tensors
from legacy_cases import FIXTURES, PUBLISHED, published
from vllm_run import answers, engine, farthest, is_same, skip_without

from gblm.errors import UsageError
from gblm.export.dense import export_dense
from gblm.model.folder import ModelFolder
from gblm.prune import prune
from gblm.recipe import Recipe
from gblm.serve.cached import folder_to_serve

pytestmark = pytest.mark.vllm
# Values of the linears and the head, tied or not. q/k/v and gate/up are fused in vLLM: four linears
# in each of the two layers, and the head where it is packed.
EAGER = [
    ("2:4", "float", "float", True, 8),
    ("0.5", "float", "float", True, 8),
    ("2:4", "int8", "float", True, 8),
    ("0.5", "int4", "float", True, 8),
    ("dense", "int4:row", "float", True, 8),
    ("2:4", "float", "int8", True, 9),
]
COMPILED = [("2:4", "float", "int4", False, 9)]


@pytest.mark.parametrize("cases", [EAGER, COMPILED], ids=["eager", "compiled"])
def test_packed_models_answer_as_their_dense_selves(
    pack_tiny: Pack, tmp_path: Path, best_backend: str, cases: list[tuple]
) -> None:
    """Expanded with the same tokens and log-probs; packed in memory but for rounding."""
    engines = []
    for number, (pattern, values, head, tied, _) in enumerate(cases):
        folder, dense = pack_tiny("wanda", pattern, values, head, tied), tmp_path / str(number)
        export_dense(ModelFolder.open(folder), dense)
        for one, backend in ((dense, None), (folder, "dense"), (folder, best_backend)):
            engines.append(engine(one, backend, enforce_eager=cases is EAGER))
    found = answers(engines)
    for number, (_, values, head, _, linears) in enumerate(cases):
        want, expanded, kernel = found[3 * number : 3 * number + 3]
        assert is_same(expanded, want), cases[number]
        assert f"{linears} linears run on backend dense (expanded at load)" in expanded.log
        said = f"{linears} linears run on backend {best_backend} (packed in memory)"
        assert said in kernel.log
        # cpu rounds activations to int8 where it meets codes.
        bound = 0.1 if values == head == "float" or best_backend == "reference" else 0.3
        assert farthest(kernel, want) < bound, cases[number]


def test_other_backends_dtypes_and_heads(pack_tiny: Pack, best_backend: str) -> None:
    """The slow reference; the choice without a name; logits and linears in float32; float heads."""
    floats, codes = pack_tiny(), pack_tiny("wanda", "0.5", "int8", "int8")
    untied = pack_tiny(tied=False)
    want, unnamed, plain, reference, *others = answers([
        engine(floats, "dense"),
        engine(floats),
        engine(codes, "dense"),
        engine(codes, "reference"),
        engine(floats, dtype="float32"),
        engine(codes, dtype="float32"),
        engine(untied, hf_overrides={"head_dtype": "float32"}),
        engine(untied, "dense"),
        engine(untied, "cpu"),
    ])  # fmt: skip
    assert farthest(unnamed, want) < 0.1
    assert f"8 linears run on backend {best_backend} (packed in memory)" in unnamed.log
    assert farthest(reference, plain) < 0.1
    assert "9 linears run on backend reference (packed in memory)" in reference.log
    *wide, dense, kernel = others
    assert all(answer.rows for answer in wide), [answer.log for answer in wide]
    skip_without("cpu")
    assert farthest(kernel, dense) < 0.1
    assert "8 linears run on backend cpu" in kernel.log


def test_folders_with_other_linears_are_served_as_the_dense_model(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Partly dense, or converted from compressed-tensors."""
    prune_tiny(tiny, tmp_path / "partly", ignore=("down_proj",))
    monkeypatch.setenv("GBLM_CACHE", str(tmp_path / "cache"))
    old = [FIXTURES / "served" / name for name in ("24-int8-group", "bitmask-0.8")]
    old += [published(name, tmp_path / name) for name in PUBLISHED]
    fixtures = list(map(folder_to_serve, old))
    folders = [tmp_path / "partly", *fixtures]
    engines = []
    for number, folder in enumerate(folders):
        export_dense(ModelFolder.open(folder), tmp_path / str(number))
        short = {"max_model_len": 64, "skip_tokenizer_init": True} if folder in fixtures else {}
        engines += [engine(tmp_path / str(number), **short), engine(folder, "dense", **short)]
    found = answers(engines)
    for number in range(len(folders)):
        want, expanded = found[2 * number : 2 * number + 2]
        assert is_same(expanded, want), folders[number]
    assert "6 linears run on backend dense" in found[1].log


def prune_tiny(source: Path, output: Path, **fields: object) -> None:
    prune(Recipe(model=str(source), method="magnitude", calibration=None, **fields), output)


# Every part of every format: test_complete.py, without an engine.
def test_what_cannot_be_served_is_refused_in_one_sentence(
    tiny: Path, pack_tiny: Pack, tmp_path: Path
) -> None:
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
    *refused, served = answers([*map(engine, sentences), engine(pack_tiny())])
    for answer, sentence in zip(refused, sentences.values(), strict=True):
        assert not answer.rows
        assert sentence in answer.log
    assert served.rows, served.log


@pytest.mark.real
def test_smollm2_expanded_equals_its_dense_self(smollm2: Path, tmp_path: Path) -> None:
    prune_tiny(smollm2, tmp_path / "out", pattern="0.5")
    export_dense(ModelFolder.open(tmp_path / "out"), tmp_path / "dense")
    got, want = answers([engine(tmp_path / "out", "dense"), engine(tmp_path / "dense")])
    assert is_same(got, want)


def test_a_dense_model_cannot_be_called_packed() -> None:
    from gblm.serve.vllm_plugin.config import SparseConfig

    with pytest.raises(UsageError, match=r"this model is not packed.*--pack"):
        SparseConfig()


def test_plugin_registers_once_and_cheaply() -> None:
    code = (
        "import gblm.serve.vllm_plugin as p; import sys; assert 'torch' not in sys.modules\n"
        "p.register(); p.register()\n"
        "from vllm.model_executor.layers.quantization import get_quantization_config as g\n"
        "assert g('gblm').__name__ == 'SparseConfig'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
