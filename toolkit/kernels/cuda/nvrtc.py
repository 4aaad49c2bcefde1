"""The text of the CUDA kernels, and NVRTC, which compiles a variant of it for one GPU.

NVRTC comes with CUDA builds of PyTorch, or with the package nvidia-cuda-nvrtc; no header and no
compiler is needed. What was compiled is kept on disk.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from gblm.cache import cache_folder, keep
from gblm.errors import MachineError

# mma.sp::ordered_metadata is PTX 8.5.
OLDEST = (12, 5)
FOLDER = Path(__file__).parent
PRELUDE = "ptx.cuh"


@dataclass(frozen=True)
class Variant:
    """A Variant is one compilation of a .cu file, whose head explains the macros of `defines`.

    `file` is the name without ".cu"; `defines` are pairs of a macro's name and its value.
    """

    file: str
    defines: tuple[tuple[str, int], ...]

    @property
    def label(self) -> str:
        """Name the variant for messages and tables, such as "mma_sp BF16=1 TOKENS=2"."""
        return " ".join([self.file, *(f"{name}={value}" for name, value in self.defines)])

    @property
    def options(self) -> list[str]:
        """Write the macros as options of the compiler's command line."""
        return [f"-D{name}={value}" for name, value in self.defines]

    def text(self, prelude: str | None = None) -> str:
        """Give the source; with another prelude than CUDA's it runs elsewhere, as in the tests."""
        return (read(PRELUDE) if prelude is None else prelude) + read(f"{self.file}.cu")


@cache
def read(name: str) -> str:
    """Read a file of this folder."""
    return (FOLDER / name).read_text(encoding="utf-8")


def refusal() -> str | None:
    """Say why nothing can be compiled, for people; None when it can."""
    try:
        found = version()
    except MachineError as error:
        return str(error).rstrip(".")
    if found < OLDEST:
        return f"NVRTC {found[0]}.{found[1]} is too old: {OLDEST[0]}.{OLDEST[1]} is needed"
    return None


def version() -> tuple[int, int]:
    """Ask the NVRTC that is used for its version: major, minor.

    Raises:
        MachineError: there is none.
    """
    major, minor = ctypes.c_int(), ctypes.c_int()
    _library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


def cubin(variant: Variant, arch: tuple[int, int], folder: Path | None = None) -> bytes:
    """Get the machine code of a variant, from the cache or compiled.

    Args:
        variant: what to compile.
        arch: the GPU's compute capability, such as (9, 0).
        folder: where cubins are kept; None is `cubins` in gblm's own cache.

    Raises:
        MachineError: there is no NVRTC, or it refuses the source.
    """
    folder = cache_folder() / "cubins" if folder is None else folder
    text = variant.text()
    facts = (text, *variant.options, f"{arch}", f"{version()}")
    path = folder / f"{hashlib.sha256(chr(0).join(facts).encode()).hexdigest()[:40]}.cubin"
    try:
        found = path.read_bytes()
    except OSError:
        found = b""
    if found.startswith(b"\x7fELF"):
        return found
    made = compile_text(text, variant.options, arch, variant.label)
    keep(path, made)
    return made


def compile_text(text: str, options: list[str], arch: tuple[int, int], label: str) -> bytes:
    """Compile source to a cubin.

    Args:
        text: CUDA C++ without includes.
        options: further options of the compiler's command line.
        arch: the GPU's compute capability.
        label: what messages call the source.

    Raises:
        MachineError: NVRTC refuses; the message has the first line of its log.
    """
    library, program = _library(), ctypes.c_void_p()
    flags = [f"--gpu-architecture=sm_{arch[0]}{arch[1]}", "--std=c++17", *options]
    values = (ctypes.c_char_p * len(flags))(*(flag.encode() for flag in flags))
    library.nvrtcCreateProgram(
        ctypes.byref(program), text.encode(), f"{label}.cu".encode(), 0, None, None
    )
    try:
        if library.nvrtcCompileProgram(program, len(flags), values):
            log = _text(program, "nvrtcGetProgramLog").decode().strip()
            raise MachineError(f"NVRTC refuses {label} for sm_{arch[0]}{arch[1]}: {log[:500]}")
        return _text(program, "nvrtcGetCUBIN")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _text(program: ctypes.c_void_p, what: str) -> bytes:
    library, size = _library(), ctypes.c_size_t()
    getattr(library, f"{what}Size")(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(max(size.value, 1))
    getattr(library, what)(program, buffer)
    return buffer.raw[: size.value]


@cache
def _library() -> ctypes.CDLL:
    for path in _candidates():
        try:
            library = ctypes.CDLL(path)
        except OSError:
            continue
        library.nvrtcCreateProgram.argtypes = [
            ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int,
            ctypes.c_void_p, ctypes.c_void_p,
        ]  # fmt: skip
        return library
    raise MachineError("NVRTC was not found: pip install nvidia-cuda-nvrtc.")


def _candidates() -> Iterator[str]:
    """List paths at which NVRTC may lie: the wheels' folders first, then the system's."""
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or []) if spec else []:
        for pattern in ("cu*/lib/libnvrtc.so.*", "cuda_nvrtc/lib/libnvrtc.so.*"):
            yield from map(str, sorted(Path(root).glob(pattern), reverse=True))
    yield from ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so")
