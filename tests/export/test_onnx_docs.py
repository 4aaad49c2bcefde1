"""The examples of docs/onnx.md, copied from the page, run on the tiny model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai: make dev installs it")

PAGE = (Path(__file__).resolve().parents[2] / "docs/onnx.md").read_text()
HEADERS = ("/usr/include/onnxruntime", os.environ.get("ONNXRUNTIME_INCLUDE_DIR", ""))


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    """A folder that holds `smollm2-onnx`, the tiny model in its place."""
    (tmp_path / "smollm2-onnx").symlink_to(exported)
    return tmp_path


def examples(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_python_examples_run(folder: Path, number: int) -> None:
    code = examples("python")[number]
    code = re.sub(r"\[\[504.*?\]\]", "[[5, 40, 77, 101]]", code)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_cpp_example_compiles_and_runs(folder: Path) -> None:
    import onnxruntime

    found = [path for path in HEADERS if path and (Path(path) / "onnxruntime_cxx_api.h").exists()]
    if not found:
        pytest.skip("onnxruntime_cxx_api.h is not there: install libonnxruntime-dev, or set "
                    "ONNXRUNTIME_INCLUDE_DIR")  # fmt: skip
    (folder / "example.cpp").write_text(examples("cpp")[0])
    installed = next((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so*"))
    subprocess.run(
        ["g++", "-std=c++17", "example.cpp", f"-I{found[0]}", str(installed), "-o", "example"],
        cwd=folder, check=True,
    )  # fmt: skip
    (folder / "libonnxruntime.so.1").symlink_to(installed)
    done = subprocess.run(
        [str(folder / "example")], cwd=folder, capture_output=True, text=True, check=True,
        env=os.environ | {"LD_LIBRARY_PATH": str(folder)},
    )  # fmt: skip
    assert done.stdout == "6 inputs, 5 outputs\n"
