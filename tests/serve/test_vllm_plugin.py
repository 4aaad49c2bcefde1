"""The plugin in vLLM on CPU: tokens of packed models against their dense-with-zeros selves."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from legacy_cases import FIXTURES
from test_families import save_family
from vllm_run import drift, generate, generate_each, skip_without

from gblm.errors import UsageError
from gblm.export.dense import export_dense
from gblm.model.folder import ModelFolder
from gblm.serve.cached import folder_to_serve

pytestmark = pytest.mark.vllm
Pack = Callable[..., Path]
EAGER = {"enforce_eager": True}
CASES = [("2:4", "float", True), ("0.5", "float", True), ("2:4", "float", False),
         ("2:4", "int8", True), ("0.5", "int4", True), ("dense", "int4:row", True)]  # fmt: skip


def tokens(rows: list[dict]) -> list[list[int]]:
    return [row["tokens"] for row in rows]


@pytest.mark.parametrize(("pattern", "values", "eager"), CASES)
def test_packed_models_answer_as_their_dense_selves(
    pack_tiny: Pack, tmp_path: Path, best_backend: str, pattern: str, values: str, eager: bool
) -> None:
    """Expanded with the same tokens and log-probs; packed in memory but for rounding."""
    folder = pack_tiny("wanda", pattern, values)
    export_dense(ModelFolder.open(folder), tmp_path / "dense")
    # The reference is slow and simple, and asked for once; so is the choice without a name.
    packed = [best_backend, *({"float": [None], "int8": ["reference"]}.get(values, []))]
    jobs = [(tmp_path / "dense", None), (folder, "dense"), *((folder, name) for name in packed)]
    (want, expanded, *rows), log = generate_each([(*job, {"enforce_eager": eager}) for job in jobs])
    assert len(want) == 8, log
    assert expanded == want, log
    # q/k/v and gate/up are fused: four linears in each of the two layers.
    assert log.count("8 linears run on backend dense (expanded at load)") == 1
    for name, found in zip(packed, rows, strict=True):
        chosen = name or best_backend
        said = f"8 linears run on backend {chosen} (packed in memory)"
        assert log.count(said) == sum((one or best_backend) == chosen for one in packed)
        # cpu rounds activations to int8 where it meets codes.
        assert drift(found, want) < (0.1 if chosen == "reference" or values == "float" else 0.3)


def test_linears_left_dense_are_served_beside_packed_ones(tiny: Path, tmp_path: Path) -> None:
    from gblm.prune import prune
    from gblm.recipe import Recipe

    recipe = Recipe(model=str(tiny), method="magnitude", calibration=None, ignore=("down_proj",))
    prune(recipe, tmp_path / "out")
    export_dense(ModelFolder.open(tmp_path / "out"), tmp_path / "dense")
    jobs = ((tmp_path / "out", "dense"), (tmp_path / "dense", None))
    (got, want), log = generate_each([(*job, EAGER) for job in jobs])
    assert len(got) == 8, log
    assert tokens(got) == tokens(want), log
    assert "6 linears run on backend dense" in log


@pytest.mark.parametrize(
    ("pattern", "values"),
    [("0.5", "float"), ("0.5", "int8:32"), ("0.5", "int4:32"), ("2:4", "float")],
)
def test_models_that_are_fused_on_disk_are_cut_into_their_pieces(
    tmp_path: Path, pattern: str, values: str
) -> None:
    from gblm.prune import prune
    from gblm.recipe import Recipe

    source = str(save_family("phi3 (fused)", tmp_path / "model", head_dim=32))
    recipe = Recipe(model=source, method="magnitude", pattern=pattern, values=values,
                    calibration=None)  # fmt: skip
    prune(recipe, tmp_path / "out")
    export_dense(ModelFolder.open(tmp_path / "out"), tmp_path / "dense")
    skip_without("cpu")
    folders = ((tmp_path / "dense", None), (tmp_path / "out", "dense"), (tmp_path / "out", "cpu"))
    (want, expanded, kernel), log = generate_each([(*one, EAGER) for one in folders])
    assert len(want) == 8, log
    assert expanded == want, log
    assert drift(kernel, want) < (0.1 if values == "float" else 0.3)
    assert "8 linears run on backend cpu (packed in memory)" in log


@pytest.mark.parametrize("fixture", ["24-bitmask", "24-int8-group", "bitmask-0.8"])
def test_converted_checkpoints_are_served_as_the_dense_model(
    fixture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GBLM_CACHE", str(tmp_path / "cache"))
    folder = folder_to_serve(FIXTURES / "served" / fixture)
    export_dense(ModelFolder.open(folder), tmp_path / "dense")
    options = {**EAGER, "max_model_len": 64, "skip_tokenizer_init": True}
    jobs = ((tmp_path / "dense", None), (folder, "dense"))
    (want, expanded), log = generate_each([(*job, options) for job in jobs])
    assert len(want) == 8, log
    assert expanded == want, log


def test_a_dense_model_cannot_be_called_packed() -> None:
    from gblm.serve.vllm_plugin.config import SparseConfig

    with pytest.raises(UsageError, match=r"this model is not packed.*--pack"):
        SparseConfig()


def test_half_of_a_fused_layer_cannot_be_packed(tiny: Path, tmp_path: Path) -> None:
    from gblm.prune import prune
    from gblm.recipe import Recipe

    recipe = Recipe(model=str(tiny), method="magnitude", calibration=None, ignore=("k_proj",))
    prune(recipe, tmp_path / "out")
    rows, log = generate(tmp_path / "out", **EAGER)
    assert not rows
    assert "vLLM fuses q_proj, k_proj, v_proj, but they are stored in different formats" in log


# Every part of every format: test_complete.py, without an engine.
def test_incomplete_checkpoint_is_refused(pack_tiny: Pack, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(pack_tiny("wanda", "0.5"), tmp_path / "out"))
    weights = load_file(folder / "model.safetensors")
    for part in ("values", "bitmask", "row_offsets"):
        weights.pop(f"model.layers.1.self_attn.k_proj.{part}", None)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    rows, log = generate(folder, **EAGER)
    assert not rows
    assert "model.layers.1.self_attn.qkv_proj" in log


@pytest.mark.real
@pytest.mark.parametrize("pattern", ["2:4", "0.5"])
def test_smollm2_expanded_equals_its_dense_self(
    smollm2: Path, tmp_path: Path, pattern: str
) -> None:
    from gblm.prune import prune
    from gblm.recipe import Recipe

    recipe = Recipe(model=str(smollm2), method="magnitude", pattern=pattern, calibration=None)
    prune(recipe, tmp_path / "out")
    export_dense(ModelFolder.open(tmp_path / "out"), tmp_path / "dense")
    jobs = ((tmp_path / "out", "dense"), (tmp_path / "dense", None))
    (got, want), log = generate_each([(*job, EAGER) for job in jobs])
    assert len(got) == 8, log
    assert got == want


def test_served_dtype_may_differ_from_the_stored_one(pack_tiny: Pack) -> None:
    settings = {"dtype": "float32", **EAGER}
    folders = [pack_tiny("wanda", "0.5", values) for values in ("float", "int8")]
    found, log = generate_each([(folder, None, settings) for folder in folders])
    assert [len(rows) for rows in found] == [8, 8], log


def test_plugin_registers_once_and_cheaply() -> None:
    code = (
        "import gblm.serve.vllm_plugin as p; import sys; assert 'torch' not in sys.modules\n"
        "p.register(); p.register()\n"
        "from vllm.model_executor.layers.quantization import get_quantization_config as g\n"
        "assert g('gblm').__name__ == 'SparseConfig'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
