"""Builds the CPU kernels with whatever C++ compiler there is; everything else is in pyproject.toml.

The library is plain C++ behind a C ABI: no Python or PyTorch headers, so that it builds in seconds
in an isolated environment and one build serves every Python. Without a compiler the installation
works all the same, with slower backends.
"""

from __future__ import annotations

import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools < 70.1
    from wheel.bdist_wheel import bdist_wheel

CSRC = Path("toolkit/kernels/csrc")
FLAGS = ["-std=c++17", "-O3", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi", "-g0"]
AVX512 = [
    *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vbmi"),
    *("-mavx512vbmi2", "-mavx512bitalg", "-mavx512vnni", "-mavx512bf16"),
    *("-mpopcnt", "-mbmi2", "-mfma"),
]
# One translation unit per instruction set; which one runs is decided at load.
X86 = {
    "avx2": ["-mavx2", "-mfma", "-mpopcnt"],
    "avx512": AVX512,
    "amx": [*AVX512, "-mamx-tile", "-mamx-bf16", "-mamx-int8"],
}
ARM64 = {
    "neon": ["-march=armv8.2-a+dotprod"],
    "neon_bf16": ["-march=armv8.2-a+dotprod+bf16"],
}
COMMON = (
    "driver",
    "experts",
    "linear",
    "memory",
    "ort_op",
    "panels",
    "portable",
    "prepare",
    "torch_op",
)
MACHINE = platform.machine().lower()
OWN = X86 if MACHINE in ("x86_64", "amd64") else ARM64 if MACHINE in ("aarch64", "arm64") else {}


class BuildKernels(build_ext):
    """Compiles each source with its own flags and links a plain shared library."""

    def build_extension(self, ext: Extension) -> None:
        """Build, or say in one line why there will be no CPU kernels."""
        try:
            self._build(ext)
        except Exception as error:
            print(f"gblm: the CPU kernels were not built ({error}); slower backends will serve.",
                  file=sys.stderr)  # fmt: skip

    def get_outputs(self) -> list[str]:
        """Only what was really built."""
        return [path for path in super().get_outputs() if Path(path).exists()]

    def copy_extensions_to_source(self) -> None:
        """For editable installs; nothing to copy when nothing was built."""
        if self.get_outputs():
            super().copy_extensions_to_source()

    def get_ext_filename(self, fullname: str) -> str:
        """No tag of a Python version in the name."""
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def _build(self, ext: Extension) -> None:
        def compiled(source: str) -> list[str]:
            return self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                extra_postargs=FLAGS + OWN.get(Path(source).stem, []),
                depends=ext.depends,
            )

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [found for one in pool.map(compiled, ext.sources) for found in one]
        target = self.get_ext_fullpath(ext.name)
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(objects, target, libraries=["dl", "m"], target_lang="c++")


class PlatformWheel(bdist_wheel):
    """The library belongs to a platform, not to a version of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """py3-none-<platform>."""
        return "py3", "none", super().get_tag()[2]


if sys.platform != "linux":
    sys.exit(f"gblm runs on Linux alone, not on {sys.platform}.")
setup(
    ext_modules=[
        Extension(
            "gblm.kernels._cpu",
            sources=[str(CSRC / f"{unit}.cpp") for unit in (*COMMON, *OWN)],
            depends=[str(header) for header in CSRC.glob("*.h")],
            language="c++",
        )
    ],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel},
)
