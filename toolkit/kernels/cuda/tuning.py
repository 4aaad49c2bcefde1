"""The autotuner of a CUDA device: its timer, and what its answers depend on."""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from gblm.kernels.autotune import Answers, Autotuner, Key
from gblm.kernels.cuda.source import read

WARM_UP, REPEATS = 2, 7


class EventTimer:
    """Seconds of a call on the current stream, by events; caches hold none of its data before."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, call: Callable[[], object]) -> float:
        """The median of some calls; waits for the device."""
        properties: Any = torch.cuda.get_device_properties(self.device)
        flush = torch.empty(2 * properties.L2_cache_size, dtype=torch.uint8, device=self.device)
        for _ in range(WARM_UP):
            call()
        events = []
        for _ in range(REPEATS):
            flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            events.append((begin, end))
        events[-1][1].synchronize()
        return 1e-3 * statistics.median(float(begin.elapsed_time(end)) for begin, end in events)


def facts(device: torch.device) -> Key:
    """What times depend on: the GPU, the versions of what runs on it, gblm's kernels."""
    major, minor = torch.cuda.get_device_capability(device)
    kernels = hashlib.sha256(read("mma_sp.cu").encode()).hexdigest()[:8]
    return (
        torch.cuda.get_device_name(device).replace(" ", "-"),
        f"sm_{major}{minor}",
        f"torch-{torch.__version__}",
        f"cuda-{torch.version.cuda}",
        f"cusparselt-{torch.backends.cusparselt.version()}",
        f"mma_sp-{kernels}",
    )


@cache
def tuner(index: int) -> Autotuner:
    """The one of the CUDA device that PyTorch counts as `index`."""
    device = torch.device("cuda", index)
    timer, capturing = EventTimer(device), torch.cuda.is_current_stream_capturing
    return Autotuner(Answers(), facts(device), timer, capturing)


def tuner_of(x: Tensor) -> Autotuner:
    """The one of the CUDA device that holds a tensor."""
    return tuner(x.device.index or 0)
