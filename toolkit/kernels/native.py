"""The compiled CPU kernels: finding the library, turning parts into panels, and its facts.

The C ABI is csrc/gblm_kernels.h. Multiplying is not here: `torch.ops.gblm.cpu_linear` is registered
by the library itself.
"""

from __future__ import annotations

import ctypes
import mmap
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from gblm.errors import GblmError

LIBRARY = Path(__file__).with_name("_cpu.so")
VALUES = {"float": 0, "int8": 1, "int4": 2}
DTYPES = {"float": torch.bfloat16, "int8": torch.int8, "int4": torch.uint8}
DENSE, ANY, FOUR_OF_EIGHT, EIGHT_OF_SIXTEEN = 0, 1, 2, 3
HUGE_PAGE = 2 << 20


class KernelError(GblmError):
    """The kernels refused a weight or panels."""


class _Source(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("values", ctypes.c_int32),
        ("mask", ctypes.c_int32),
        ("group", ctypes.c_int64),
        ("data", ctypes.c_void_p),
        ("data_bytes", ctypes.c_int64),
        ("bitmask", ctypes.c_void_p),
        ("starts", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
    )


class _Info(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "columns", "group", "bytes")),
        *((name, ctypes.c_int32) for name in ("values", "mask")),
    )


@dataclass(frozen=True)
class Source:
    """A weight as it lies on disk.

    Attributes:
        shape: [out, in]; in is a multiple of 8, of 32 with integer values.
        values: "float" (bfloat16), "int8" or "int4".
        mask: DENSE, ANY, FOUR_OF_EIGHT or EIGHT_OF_SIXTEEN (three to five in each half).
        data: the kept values, row after row; int4 two a byte, rows begin at bytes.
        starts: [out + 1] int64, first byte of each row in `data`.
        bitmask: [out, in/8] uint8; None when dense.
        scales: [out, in/group] bfloat16; None for floats.
    """

    shape: tuple[int, int]
    values: str
    mask: int
    data: Tensor
    starts: Tensor
    bitmask: Tensor | None = None
    scales: Tensor | None = None


def refusal() -> str | None:
    """Say why the kernels cannot be used, for people; None when they can."""
    return _loaded()[1]


def instruction_set() -> str:
    """Name the instruction set in use: amx, avx512, avx2, neon_bf16, neon or portable."""
    name: bytes = _library().gblm_isa()
    return name.decode()


def use_instruction_set(name: str) -> None:
    """Use another instruction set than the best one, for tests and benchmarks.

    Raises:
        KernelError: this CPU, or this build, has no such set.
    """
    if _library().gblm_use_isa(name.encode()):
        raise KernelError(f"instruction set {name!r} is not available on this CPU.")


def compiler() -> str:
    """Name the compiler that built the library, and its version."""
    name: bytes = _library().gblm_compiler()
    return name.decode()


def prepare(source: Source, name: str = "weight") -> Tensor:
    """Turn a weight into panels.

    Returns:
        [bytes] uint8, in huge pages where the system has them.

    Raises:
        KernelError: masks, offsets and values do not agree, or a value is not finite.
    """
    library, held = _library(), _hold(source, name)
    count = ctypes.c_int64()
    pool = library.gblm_torch_pool()
    _check(library.gblm_panels_bytes(ctypes.byref(held[0]), pool, ctypes.byref(count)), name)
    panels = allocate(count.value)
    _check(library.gblm_prepare(ctypes.byref(held[0]), pool, panels.data_ptr(), count.value), name)
    return panels


def unpack(panels: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Undo `prepare`.

    Args:
        panels: [bytes] uint8.

    Returns:
        Values [out, in], bfloat16 or int8 codes, 0 where none is kept; their mask [out, in] bool;
        and the scales of codes [out, in/group] bfloat16, of the groups in the panels.

    Raises:
        KernelError: these are no panels, or damaged ones.
    """
    library, info, size = _library(), _Info(), panels.numel()
    _check(library.gblm_inspect(panels.data_ptr(), size, ctypes.byref(info)), "panels")
    shape = (info.rows, info.columns)
    values = torch.empty(shape, dtype=torch.int8 if info.group else torch.bfloat16)
    mask, scales = torch.empty(shape, dtype=torch.uint8), None
    if info.group:
        scales = torch.empty((info.rows, info.columns // info.group), dtype=torch.bfloat16)
    pointers = (values.data_ptr(), mask.data_ptr(), _pointer(scales))
    _check(library.gblm_unpack(panels.data_ptr(), size, *pointers), "panels")
    return values, mask.bool(), scales


def allocate(size: int) -> Tensor:
    """Give [size] uint8, not yet written, in huge pages where it fills them.

    Huge pages miss the TLB less. The memory comes fresh from the system, for what malloc gives out
    again stays in the pages that it was in.
    """
    if size < HUGE_PAGE:
        memory = torch.empty(size + 64, dtype=torch.uint8)
        return memory[-memory.data_ptr() % 64 :][:size]
    fresh = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory = torch.frombuffer(fresh, dtype=torch.uint8)
    start = -memory.data_ptr() % HUGE_PAGE
    with suppress(AttributeError, OSError):  # a hint, which not every system takes
        fresh.madvise(mmap.MADV_HUGEPAGE, start, size - size % HUGE_PAGE)
    return memory[start:][:size]


def read_seconds(memory: Tensor) -> float:
    """Time one read of a tensor with PyTorch's threads, in seconds: the limit of decoding."""
    library = _library()
    size = memory.numel() * memory.element_size()
    seconds: float = library.gblm_read_seconds(memory.data_ptr(), size, library.gblm_torch_pool())
    return seconds


def _hold(source: Source, name: str) -> tuple[_Source, list[Tensor]]:
    """Fill the C structure, and give the tensors that its pointers need alive."""
    rows, columns = source.shape
    _check_tensors(source, name)
    tensors = [source.data, source.starts, source.bitmask, source.scales]
    kept = [None if tensor is None else tensor.contiguous() for tensor in tensors]
    data, starts, bitmask, scales = map(_pointer, kept)
    fields = _Source(
        rows=rows, columns=columns, values=VALUES[source.values], mask=source.mask,
        group=0 if source.scales is None else columns // source.scales.shape[1],
        data=data, data_bytes=source.data.numel() * source.data.element_size(),
        bitmask=bitmask, starts=starts, scales=scales,
    )  # fmt: skip
    return fields, [tensor for tensor in kept if tensor is not None]


def _check_tensors(source: Source, name: str) -> None:
    """Raise KernelError when a tensor is not as long as the C code will read it."""
    rows, columns = source.shape
    groups = 0 if source.scales is None else source.scales.shape[-1:].numel()
    expected = {
        "data": (source.data, DTYPES[source.values], source.data.shape),
        "starts": (source.starts, torch.int64, (rows + 1,)),
        "bitmask": (source.bitmask, torch.uint8, (rows, columns // 8)),
        "scales": (source.scales, torch.bfloat16, (rows, groups)),
    }
    for part, (tensor, dtype, shape) in expected.items():
        if tensor is None:
            continue
        if tensor.dtype != dtype or tensor.shape != shape or tensor.device.type != "cpu":
            raise KernelError(
                f"{name}: {part} are {list(tensor.shape)} {tensor.dtype} on {tensor.device}; "
                f"a weight of {[rows, columns]} needs {list(shape)} {dtype} on cpu."
            )
    if source.scales is not None and (not groups or columns % groups):
        raise KernelError(f"{name}: {groups} scales a row do not divide {columns} columns.")


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _check(result: int, name: str) -> None:
    if result:
        message: bytes = _library().gblm_error(result)
        raise KernelError(f"{name}: {message.decode()}.")


def _library() -> ctypes.CDLL:
    library, reason = _loaded()
    if library is None:
        raise KernelError(f"the CPU kernels cannot be used: {reason}.")
    return library


@cache
def _loaded() -> tuple[ctypes.CDLL | None, str | None]:
    """Load the library and register its operator, or give the reason why there is none."""
    if not LIBRARY.exists():
        return None, "not built (no C++ compiler at installation)"
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        return None, f"not loadable ({error})"
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    for name, result, arguments in (
        ("panels_bytes", ctypes.c_int, [pointer] * 3),
        ("prepare", ctypes.c_int, [pointer, pointer, pointer, number]),
        ("inspect", ctypes.c_int, [pointer, number, pointer]),
        ("unpack", ctypes.c_int, [pointer, number, pointer, pointer, pointer]),
        ("linear", ctypes.c_int, [pointer, number, pointer, number, pointer, pointer]),
        ("error", ctypes.c_char_p, [ctypes.c_int]),
        ("isa", ctypes.c_char_p, []),
        ("use_isa", ctypes.c_int, [ctypes.c_char_p]),
        ("compiler", ctypes.c_char_p, []),
        ("read_seconds", ctypes.c_double, [pointer, number, pointer]),
        ("register_torch", ctypes.c_int, [ctypes.c_char_p]),
        ("torch_pool", pointer, []),
    ):
        function = getattr(library, f"gblm_{name}")
        function.restype, function.argtypes = result, arguments
    libtorch = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    if library.gblm_register_torch(str(libtorch).encode()):
        return None, f"PyTorch {torch.__version__} lacks the stable C ABI of 2.10"
    return library, None
