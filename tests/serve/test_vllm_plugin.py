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


@pytest.fixture(scope="module")
def dense_tokens(
    pack_tiny: Pack, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str, bool], list[dict]]:
    """Tokens of the dense export, once per pattern, value type and mode."""
    known: dict[tuple[str, str, bool], list[dict]] = {}

    def get(pattern: str, values: str, eager: bool) -> list[dict]:
        if (pattern, values, eager) not in known:
            folder = tmp_path_factory.mktemp("dense") / "dense"
            export_dense(ModelFolder.open(pack_tiny("wanda", pattern, values)), folder)
            rows, log = generate(folder, enforce_eager=eager)
            assert len(rows) == 8, log
            known[pattern, values, eager] = rows
        return known[pattern, values, eager]

    return get


@pytest.mark.parametrize(("pattern", "values", "eager"), CASES)
def test_expanded_tokens_and_logprobs_equal_the_dense_model(
    pack_tiny: Pack, dense_tokens: Callable, pattern: str, values: str, eager: bool
) -> None:
    rows, log = generate(pack_tiny("wanda", pattern, values), "dense", enforce_eager=eager)
    assert rows == dense_tokens(pattern, values, eager), log
    # q/k/v and gate/up are fused: four linears in each of the two layers.
    assert "8 linears run on backend dense (expanded at load)" in log


# Every start of vLLM takes a quarter of a minute: reference, slow and simple, is served once.
@pytest.mark.parametrize(
    ("pattern", "values", "eager", "backend"),
    [*((*case, "cpu") for case in CASES), (*CASES[3], "reference")],
)
def test_packed_in_memory_differs_by_rounding_only(
    pack_tiny: Pack, dense_tokens: Callable, pattern: str, values: str, eager: bool, backend: str
) -> None:
    skip_without(backend)
    rows, log = generate(pack_tiny("wanda", pattern, values), backend, enforce_eager=eager)
    assert f"8 linears run on backend {backend} (packed in memory)" in log
    # cpu rounds activations to int8 where it meets codes.
    bound = 0.1 if backend == "reference" or values == "float" else 0.3
    assert drift(rows, dense_tokens(pattern, values, eager)) < bound


def test_best_backend_serves_when_none_is_asked_for(
    pack_tiny: Pack, dense_tokens: Callable, best_backend: str
) -> None:
    rows, log = generate(pack_tiny("wanda", "2:4", "float"), **EAGER)
    assert f"8 linears run on backend {best_backend} (packed in memory)" in log
    assert drift(rows, dense_tokens("2:4", "float", True)) < 0.1


def test_linears_left_dense_are_served_beside_packed_ones(tiny: Path, tmp_path: Path) -> None:
    from gblm.prune import prune
    from gblm.recipe import Recipe

    recipe = Recipe(model=str(tiny), method="magnitude", calibration=None, ignore=("down_proj",))
    prune(recipe, tmp_path / "out")
    export_dense(ModelFolder.open(tmp_path / "out"), tmp_path / "dense")
    got, log = generate(tmp_path / "out", "dense", **EAGER)
    want, _ = generate(tmp_path / "dense", **EAGER)
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


@pytest.mark.parametrize("pattern", ["2:4", "0.5"])
def test_incomplete_checkpoint_is_refused(pack_tiny: Pack, tmp_path: Path, pattern: str) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(pack_tiny("wanda", pattern), tmp_path / "out"))
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
    got, log = generate(tmp_path / "out", "dense", **EAGER)
    want, _ = generate(tmp_path / "dense", **EAGER)
    assert len(got) == 8, log
    assert got == want


def test_served_dtype_may_differ_from_the_stored_one(pack_tiny: Pack) -> None:
    for values in ("float", "int8"):
        rows, log = generate(pack_tiny("wanda", "0.5", values), dtype="float32", **EAGER)
        assert len(rows) == 8, log


def test_plugin_registers_once_and_cheaply() -> None:
    code = (
        "import gblm.serve.vllm_plugin as p; import sys; assert 'torch' not in sys.modules\n"
        "p.register(); p.register()\n"
        "from vllm.model_executor.layers.quantization import get_quantization_config as g\n"
        "assert g('gblm').__name__ == 'SparseConfig'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
