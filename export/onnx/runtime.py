"""Name the files of an exported folder, and check the installation of ONNX Runtime."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from gblm.errors import MachineError
from gblm.kernels import native

BUILDER = "onnxruntime_genai.models.builder"
DOMAIN, DOMAIN_VERSION = "ai.gblm", 1
MODEL_FILE = "model.onnx"
DATA_FILE = f"{MODEL_FILE}.data"
CONFIG_FILE = "genai_config.json"
REPORT_FILE = "onnx_report.json"
LIBRARY_FILE = "libgblm_ort.so"
# Of ONNX Runtime, and the onnxruntime-genai that goes with each. Both variants put their files into
# the same folder: the later installed one silently wins.
VARIANTS = {"onnxruntime": "onnxruntime-genai", "onnxruntime-gpu": "onnxruntime-genai-cuda"}


def check_installation() -> None:
    """Refuse a missing package and a mixed installation before either gives a riddle.

    Raises:
        MachineError: with the cure.
    """
    found = [name for name in VARIANTS if _version(name)]
    if len(found) > 1:
        raise MachineError(
            f"{' and '.join(found)} are both installed and overwrite each other's files; keep "
            "one: `pip uninstall -y onnxruntime onnxruntime-gpu`, then "
            "`pip install 'gblm-toolkit[onnx-cpu]'`, or [onnx] for CUDA."
        )
    runtime = found[0] if found else "onnxruntime"
    genai = VARIANTS[runtime]
    missing = [name for name in ("onnx-ir", runtime, genai) if not _version(name)]
    if missing:
        raise MachineError(
            f"{', '.join(missing)} is not installed: `pip install 'gblm-toolkit[onnx-cpu]'`, or "
            "[onnx] for CUDA."
        )


def library() -> Path:
    """Find the shared library that holds the operator `ai.gblm::Linear`.

    Raises:
        MachineError: it was not built.
    """
    if not native.LIBRARY.exists():
        raise MachineError(f"the CPU kernels cannot be used: {native.refusal()}.")
    return native.LIBRARY


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
