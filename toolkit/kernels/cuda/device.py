"""One GPU: its compiled kernels, and launches on PyTorch's current stream."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from gblm.kernels.cuda import nvrtc
from gblm.kernels.cuda.driver import Driver, Value
from gblm.kernels.cuda.source import Variant

OLDEST, NEWEST = (8, 0), (12, 1)
THREADS = 256


class Device:
    """Launches kernels; compiles each variant when it is first asked for.

    Attributes:
        arch: compute capability.
        num_sms: multiprocessors.
        max_shared: bytes of shared memory that a block may have.
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
            variant: of a source file.
            name: of the kernel.
            grid: blocks.
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
        """The handle of the stream that launches go to."""
        return int(torch.cuda.current_stream().cuda_stream)


@cache
def device(index: int) -> Device:
    """The CUDA device that PyTorch counts as `index`.

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
    """The CUDA device that holds a tensor."""
    return device(x.device.index or 0)


def refusal(where: torch.device) -> str | None:
    """Why a device cannot run the kernels, for people; None when it can."""
    if where.type != "cuda":
        return f"it runs on CUDA devices, not on {where.type}"
    if torch.version.hip is not None:
        return "AMD GPUs have no mma.sp and no CUDA driver"
    arch = torch.cuda.get_device_capability(where)
    if not OLDEST <= arch <= NEWEST:
        return f"compute capability {arch[0]}.{arch[1]} is not one of 8.0 to 12.1"
    return nvrtc.refusal()
