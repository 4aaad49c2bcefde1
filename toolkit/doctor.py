"""What this machine can do: packages, devices, the vLLM plugin, a self-test of every backend."""

from __future__ import annotations

import importlib.util
from importlib.metadata import entry_points
from itertools import product
from typing import Any

import torch

from gblm.kernels import BACKENDS, linear, native
from gblm.provenance import provenance
from gblm.sparse.formats import Format, format_for
from gblm.sparse.patterns import NM, Dense, Pattern, Unstructured
from gblm.sparse.values import FLOAT, KINDS, ValueType, quantize
from gblm.sparse.weights import SparseWeight

PLUGIN_GROUP = "vllm.general_plugins"
# Of the relative error; the first dtype that a backend takes is tested.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
NO_DEVICE = "not used here: there is no CUDA device"
OPTIONAL = (
    "vllm",
    "onnx",
    "onnxruntime",
    "lm_eval",
    "datasets",
    "gguf",
    "accelerate",
    "triton",
    "torchaudio",
)


def doctor() -> dict[str, Any]:
    """Collect facts about the machine, and test whether gblm works on it.

    Returns:
        "ok" is False when a backend's self-test fails; those for devices that are not there have
        none.
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
        "ok": all(result in ("ok", NO_DEVICE) for result in backends.values()),
    }


def has_avx2_alone() -> bool:
    """Tell whether the CPU kernels find AVX2 and no more, see docs/kernels.md."""
    return native.refusal() is None and native.instruction_set() == "avx2"


def _self_test(name: str) -> str:
    """Multiply with small weights of every format and value type; compare with dense products.

    A backend for GPUs may refuse formats, but not all of them.
    """
    if BACKENDS[name].needs == "cuda" and not torch.cuda.is_available():
        return NO_DEVICE
    device, tested = torch.device(BACKENDS[name].needs), 0
    generator = torch.Generator().manual_seed(0)
    patterns: tuple[Pattern, ...] = (
        NM(2, 4), NM(4, 8), NM(8, 16), Unstructured(0.5), Dense(),
    )  # fmt: skip
    integers = (ValueType(kind, 32) for kind in KINDS if kind != FLOAT.kind)
    kinds = (FLOAT, *(values for values in integers if values.bits in Format.bits))
    for pattern, values in product(patterns, kinds):
        weight = torch.randn(48, 64, generator=generator)
        sparse = SparseWeight.cut(weight, pattern.keep(weight.abs(), "row"))
        if not values.is_float:
            sparse = quantize(weight, sparse.mask, values)
        fmt, x = format_for(pattern, values), torch.randn(3, 64, generator=generator)
        backend, shape = BACKENDS[name], (48, 64)
        refusals = {d: backend.refuses(fmt, shape, d, device) for d in TOLERANCE}
        dtype = next((d for d, reason in refusals.items() if reason is None), None)
        if dtype is None and device.type == "cuda":
            continue
        if dtype is None:
            return f"refuses {fmt.spec}: {refusals[torch.float32]}"
        parts = fmt.pack("self-test", sparse.to(dtype))
        parts = {part: tensor.to(device) for part, tensor in parts.items()}
        prepared = backend.prepare(fmt, parts, shape, dtype)
        got = linear(x.to(device, dtype), prepared, shape, fmt, backend)
        want, tested = x @ sparse.weight.t(), tested + 1
        if not float((got.float().cpu() - want).norm() / want.norm()) < TOLERANCE[dtype]:
            return f"wrong result for {fmt.spec}"
    return "ok" if tested else f"refuses every format: {refusals[torch.bfloat16]}"


def _cuda() -> list[str]:
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def _warnings(installed: dict[str, bool]) -> list[str]:
    found = []
    if not installed["vllm"]:
        found.append("vLLM is missing: pip install 'gblm-toolkit[cpu]' or 'gblm-toolkit[cuda]'.")
    elif installed["torchaudio"] and not torch.cuda.is_available():
        found.append("torchaudio often breaks vLLM on CPU: pip uninstall torchaudio torchcodec.")
    return found
