"""A place of the GPU check that is this CPU, and a stand-in for PyTorch's 2:4 libraries."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from gpu_emulated import emulated
from torch import Tensor

from gblm.formats import Format, Shape
from gblm.gpu_check.place import Call, Place, Timing
from gblm.kernels import Backend
from gblm.kernels.autotune import Answers, Autotuner
from gblm.kernels.cuda.delta import Delta
from gblm.kernels.cuda.libraries import Library
from gblm.kernels.cuda.semi_structured import SemiStructured
from gblm.kernels.cuda.sparse_tensor_core import SparseTensorCore


class CpuPlace(Place):
    """Calls once, by the clock of the host."""

    def __init__(self, backends: Mapping[str, Backend]) -> None:
        self.device, self.backends, self.cold_bytes = torch.device("cpu"), backends, 0
        self.timed = 0

    def facts(self) -> dict[str, Any]:
        return {"gpu": "none", "torch": torch.__version__}

    def time(self, calls: Sequence[Call]) -> Timing:
        times = []
        for call in calls:
            began = time.perf_counter()
            call()
            times.append(time.perf_counter() - began)
        self.timed += 1
        return Timing.over(times, captured=False)

    def replayed(self, call: Callable[[], Tensor]) -> Tensor:
        return call()

    def answers(self) -> dict[str, str]:
        return {}

    def synchronize(self) -> None:
        pass

    def release(self) -> None:
        pass


class OnCpu(Backend):
    """A backend for GPUs that refuses no CPU."""

    packed = True

    def __init__(self, inner: SparseTensorCore | SemiStructured | Delta) -> None:
        self.name, self.inner = inner.name, inner  # type: ignore[misc]

    def refuses(
        self, fmt: Format, shape: Shape, dtype: torch.dtype, device: torch.device
    ) -> str | None:
        if isinstance(self.inner, Delta):
            return self.inner.refuses_weight(fmt, shape, dtype)
        return SparseTensorCore().refuses_weight(fmt, dtype)

    def prepare(self, *arguments: Any) -> list[Tensor]:
        return self.inner.prepare(*arguments)

    def linear(self, *arguments: Any) -> Tensor:
        return self.inner.linear(*arguments)


def emulated_backends(folder: Path) -> dict[str, Backend]:
    """Those of CUDA, on the emulated GPU."""
    tuner = Autotuner(Answers(folder / "answers"), ("emulated",), _seconds, lambda: False)
    made = (
        SemiStructured(lambda _: emulated(), lambda _: tuner),
        SparseTensorCore(lambda _: emulated()),
        Delta(lambda _: emulated()),
    )
    return {backend.name: OnCpu(backend) for backend in made}


def _seconds(call: Callable[[], object]) -> float:
    call()
    return 1.0


class FakeLibrary(Library):
    """Multiplies with a dense weight that it calls packed; 8 tokens at a time."""

    def __init__(self, name: str, num_tensors: int = 1) -> None:
        self.name, self.num_tensors = name, num_tensors  # type: ignore[misc]
        self.algorithms: list[int] = []
        self.searches = 0

    def missing(self) -> str | None:
        return None

    def constraints(self, dtype: torch.dtype) -> Any:
        return SimpleNamespace(sparse_min_rows=16, sparse_min_cols=16, dense_min_rows=8)

    def pack(self, dense: Tensor) -> list[Tensor]:
        return [dense.t().contiguous(), *[dense.new_zeros(1)] * (self.num_tensors - 1)]

    def product(self, packed: Sequence[Tensor], x: Tensor, algorithm: int) -> Tensor:
        assert len(packed) == self.num_tensors
        assert len(x) % 8 == 0
        self.algorithms.append(algorithm)
        return x @ packed[0]

    def search(self, packed: Sequence[Tensor], x: Tensor) -> int:
        assert len(x) % 8 == 0
        self.searches += 1
        return 7
