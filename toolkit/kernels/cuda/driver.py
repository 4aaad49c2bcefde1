"""The CUDA driver: load a compiled module, find a kernel in it, launch it on a stream.

Plain ctypes on libcuda, which every machine with an NVIDIA driver has; PyTorch has initialised it
and made its context current by the time a tensor lies on a device.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

from gblm.errors import MachineError

LIBRARY = "libcuda.so.1"
# CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
MAX_DYNAMIC_SHARED = 8
STATIC_LIMIT = 48 << 10
Value = ctypes.c_void_p | ctypes.c_int32


class Driver:
    """libcuda, or a library with the same functions.

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
        """A module's handle, in the current context.

        Raises:
            MachineError: the driver cannot run the image.
        """
        module = ctypes.c_void_p()
        self._call("cuModuleLoadData", ctypes.byref(module), image)
        return module.value or 0

    def function(self, module: int, name: str, shared: int = 0) -> int:
        """A kernel's handle.

        Args:
            module: from `load`.
            name: of the kernel, an extern "C" function.
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
        """Put one launch on a stream; returns at once.

        Args:
            function: from `function`.
            grid: blocks.
            block: threads of a block.
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
