"""What a GPU must prove: every backend's products, and pruning on the device. `make test-gpu`."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from weights import moved, product, stored, weight_of

from gblm.kernels import BACKENDS, Backend, experts, linear
from gblm.kernels.few_tokens import FewTokens
from gblm.kernels.triton.backend import Triton
from gblm.model.folder import ModelFolder
from gblm.model.layers import stream
from gblm.prune import prune
from gblm.recipe import Calibration, Recipe
from gblm.sparse.formats import Format, Shape, from_spec
from gblm.sparse.weights import SparseWeight

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
BF16, FP16 = torch.bfloat16, torch.float16

# Every value type and size of group; rows that fill no tile, and columns that fill none.
TWO_FOUR = [
    ("nm/2:4", (200, 1160), BF16),
    ("nm/2:4", (512, 4096), FP16),
    ("nm/2:4/int8:row", (200, 1160), FP16),
    ("nm/2:4/int8:128", (200, 1152), BF16),
    ("nm/2:4/int4:32", (200, 1184), BF16),
    ("nm/2:4/int4:128", (512, 4096), FP16),
]
OTHERS = [
    ("bitmask/0.5", (200, 1160), BF16),
    ("bitmask/0.7", (512, 4096), FP16),
    ("nm/4:8", (200, 1160), BF16),
    ("bitmask/0.5/int8:128", (200, 1152), FP16),
    ("bitmask/0.5/int4:32", (200, 1184), BF16),
]
# Both sides of every limit at which a backend takes another way.
TOKENS = (1, 2, 8, 9, 16, 17, 64, 65, 200)
FOR_GPUS = [name for name, backend in BACKENDS.items() if backend.needs == "cuda"]
GPU_CASES = [
    *((name, *case) for name in FOR_GPUS for case in TWO_FOUR),
    *((name, *case) for name in FOR_GPUS if name != "mma_sp" for case in OTHERS),
]
CASES = [
    *GPU_CASES,
    *((name, *case) for name in ("reference", "dense") for case in (*TWO_FOUR[:1], *OTHERS[:1])),
]


@dataclass(frozen=True)
class Prepared:
    """A weight on the device, on one backend."""

    backend: Backend
    fmt: Format
    weight: SparseWeight
    parts: dict[str, Tensor]
    tensors: list[Tensor]
    dtype: torch.dtype

    @property
    def shape(self) -> Shape:
        return (self.weight.mask.shape[0], self.weight.mask.shape[1])

    def x(self, tokens: int) -> Tensor:
        generator = torch.Generator().manual_seed(tokens)
        return torch.randn(tokens, self.shape[1], generator=generator).to(CUDA, self.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x, self.tensors, self.shape, self.fmt, self.backend)

    def error(self, got: Tensor, x: Tensor) -> float:
        """Relative, to the nearer of what may be multiplied: codes, or codes rounded once."""
        rounded = self.fmt.expand(self.parts, self.dtype).double()
        found = []
        for want in (x.double() @ rounded.t(), product(self.weight, x)):
            once = want.to(got.dtype).double()
            found.append(float((got.double() - once).norm() / once.norm()))
        assert bool(got.isfinite().all()), "an output was not written"
        return min(found)


def prepare(name: str, spec: str, shape: Shape, dtype: torch.dtype) -> Prepared:
    fmt, backend = from_spec(spec), BACKENDS[name]
    assert backend.refuses(fmt, shape, dtype, CUDA) is None
    weight = weight_of(fmt, shape, dtype).to(dtype, CUDA)
    parts = fmt.pack("w", weight)
    return Prepared(backend, fmt, weight, parts, backend.prepare(fmt, parts, shape, dtype), dtype)


@contextmanager
def poisoned() -> Iterator[None]:
    """New memory is NaN, so that an output which a kernel leaves out is seen."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.set_deterministic_debug_mode("warn")
        try:
            yield
        finally:
            torch.set_deterministic_debug_mode("default")


@pytest.mark.parametrize(("name", "spec", "shape", "dtype"), CASES, ids=str)
def test_products_equal_float64(name: str, spec: str, shape: Shape, dtype: torch.dtype) -> None:
    made = prepare(name, spec, shape, dtype)
    # The unit roundoff: cuBLAS may round partial sums of the expanded weight once more.
    bound = torch.finfo(dtype).eps / 2
    for tokens in TOKENS:
        x = made.x(tokens)
        with poisoned():
            got = made(x)
        assert made.error(got, x) < bound, tokens


@pytest.mark.parametrize(("name", "spec", "shape", "dtype"), GPU_CASES, ids=str)
def test_the_expanded_weight_is_that_of_the_format(
    name: str, spec: str, shape: Shape, dtype: torch.dtype
) -> None:
    made = prepare(name, spec, shape, dtype)
    assert isinstance(made.backend, FewTokens)
    with poisoned():
        dense = made.backend.expand(made.x(1), made.tensors, made.fmt, shape)
    assert torch.equal(dense, made.fmt.expand(made.parts, dtype))


@pytest.mark.parametrize("tokens", [1, 17, 65])
@pytest.mark.parametrize("spec", ["nm/2:4", "nm/2:4/int4:128"])
@pytest.mark.parametrize("name", FOR_GPUS)
def test_calls_are_captured_in_graphs_and_wait_for_nothing(
    name: str, spec: str, tokens: int
) -> None:
    made = prepare(name, spec, (512, 1024), BF16)
    x = made.x(tokens)
    made(x)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        made(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = made(x)
    captured.fill_(torch.nan)
    graph.replay()
    assert made.error(captured, x) < torch.finfo(BF16).eps / 2


EXPERTS, CHOSEN, HIDDEN, INNER = 9, 2, 256, 384


def stacks_of(spec: str) -> tuple[list[experts.Expert], list[experts.Stack]]:
    """Gate, up and down of experts in bfloat16: in float64, and stacked on the device."""
    fmt, weights, stacks = from_spec(spec), [], []
    for shape in ((INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER)):
        own = [
            moved(weight_of(fmt, shape), 7 * len(weights) + index).to(BF16, CUDA)
            for index in range(EXPERTS)
        ]
        parts = fmt.join([fmt.pack("w", weight) for weight in own])
        prepared = BACKENDS["triton"].prepare(fmt, parts, (EXPERTS * shape[0], shape[1]), BF16)
        weights.append(own)
        stacks.append(experts.Stack(fmt, shape, prepared))
    linears = [
        tuple(lambda x, w=weight: product(w, x).to(BF16) for weight in expert)
        for expert in zip(*weights, strict=True)
    ]
    return linears, stacks


@pytest.mark.parametrize("tokens", [1, 2, 16, 17, 300])
@pytest.mark.parametrize("spec", ["nm/2:4", "nm/2:4/int4:32", "bitmask/0.5/int8:128"])
def test_experts_are_those_called_one_by_one_and_captured_in_graphs(spec: str, tokens: int) -> None:
    backend = BACKENDS["triton"]
    assert isinstance(backend, Triton)
    linears, stacks = stacks_of(spec)
    seed = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, HIDDEN, generator=seed).to(CUDA, BF16)
    ids = torch.rand(tokens, EXPERTS, generator=seed).argsort(1)[:, :CHOSEN].to(CUDA)
    ids[::5, 0] = -1
    shares = torch.rand(tokens, CHOSEN, generator=seed).to(CUDA)
    want = experts.one_by_one(x, ids, shares, linears).double()
    with poisoned():
        experts.stacked(x, ids, shares, stacks, EXPERTS, backend)  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            got = experts.stacked(x, ids, shares, stacks, EXPERTS, backend)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = experts.stacked(x, ids, shares, stacks, EXPERTS, backend)
    captured.fill_(torch.nan)
    graph.replay()
    for one in (got, captured):
        assert float((one.double() - want).norm() / want.norm()) < torch.finfo(BF16).eps / 2


def recipe(tiny: Path, text: Path, device: str, **more: Any) -> Recipe:
    calibration = Calibration(source=str(text), num_samples=4, seq_len=32)
    fields = {"model": str(tiny), "dtype": "float32", "calibration": calibration} | more
    return Recipe(device=device, **fields)


def pairs_of(first: Path, second: Path) -> Iterator[tuple[SparseWeight, SparseWeight]]:
    """The weights of each linear in two packed folders."""
    other = stored(second)
    yield from ((weight, other[name][1]) for name, (_, weight) in stored(first).items())


def different_bits(first: Path, second: Path) -> float:
    """The share of the masks' bits in which two packed folders differ."""
    wrong = [(one.mask != two.mask).flatten() for one, two in pairs_of(first, second)]
    return float(torch.cat(wrong).float().mean())


def largest_difference(first: Path, second: Path) -> float:
    """Of two packed folders' weights, relative in the norm of a linear; the largest of all."""
    pairs = ((a.weight.double(), b.weight.double()) for a, b in pairs_of(first, second))
    return max(float((left - right).norm() / left.norm()) for left, right in pairs)


# Rounding on the device is another; a bit of a mask flips where two scores are nearly equal.
@pytest.mark.parametrize("pattern", ["2:4", "0.5"])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "alps", "gblm"])
def test_masks_equal_those_of_the_cpu(
    tiny: Path, text_file: Path, tmp_path: Path, method: str, pattern: str
) -> None:
    for device in ("cpu", "cuda"):
        asked = recipe(tiny, text_file, device, method=method, pattern=pattern)
        prune(asked, tmp_path / device)
    assert different_bits(tmp_path / "cpu", tmp_path / "cuda") < 0.01


@pytest.mark.parametrize(
    "steps",
    [
        {"refit": {}},
        {"reconstruct": {"epochs": 1}},
        {"method": "sparsegpt", "values": "int4:32", "rounding": "obs"},
        {"pattern": "dense", "values": "int4:32", "rounding": "obs"},
    ],
    ids=["refit", "reconstruct", "joint rounding", "gptq"],
)
def test_steps_after_the_mask_give_the_weights_of_the_cpu(
    tiny: Path, text_file: Path, tmp_path: Path, steps: dict[str, Any]
) -> None:
    for device in ("cpu", "cuda"):
        prune(recipe(tiny, text_file, device, **({"method": "wanda"} | steps)), tmp_path / device)
    assert different_bits(tmp_path / "cpu", tmp_path / "cuda") < 0.01
    assert largest_difference(tmp_path / "cpu", tmp_path / "cuda") < 0.05


def test_layers_are_dropped(tiny: Path) -> None:
    with stream(ModelFolder.open(tiny), device="cuda") as layers:
        with layers.open(0) as module:
            assert all(p.is_cuda for p in module.parameters())
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        with layers.open(1):
            pass
        assert torch.cuda.memory_allocated() <= before


@pytest.mark.skipif(
    torch.cuda.device_count() < 2,
    reason="one CUDA device: `make test-gpu` runs this where there are two",
)
def test_two_devices_share_the_samples(tiny: Path, text_file: Path, tmp_path: Path) -> None:
    prune(recipe(tiny, text_file, "cuda", method="gblm"), tmp_path / "one")
    command: Sequence[str] = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", "gblm", "prune", str(tiny), "--method", "gblm", "--device", "cuda"),
        *("--dtype", "float32", "--calibration", str(text_file), "--num-samples", "4"),
        *("--seq-len", "32", "--output", str(tmp_path / "two")),
    ]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
    assert different_bits(tmp_path / "one", tmp_path / "two") < 0.01
