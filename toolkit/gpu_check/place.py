"""Place: a device, the backends that are checked on it, and how calls are timed there."""

from __future__ import annotations

import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gblm.errors import MachineError
from gblm.gpu_check.library import library_backends
from gblm.kernels import BACKENDS, Backend
from gblm.kernels.cuda.semi_structured import SemiStructured
from gblm.kernels.cuda.tuning import tuner

Call = Callable[[], object]
PLENTIFUL = "semi_structured plentiful"

REPLAYS = 7
# A graph shall run long beside the time that its own launch takes.
GRAPH_SECONDS, MAX_CALLS = 2e-3, 256


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, medians and extremes over the repetitions of all calls.

    Attributes:
        seconds: the median.
        low: the least.
        high: the most.
        captured: whether a CUDA graph was replayed; else the host launched every kernel.
    """

    seconds: float
    low: float
    high: float
    captured: bool

    @classmethod
    def over(cls, times: Sequence[float], captured: bool) -> Timing:
        """Of some measurements."""
        return cls(statistics.median(times), min(times), max(times), captured)


class Place(ABC):
    """Where the check runs.

    Attributes:
        device: of all tensors.
        backends: what is checked, by the name in the record.
        cold_bytes: more than the caches hold.
    """

    device: torch.device
    backends: Mapping[str, Backend]
    cold_bytes: int

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What decides about speed, as plain JSON types."""

    @abstractmethod
    def time(self, calls: Sequence[Call]) -> Timing:
        """Time calls that are alike, each with data of its own, one after the other."""

    @abstractmethod
    def replayed(self, call: Callable[[], Tensor]) -> Tensor:
        """What a CUDA graph of the call writes when it is replayed over NaN."""

    @abstractmethod
    def answers(self) -> dict[str, str]:
        """What the autotuner has chosen in this process, by question."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait for all work."""

    @abstractmethod
    def release(self) -> None:
        """Give back memory that nothing holds any more."""

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
        """Seeded normal numbers on the device."""
        generator = torch.Generator(self.device).manual_seed(seed)
        drawn = torch.randn(shape, generator=generator, device=self.device)
        return drawn.to(dtype)


class Cuda(Place):
    """A CUDA device of this machine, and all backends that need one.

    Raises:
        MachineError: there is none.
    """

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise MachineError("the GPU check needs a CUDA device; PyTorch sees none.")
        self.device = torch.device("cuda", torch.cuda.current_device())
        needs_one = {name: one for name, one in BACKENDS.items() if one.needs == "cuda"}
        self.backends = {
            **needs_one,
            PLENTIFUL: SemiStructured(plentiful=True),
            **library_backends(),
        }
        self._properties: Any = torch.cuda.get_device_properties(self.device)
        self.cold_bytes = 3 * self._properties.L2_cache_size

    def facts(self) -> dict[str, Any]:
        """Of PyTorch."""
        major, minor = torch.cuda.get_device_capability(self.device)
        free, total = torch.cuda.mem_get_info(self.device)
        return {
            "gpu": torch.cuda.get_device_name(self.device),
            "capability": f"{major}.{minor}",
            "multiprocessors": self._properties.multi_processor_count,
            "l2_bytes": self._properties.L2_cache_size,
            "memory_bytes": total,
            "free_bytes": free,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "cusparselt": torch.backends.cusparselt.version(),
        }

    def time(self, calls: Sequence[Call]) -> Timing:
        """By events around replays of one CUDA graph of all calls; eagerly if it takes no graph."""
        for call in calls:
            call()
        once = max(self._elapsed(lambda: _run(calls)), 1e-6)
        rounds = max(1, min(math.ceil(GRAPH_SECONDS / once), MAX_CALLS // len(calls)))
        repeated = list(calls) * rounds
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                _run(repeated)
            captured = True
        except RuntimeError:
            torch.cuda.synchronize(self.device)
            captured = False
        work = graph.replay if captured else lambda: _run(repeated)
        work()
        times = [self._elapsed(work) / len(repeated) for _ in range(REPLAYS)]
        return Timing.over(times, captured)

    def _elapsed(self, work: Callable[[], object]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        return 1e-3 * float(begin.elapsed_time(end))

    def replayed(self, call: Callable[[], Tensor]) -> Tensor:
        """See Place.replayed."""
        call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call()
        out.fill_(torch.nan)
        graph.replay()
        return out.clone()

    def answers(self) -> dict[str, str]:
        """See Place.answers."""
        settled = tuner(self.device.index).settled
        return {" ".join(map(str, key)): answer for key, answer in settled.items()}

    def synchronize(self) -> None:
        """See Place.synchronize."""
        torch.cuda.synchronize(self.device)

    def release(self) -> None:
        """See Place.release."""
        torch.cuda.empty_cache()


def _run(calls: Sequence[Call]) -> None:
    for call in calls:
        call()
