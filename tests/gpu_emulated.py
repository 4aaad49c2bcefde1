"""A GPU on the CPU: gblm's CUDA kernels, built by g++ behind an emulated driver.

What runs is the kernels' own source and the product's own launch code; emulated are the functions
of ptx.cuh and libcuda: see kernels/gpu/.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

from gblm.kernels import Backend
from gblm.kernels.cuda.delta import Delta
from gblm.kernels.cuda.device import Device, Driver
from gblm.kernels.cuda.mma_sp import SparseTensorCore
from gblm.kernels.cuda.nvrtc import Variant

HERE = Path(__file__).parent / "kernels" / "gpu"
KERNELS = {"mma_sp": ("repack", "mma_sp", "expand"), "delta": ("delta", "scatter")}
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-shared", "-Wno-unknown-pragmas", "-fno-strict-aliasing"]


def missing() -> str | None:
    """Why there is no emulated GPU here."""
    return None if shutil.which("g++") else "no g++ for the emulated GPU: .ci/run installs it"


class EmulatedDevice(Device):
    """Knows the buffers of each launch, and refuses accesses to anything else."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.launches = folder, []
        path = _build(folder / "libcuda.so", (HERE / "libcuda.cpp").read_text(), ["-ldl"])
        self.library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        self.library.emulator_allow.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        super().__init__(Driver(path), self._compile, (9, 0), num_sms=3, max_shared=227 << 10)

    def launch(
        self,
        variant: Variant,
        name: str,
        grid: int,
        arguments: Sequence[torch.Tensor | int],
        shared: int = 0,
    ) -> None:
        self.launches.append(name)
        self.library.emulator_forget()
        for argument in arguments:
            if isinstance(argument, torch.Tensor):
                self.library.emulator_allow(argument.data_ptr(), argument.nbytes, 1)
        super().launch(variant, name, grid, arguments, shared)

    def stream(self) -> int:
        return 0

    def seed(self, value: int) -> None:
        """Another order of threads."""
        self.library.emulator_seed(value)

    def _compile(self, variant: Variant) -> bytes:
        text = variant.text((HERE / "emulator.h").read_text())
        text += "".join(f"KERNEL({name})\n" for name in KERNELS[variant.file])
        name = hashlib.sha256(variant.label.encode()).hexdigest()[:16]
        path = _build(self.folder / f"{name}.so", text, variant.options)
        return str(path).encode()


@cache
def emulated() -> EmulatedDevice:
    """The one of this process: its driver's symbols are global."""
    folder = Path(tempfile.mkdtemp(prefix="gblm-gpu-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return EmulatedDevice(folder)


def emulated_backends() -> dict[str, Backend]:
    """The CUDA backends on the emulated device; they refuse no CPU."""
    return {"mma_sp": _TileOnCpu(lambda _: emulated()), "delta": _DeltaOnCpu(lambda _: emulated())}


class _OnCpu:
    def refuses_device(self, device: torch.device) -> str | None:
        return None


class _TileOnCpu(_OnCpu, SparseTensorCore):
    pass


class _DeltaOnCpu(_OnCpu, Delta):
    pass


def _build(path: Path, text: str, options: Sequence[str]) -> Path:
    source = path.with_suffix(".cpp")
    source.write_text(text)
    subprocess.run(["g++", *FLAGS, str(source), "-o", str(path), *options], check=True)
    return path
