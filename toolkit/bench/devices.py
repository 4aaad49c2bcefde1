"""Where kernels are measured: how calls are timed on a CPU or a GPU, and how memory is read.

On a CPU with one thread, times are CPU time of the thread, so that other processes count less; with
more threads, wall time. On a GPU a CUDA graph of many calls is replayed, timed by events.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gblm.bench import noise
from gblm.errors import MachineError, UsageError
from gblm.kernels import BACKENDS, native
from gblm.provenance import machine

Call = Callable[[], object]
Clock = Callable[[], float]
# Makes some calls that were prepared for it, and gives the seconds of one.
Timed = Callable[[], float]
# Fills so many bytes, and gives what tells how fast they are read now, in GB/s.
Reader = Callable[[int], Callable[[], float]]

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
MIN_COLD, READS = 128 << 20, 3
# A block is the calls of one linear in one round; reading the clock must not count in it.
BLOCK_SECONDS, CLOCK_SECONDS, MIN_CALLS, MAX_CALLS = 0.02, 1e-4, 3, 1000
# A graph shall run long beside the time that its own launch takes.
GRAPH_SECONDS, MAX_GRAPH = 2e-3, 256


@dataclass(frozen=True)
class Device:
    """A device is where linears run; tests put another in its place.

    `usual` are the backends that are measured unasked, the preferred first; `cold` is how many
    bytes its caches cannot hold.
    """

    where: torch.device
    usual: Sequence[str]
    cold: int
    timer: Callable[[Sequence[Call]], Timed]
    reader: Reader
    facts: Mapping[str, Any] = field(default_factory=dict)

    def normal(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Draw seeded normal numbers on the device."""
        generator = torch.Generator(self.where).manual_seed(0)
        return torch.randn(shape, generator=generator, device=self.where, dtype=dtype)


@contextmanager
def cpu(threads: int) -> Iterator[Device]:
    """Set PyTorch's threads for the block, and set them back.

    Raises:
        UsageError: there are not so many cores.
        MachineError: the kernels are not built.
    """
    if reason := native.refusal():
        raise MachineError(f"there are no CPU kernels to measure: {reason}.")
    if threads > (cores := machine()["cores"]):
        raise UsageError(f"{threads} threads: this process may use {cores} cores.")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    clock = time.thread_time if threads == 1 else time.perf_counter
    cold = max(MIN_COLD, 2 * last_level_cache())
    try:
        yield Device(
            torch.device("cpu"), ("cpu",), cold, partial(block_timer, clock),
            partial(noise.reader, clock, READS), _cpu_facts(clock),
        )  # fmt: skip
    finally:
        torch.set_num_threads(before)


def gpu() -> Device:
    """Take PyTorch's current CUDA device and every backend that was written for one.

    Raises:
        MachineError: there is no such device.
    """
    if not torch.cuda.is_available():
        raise MachineError("--device cuda needs a CUDA device; PyTorch sees none.")
    device = torch.device("cuda", torch.cuda.current_device())
    found: Any = torch.cuda.get_device_properties(device)
    facts = {
        "capability": f"{found.major}.{found.minor}", "cuda": torch.version.cuda,
        "multiprocessors": found.multi_processor_count, "memory_bytes": found.total_memory,
        "last_level_cache": found.L2_cache_size,
    }  # fmt: skip
    names = [name for name, backend in BACKENDS.items() if backend.needs == device.type]
    return Device(device, names, 3 * found.L2_cache_size, graph_timer, _graph_reader, facts)


def block_timer(clock: Clock, calls: Sequence[Call]) -> Timed:
    """Time blocks of calls, of some 20 ms each, by a clock; a block's median call counts."""
    turn = cycle(calls)

    def timed(number: int) -> float:
        began = clock()
        for _ in range(number):
            next(turn)()
        return (clock() - began) / number

    timed(len(calls))  # oneDNN compiles for each copy of a weight
    once = max(1e-7, statistics.median(timed(1) for _ in range(MIN_CALLS)))
    together = max(1, round(CLOCK_SECONDS / once))
    times = min(MAX_CALLS, max(MIN_CALLS, round(BLOCK_SECONDS / once / together)))
    return lambda: statistics.median(timed(together) for _ in range(times))


def graph_timer(calls: Sequence[Call]) -> Timed:
    """Capture a CUDA graph of the calls, repeated for about 2 ms, and time its replays."""
    _run(calls)  # compiles
    once = max(_elapsed(partial(_run, calls)), 1e-6)
    times = max(1, min(math.ceil(GRAPH_SECONDS / once), MAX_GRAPH // len(calls)))
    repeated = [*calls] * times
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _run(repeated)
    graph.replay()
    return lambda: _elapsed(graph.replay) / len(repeated)


def last_level_cache() -> int:
    """Find the bytes of the largest cache of a core; 32 MiB where the system does not say."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    found = [file.read_text().strip() for file in CACHES.glob("index*/size")]
    sizes = [int(text[:-1]) * units[text[-1]] for text in found if text[-1:] in units]
    return max(sizes, default=32 << 20)


def _run(calls: Sequence[Call]) -> None:
    for call in calls:
        call()


def _elapsed(work: Call) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return 1e-3 * float(begin.elapsed_time(end))


def _graph_reader(size: int) -> Callable[[], float]:
    memory = torch.ones(size, dtype=torch.uint8, device="cuda")
    seconds = graph_timer([memory.view(torch.int32).amax])
    return lambda: memory.nbytes / seconds() / 1e9


def _cpu_facts(clock: Clock) -> dict[str, Any]:
    """Collect what decides about speed besides the provenance."""
    return {
        "instruction_set": native.instruction_set(),
        "compiler": native.compiler(),
        "cpu_model": machine()["cpu_model"],
        "threads": torch.get_num_threads(),
        "clock": "CPU time of the thread" if clock is time.thread_time else "wall time",
        "last_level_cache": last_level_cache(),
        "load_average": os.getloadavg()[0],
    }
