"""What `make onnx-gpu` runs where onnxruntime-gpu is installed and no GPU is there."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest
from conftest import save_tiny_model

from gblm.errors import MachineError
from gblm.export.onnx.decoder import OnnxDecoder
from gblm.export.onnx.export import Wanted, export_onnx
from gblm.prune import prune
from gblm.recipe import Recipe


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    tiny = save_tiny_model(root / "tiny")
    prune(Recipe(model=str(tiny), method="magnitude", pattern="0.5"), root / "packed")
    return root / "packed"


def test_the_gpu_package_is_the_one_installed() -> None:
    assert version("onnxruntime-gpu")
    with pytest.raises(Exception, match="onnxruntime"):
        version("onnxruntime")


@pytest.mark.parametrize("wanted", [Wanted(sparse=True, validate=16), Wanted(validate=16)])
def test_its_cpu_provider_computes_what_torch_does(
    packed: Path, tmp_path: Path, wanted: Wanted
) -> None:
    found = export_onnx(packed, tmp_path / "out", wanted)["validation"]
    assert found["equal_greedy_tokens"] == 16
    assert found["device"] == "cpu"


def test_cuda_without_a_gpu_is_refused(packed: Path, tmp_path: Path) -> None:
    export_onnx(packed, tmp_path / "out", Wanted("cuda", validate=0))
    with pytest.raises(MachineError, match="no CUDA device can be used here"):
        OnnxDecoder(tmp_path / "out")
