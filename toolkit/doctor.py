"""What this machine can do: packages, devices, the vLLM plugin, a self-test of every backend."""

from __future__ import annotations

import importlib.util
from importlib.metadata import entry_points
from typing import Any

import torch

from gblm.formats import format_for
from gblm.kernels import BACKENDS, linear, select
from gblm.patterns import NM, Pattern, Unstructured
from gblm.provenance import provenance
from gblm.weights import SparseWeight

PLUGIN_GROUP = "vllm.general_plugins"
OPTIONAL = (
    "vllm",
    "onnx",
    "onnxruntime",
    "lm_eval",
    "guidellm",
    "datasets",
    "gguf",
    "accelerate",
    "triton",
    "torchaudio",
)


def doctor() -> dict[str, Any]:
    """Facts about the machine and whether everything gblm does works on it.

    Returns:
        "ok" is False when a backend's self-test fails.
    """
    backends = {name: _self_test(name) for name in BACKENDS}
    installed = {name: importlib.util.find_spec(name) is not None for name in OPTIONAL}
    return {
        **provenance(),
        "cuda": _cuda(),
        "installed": installed,
        "vllm_plugin": any(point.name == "gblm" for point in entry_points(group=PLUGIN_GROUP)),
        "backends": backends,
        "warnings": _warnings(installed),
        "ok": all(result == "ok" for result in backends.values()),
    }


def _self_test(name: str) -> str:
    """Multiply with small random weights of every format and compare with a dense product."""
    generator = torch.Generator().manual_seed(0)
    patterns: tuple[Pattern, ...] = (NM(2, 4), NM(4, 8), Unstructured(0.5))
    for pattern in patterns:
        weight = torch.randn(48, 64, generator=generator)
        sparse = SparseWeight.cut(weight, pattern.keep(weight.abs(), "row"))
        fmt, x = format_for(pattern), torch.randn(3, 64, generator=generator)
        parts, shape = fmt.pack("self-test", sparse), (48, 64)
        backend, _ = select(fmt, shape, torch.float32, x.device, forced=name)
        got = linear(x, backend.prepare(fmt, parts, shape), shape, fmt, backend)
        if not torch.allclose(got, x @ sparse.weight.t(), atol=1e-5):
            return f"wrong result for {fmt.spec}"
    return "ok"


def _cuda() -> list[str]:
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def _warnings(installed: dict[str, bool]) -> list[str]:
    found = []
    if not installed["vllm"]:
        found.append("vLLM is missing: pip install 'gblm-toolkit[cpu]' or 'gblm-toolkit[cuda]'.")
    elif installed["torchaudio"] and not torch.cuda.is_available():
        found.append("torchaudio often breaks vLLM on CPU: pip uninstall torchaudio torchcodec.")
    return found
