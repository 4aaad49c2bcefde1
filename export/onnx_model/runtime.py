"""ONNX Runtime: which package is installed, and sessions that say what they really run on."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gblm.errors import CheckpointError, MachineError
from gblm.kernels import native

MIN_VERSION = (1, 17)  # the first whose C API lets an operator use the session's threads
DOMAIN, DOMAIN_VERSION = "ai.gblm", 1
MODEL_FILE = "model.onnx"
CONFIG_FILE = "genai_config.json"
REPORT_FILE = "onnx_report.json"
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
# Both put their files into the same folder: the later installed one silently wins.
VARIANTS = ("onnxruntime", "onnxruntime-gpu")


def check_installation(*packages: str) -> None:
    """Refuse a missing package and a mixed installation before either gives a riddle.

    Args:
        packages: distributions that are needed besides ONNX Runtime.

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
    missing = [name for name in packages if not _version(name)]
    if not found or missing:
        raise MachineError(
            f"{', '.join([*missing, *([] if found else ['onnxruntime'])])} is not installed: "
            "`pip install 'gblm-toolkit[onnx-cpu]'`, or [onnx] for CUDA."
        )
    genai = [name for name in ("onnxruntime-genai", "onnxruntime-genai-cuda") if _version(name)]
    wanted = "onnxruntime-genai-cuda" if found == ["onnxruntime-gpu"] else "onnxruntime-genai"
    if genai and wanted not in genai:
        raise MachineError(
            f"{genai[0]} does not go with {found[0]}: `pip uninstall -y {genai[0]}`, then "
            f"`pip install {wanted}`."
        )
    check_version(str(_version(found[0])))


def check_version(text: str) -> None:
    """Refuse an ONNX Runtime that lacks what the operator needs.

    Raises:
        MachineError: it is too old.
    """
    numbers = tuple(int(part) for part in re.findall(r"\d+", text)[:2])
    if numbers < MIN_VERSION:
        raise MachineError(
            f"ONNX Runtime {text} is too old: {'.'.join(map(str, MIN_VERSION))} or later is needed."
        )


def library() -> Path:
    """Find the shared library that holds the operator `ai.gblm::Linear`.

    Raises:
        MachineError: it was not built.
    """
    if not native.LIBRARY.exists():
        raise MachineError(f"the CPU kernels cannot be used: {native.refusal()}.")
    return native.LIBRARY


def register(options: Any) -> Any:
    """Let a session know the operator.

    Args:
        options: an `onnxruntime.SessionOptions`.

    Returns:
        The same options.

    Raises:
        MachineError: the library was not built, or ONNX Runtime refuses it.
    """
    try:
        options.register_custom_ops_library(str(library()))
    except MachineError:
        raise
    except Exception as error:
        raise MachineError(f"ONNX Runtime refuses the operator library: {error}") from error
    return options


def open_session(folder: Path, provider: str = CPU, threads: int | None = None) -> Any:
    """Open an `onnxruntime.InferenceSession` of an exported folder.

    Args:
        folder: as `export_onnx` wrote it; or a path to the model file itself.
        provider: the execution provider that must run the model.
        threads: of one operator; None leaves it to ONNX Runtime.

    Raises:
        CheckpointError: the file is missing, damaged, or of a later version of gblm.
        MachineError: the installation is unusable, or the provider is not there.
    """
    check_installation()
    import onnxruntime

    path = folder / MODEL_FILE if folder.is_dir() else folder
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: export the model with `gblm export onnx`.")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    register(options)
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=[provider])
    except Exception as error:
        raise CheckpointError(f"{path}: ONNX Runtime cannot load it: {error}") from error
    used = session.get_providers()
    if provider not in used:
        raise MachineError(f"{path}: {provider} was asked for, but only {', '.join(used)} is used.")
    return session


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
