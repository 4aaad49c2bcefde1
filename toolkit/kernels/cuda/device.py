"""One GPU: libcuda, the kernels that are loaded on it, and launches on PyTorch's current stream.

libcuda is called by plain ctypes: every machine with an NVIDIA driver has it, and PyTorch has
initialised it and made its context current by the time a tensor lies on a device.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gblm.errors import MachineError
from gblm.kernels.cuda import nvrtc
from gblm.kernels.cuda.nvrtc import Variant
from gblm.kernels.few_tokens import FewTokens

LIBRARY = "libcuda.so.1"
# CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
MAX_DYNAMIC_SHARED = 8
STATIC_LIMIT = 48 << 10
Value = ctypes.c_void_p | ctypes.c_int32
# Compute capabilities that the kernels are written for.
OLDEST, NEWEST = (8, 0), (12, 1)
THREADS = 256


class Driver:
    """A Driver is libcuda, or a library with the same functions.

    Raises:
        MachineError: there is none.
    """

    def __init__(self, library: str | Path = LIBRARY) -> None:
        try:
            self._library = ctypes.CDLL(str(library))
        except OSError as error:
            raise MachineError(f"the CUDA driver could not be loaded: {error}.") from error
        pointer, number = ctypes.c_void_p, ctypes.c_uint
        self._declare("cuInit", number)
        self._declare("cuModuleLoadData", pointer, pointer)
        self._declare("cuModuleGetFunction", pointer, pointer, ctypes.c_char_p)
        self._declare("cuFuncSetAttribute", pointer, ctypes.c_int, ctypes.c_int)
        self._declare("cuLaunchKernel", pointer, *[number] * 7, pointer, pointer, pointer)
        self._declare("cuGetErrorString", ctypes.c_int, pointer)
        self._call("cuInit", 0)

    def load(self, image: bytes) -> int:
        """Load a cubin into the current context and give the module's handle.

        Raises:
            MachineError: the driver cannot run the image.
        """
        module = ctypes.c_void_p()
        self._call("cuModuleLoadData", ctypes.byref(module), image)
        return module.value or 0

    def function(self, module: int, name: str, shared: int = 0) -> int:
        """Find a kernel in a module and give its handle.

        Args:
            module: what `load` gave.
            name: the kernel's name, that of an extern "C" function.
            shared: bytes of dynamic shared memory that launches will ask for at most.

        Raises:
            MachineError: there is no such kernel, or not so much shared memory.
        """
        found = ctypes.c_void_p()
        self._call("cuModuleGetFunction", ctypes.byref(found), module, name.encode())
        if shared > STATIC_LIMIT:
            self._call("cuFuncSetAttribute", found, MAX_DYNAMIC_SHARED, shared)
        return found.value or 0

    def launch(
        self,
        function: int,
        grid: int,
        block: int,
        values: Sequence[Value],
        shared: int = 0,
        stream: int = 0,
    ) -> None:
        """Put one launch on a stream and return at once.

        Args:
            function: what `function` gave.
            grid: number of blocks.
            block: number of threads in a block.
            values: the kernel's arguments, in order.
            shared: bytes of dynamic shared memory.
            stream: the handle of a CUDA stream.

        Raises:
            MachineError: the driver refuses.
        """
        addresses = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        sizes = (grid, 1, 1, block, 1, 1, shared)
        self._call("cuLaunchKernel", function, *sizes, stream, addresses, None)

    def _declare(self, name: str, *arguments: type) -> None:
        function = getattr(self._library, name)
        function.restype, function.argtypes = ctypes.c_int, arguments

    def _call(self, name: str, *arguments: object) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(code, ctypes.byref(text))
            why = (text.value or b"unknown error").decode()
            raise MachineError(f"{name} failed: {why} (error {code}).")


class Device:
    """A GPU that launches kernels and compiles each variant when it is first asked for.

    `arch` is its compute capability, `num_sms` the number of its multiprocessors, and `max_shared`
    the bytes of shared memory that a block may have.
    """

    def __init__(
        self,
        driver: Driver,
        build: Callable[[Variant], bytes],
        arch: tuple[int, int],
        num_sms: int,
        max_shared: int,
    ) -> None:
        self.arch, self.num_sms, self.max_shared = arch, num_sms, max_shared
        self._driver, self._build = driver, build
        self._modules: dict[Variant, int] = {}
        self._functions: dict[tuple[Variant, str], int] = {}

    def launch(
        self,
        variant: Variant,
        name: str,
        grid: int,
        arguments: Sequence[Tensor | int],
        shared: int = 0,
    ) -> None:
        """Launch the kernel `name` of a variant with blocks of 256 threads.

        Args:
            variant: the compilation that holds the kernel.
            name: the kernel's name.
            grid: number of blocks.
            arguments: tensors are handed over as pointers, numbers as int.
            shared: bytes of dynamic shared memory.

        Raises:
            MachineError: it cannot be compiled, loaded or launched.
        """
        function = self._functions.get((variant, name))
        if function is None:
            function = self.prepare(variant, name)
        values: list[Value] = [
            ctypes.c_void_p(one.data_ptr()) if isinstance(one, Tensor) else ctypes.c_int32(one)
            for one in arguments
        ]
        self._driver.launch(function, grid, THREADS, values, shared, self.stream())

    def prepare(self, variant: Variant, name: str) -> int:
        """Compile and load, so that no launch has to: CUDA graphs cannot be captured meanwhile."""
        if variant not in self._modules:
            self._modules[variant] = self._driver.load(self._build(variant))
        function = self._driver.function(self._modules[variant], name, self.max_shared)
        self._functions[variant, name] = function
        return function

    def stream(self) -> int:
        """Give the handle of PyTorch's current stream, which launches go to."""
        return int(torch.cuda.current_stream().cuda_stream)


@cache
def device(index: int) -> Device:
    """Open the CUDA device that PyTorch counts as `index`.

    Raises:
        MachineError: there is no driver.
    """
    facts: Any = torch.cuda.get_device_properties(index)
    arch = (facts.major, facts.minor)
    return Device(
        driver=Driver(),
        build=lambda variant: nvrtc.cubin(variant, arch),
        arch=arch,
        num_sms=facts.multi_processor_count,
        max_shared=facts.shared_memory_per_block_optin,
    )


def device_of(x: Tensor) -> Device:
    """Find the CUDA device that holds a tensor."""
    return device(x.device.index or 0)


def refusal(where: torch.device) -> str | None:
    """Say why a device cannot run the kernels, for people; None when it can."""
    if where.type != "cuda":
        return f"it runs on CUDA devices, not on {where.type}"
    if torch.version.hip is not None:
        return "AMD GPUs have no mma.sp and no CUDA driver"
    arch = torch.cuda.get_device_capability(where)
    if not OLDEST <= arch <= NEWEST:
        return f"compute capability {arch[0]}.{arch[1]} is not one of 8.0 to 12.1"
    return nvrtc.refusal()


class CudaBackend(FewTokens):
    """A backend whose kernels are the text of this folder."""

    def __init__(self, device_of: Callable[[Tensor], Device] = device_of) -> None:
        """Take `device_of`, which finds the device of activations; tests emulate one."""
        self._device_of = device_of

    def refuses_device(self, device: torch.device) -> str | None:
        """Say why a device cannot run the kernels, for people; None when it can."""
        return refusal(device)
