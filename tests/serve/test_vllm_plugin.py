"""The plugin in vLLM on CPU: tokens of packed models against their dense-with-zeros selves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gblm.export.dense import export_dense

pytestmark = pytest.mark.vllm
Pack = Callable[..., Path]
EAGER = {"enforce_eager": True}
CASES = [("2:4", "float", True), ("0.5", "float", True), ("2:4", "float", False),
         ("2:4", "int8", True), ("0.5", "int4", True), ("dense", "int4:row", True)]  # fmt: skip


def generate(
    folder: Path, backend: str | None = None, **settings: object
) -> tuple[list[dict], str]:
    """Greedy tokens and log-probs of eight prompts, and vLLM's output."""
    env = os.environ | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "0-1" if (os.cpu_count() or 1) > 1 else "0",
        "VLLM_NO_USAGE_STATS": "1",
    }
    env.pop("GBLM_BACKEND", None)
    if backend:
        env["GBLM_BACKEND"] = backend
    script = Path(__file__).parent / "generate.py"
    done = subprocess.run(
        [sys.executable, str(script), str(folder), json.dumps(settings)],
        capture_output=True, text=True, env=env, timeout=400, check=False,
    )  # fmt: skip
    rows = [json.loads(x[7:]) for x in done.stdout.splitlines() if x.startswith("TOKENS ")]
    return rows, done.stdout + done.stderr


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
            export_dense(pack_tiny("wanda", pattern, values), folder)
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


@pytest.mark.parametrize(("pattern", "values", "eager"), CASES)
def test_packed_in_memory_differs_by_rounding_only(
    pack_tiny: Pack, dense_tokens: Callable, pattern: str, values: str, eager: bool
) -> None:
    rows, log = generate(pack_tiny("wanda", pattern, values), "reference", enforce_eager=eager)
    assert "8 linears run on backend reference (packed in memory)" in log
    want = dense_tokens(pattern, values, eager)
    assert len(rows) == 8, log
    for got, dense in zip(rows, want, strict=True):
        same = 0
        while same < 12 and got["tokens"][same] == dense["tokens"][same]:
            drift = abs(got["logprobs"][same] - dense["logprobs"][same])
            assert drift < 0.1, f"token {same}: log-prob drifts by {drift}"
            same += 1
        assert same >= 1


def test_linears_left_dense_are_served_beside_packed_ones(tiny: Path, tmp_path: Path) -> None:
    from gblm.prune import prune
    from gblm.recipe import Recipe

    recipe = Recipe(model=str(tiny), method="magnitude", calibration=None, ignore=("down_proj",))
    prune(recipe, tmp_path / "out")
    export_dense(tmp_path / "out", tmp_path / "dense")
    got, log = generate(tmp_path / "out", "dense", **EAGER)
    want, _ = generate(tmp_path / "dense", **EAGER)
    assert tokens(got) == tokens(want), log
    assert "6 linears run on backend dense" in log


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
    export_dense(tmp_path / "out", tmp_path / "dense")
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
