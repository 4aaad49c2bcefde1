"""Run by `make wheel` in an environment that holds only the wheel: no vLLM, no source tree."""

from __future__ import annotations

import importlib.util
import sys
from importlib.metadata import entry_points, files
from pathlib import Path

import torch
from conftest import save_tiny_model

import gblm


def test_the_wheel_is_what_runs() -> None:
    assert "site-packages" in str(Path(gblm.__file__))
    assert importlib.util.find_spec("vllm") is None


def test_the_wheel_claims_only_gblm() -> None:
    tops = {Path(str(file)).parts[0] for file in files("gblm-toolkit") or []}
    tops = {top for top in tops if not top.endswith(".dist-info") and top != ".."}
    assert tops == {"gblm"}
    assert any(str(file) == "gblm/py.typed" for file in files("gblm-toolkit") or [])


def test_the_wheel_holds_the_cpu_kernels() -> None:
    from gblm.kernels import native

    assert native.refusal() is None
    assert not any(str(file).endswith((".cpp", ".h")) for file in files("gblm-toolkit") or [])


def test_the_wheel_holds_the_text_of_the_cuda_kernels() -> None:
    from gblm.kernels.cuda.nvrtc import PRELUDE, Variant, read

    for name in ("mma_sp", "delta"):
        assert 'extern "C" __global__' in read(f"{name}.cu")
        assert Variant(name, ()).text().startswith(read(PRELUDE))
    held = {str(file) for file in files("gblm-toolkit") or []}
    assert {"gblm/kernels/cuda/mma_sp.cu", "gblm/kernels/cuda/delta.cu"} <= held
    assert f"gblm/kernels/cuda/{PRELUDE}" in held


def test_the_wheel_brings_the_proxy_configuration() -> None:
    assert (Path(sys.prefix) / "share" / "gblm" / "nginx.conf").is_file()


def test_entry_points_are_there() -> None:
    (plugin,) = (p for p in entry_points(group="vllm.general_plugins") if p.name == "gblm")
    assert callable(plugin.load())
    assert any(p.name == "gblm" for p in entry_points(group="console_scripts"))


def test_prune_and_load(tmp_path: Path) -> None:
    import gblm.packed
    from gblm.checkpoint.inspect import verify
    from gblm.model.folder import ModelFolder
    from gblm.prune import prune
    from gblm.recipe import Calibration, Recipe

    model = save_tiny_model(tmp_path / "tiny")
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    calibration = Calibration(source=str(tmp_path / "text.txt"), num_samples=2, seq_len=16)
    prune(Recipe(model=str(model), calibration=calibration), tmp_path / "out")
    assert verify(ModelFolder.open(tmp_path / "out"))["ok"]
    loaded = gblm.packed.load(tmp_path / "out")
    assert loaded(input_ids=torch.arange(4).reshape(1, 4)).logits.isfinite().all()
