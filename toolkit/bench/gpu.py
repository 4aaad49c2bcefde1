"""`gblm bench kernels --device cuda`: packed linears and a decode loop beside PyTorch's, on a GPU.

Weights do not fit into caches when a model runs, so every call takes the next copy of its weight.
What is timed is the replay of a CUDA graph of many calls, by events. At one shape and number of
tokens all sides take turns, round by round; decode loops are too large for that, and run one after
the other.
"""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from gblm.bench.kernels import Settings
from gblm.bench.linears import Asked, check_shape, num_copies, sparse_weight
from gblm.errors import MachineError, UsageError
from gblm.kernels import BACKENDS, Backend
from gblm.progress import Progress, no_progress
from gblm.provenance import provenance
from gblm.record import Record, Row, Verdict
from gblm.sparse.formats import Shape

logger = logging.getLogger(__name__)
T = TypeVar("T")
Call = Callable[[], object]
Linear = Callable[[Tensor], Tensor]
# Makes some calls that were prepared for it, and gives the seconds of one.
Timed = Callable[[], float]

DENSE, TWO_FOUR = "torch_bf16", "torch_2:4"
FORMATS = ("nm/2:4", "bitmask/0.5", "nm/2:4/int8", "nm/2:4/int4", "bitmask/0.7")
BATCHES = (1, 8, 32)
# A graph shall run long beside the time that its own launch takes.
GRAPH_SECONDS, MAX_CALLS = 2e-3, 256


@dataclass(frozen=True)
class Sizes:
    """The shape of the decoded model, and the sizes at which the device's limits are measured."""

    layers: int = 32
    hidden: int = 4096
    inner: int = 11008
    heads: int = 32
    vocabulary: int = 32000
    context: int = 512
    read_bytes: int = 1 << 31
    square: int = 8192

    @property
    def linears(self) -> list[Shape]:
        """Give the shapes [out, in] of q, k, v in one, o, gate and up in one, down."""
        hidden, inner = self.hidden, self.inner
        return [(3 * hidden, hidden), (hidden, hidden), (2 * inner, hidden), (hidden, inner)]


@dataclass(frozen=True)
class Gpu:
    """The GPU that is measured; tests put a CPU in its place.

    `cold_bytes` is more than its caches hold; `timer` prepares calls to be timed together.
    """

    device: torch.device
    backends: Mapping[str, Backend]
    cold_bytes: int
    timer: Callable[[Sequence[Call]], Timed]
    facts: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def current(cls) -> Gpu:
        """Take PyTorch's current CUDA device and every backend that was written for one.

        Raises:
            MachineError: there is no such device.
        """
        if not torch.cuda.is_available():
            raise MachineError("--device cuda needs a CUDA device; PyTorch sees none.")
        device = torch.device("cuda", torch.cuda.current_device())
        found: Any = torch.cuda.get_device_properties(device)
        facts = {
            "capability": f"{found.major}.{found.minor}",
            "multiprocessors": found.multi_processor_count,
            "l2_bytes": found.L2_cache_size,
            "memory_bytes": found.total_memory,
            "cuda": torch.version.cuda,
        }
        backends = {name: one for name, one in BACKENDS.items() if one.needs == "cuda"}
        return cls(device, backends, 3 * found.L2_cache_size, graph_timer, facts)

    def normal(self, *shape: int) -> Tensor:
        """Draw seeded normal numbers in bfloat16 on the device."""
        generator = torch.Generator(self.device).manual_seed(0)
        options: Any = {"device": self.device, "dtype": torch.bfloat16}
        return torch.randn(shape, generator=generator, **options)


def graph_timer(calls: Sequence[Call]) -> Timed:
    """Capture a CUDA graph of the calls, repeated for about 2 ms, and time its replays."""
    _run(calls)  # compiles
    once = max(_elapsed(partial(_run, calls)), 1e-6)
    times = max(1, min(math.ceil(GRAPH_SECONDS / once), MAX_CALLS // len(calls)))
    repeated = [*calls] * times
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _run(repeated)
    graph.replay()
    return lambda: _elapsed(graph.replay) / len(repeated)


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


@dataclass(frozen=True)
class Side:
    """A side is one way to multiply by one weight; it has a call and `size` bytes for each copy."""

    name: str
    size: int
    copies: tuple[Linear, ...]


@dataclass
class Findings:
    """The findings hold the rows so far, and a sentence for each piece that failed."""

    deadline: float
    rows: list[Row] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def attempt(self, what: str, work: Callable[[], T]) -> T | None:
        """Do a piece of work unless the time is over; note what it raises."""
        if time.monotonic() > self.deadline:
            self.failed.append(f"{what}: no time was left")
            return None
        try:
            return work()
        except Exception as error:
            # One kernel that fails shall not cost the figures of all others.
            logger.debug("gblm: %s", what, exc_info=True)
            text = (str(error).splitlines() or [""])[0]
            self.failed.append(f"{what}: {type(error).__name__}: {text[:200]}")
        return None


def bench_gpu(
    settings: Settings,
    minutes: float = math.inf,
    progress: Progress = no_progress,
    gpu: Gpu | None = None,
    sizes: Sizes | None = None,
) -> Record:
    """Measure the device's limits, a decode loop, and linears at every shape × number of tokens.

    Args:
        settings: shapes, tokens, formats, backends and rounds; the rest is about CPUs.
        minutes: nothing begins when so many have passed.
        progress: shows a progress bar.
        gpu: PyTorch's current CUDA device if None.
        sizes: those of LLaMA-7B if None.

    Returns:
        The record. It is invalid when anything failed or was left out, and says what.

    Raises:
        MachineError: there is no CUDA device.
        UsageError: a format or backend does not exist, or a format does not fit a shape.
    """
    here, model = gpu or Gpu.current(), sizes or Sizes()
    here = _with_backends(here, settings.backends)
    formats = [Asked(text) for text in settings.formats or FORMATS]
    for shape in (*settings.shapes, *model.linears):
        for asked in formats:
            check_shape(asked, shape)
    found = Findings(time.monotonic() + 60 * minutes)
    origin = {**provenance(), "gpu": dict(here.facts), "settings": asdict(settings)}
    step = progress("measuring", 2 + len(settings.shapes))
    found.attempt("limits", lambda: measure_limits(here, found, model, settings.rounds))
    step()
    measure_decoding(here, found, model, formats, settings.rounds)
    step()
    for shape in settings.shapes:
        measure_linears(here, found, shape, formats, settings)
        torch.cuda.empty_cache()
        step()
    return Record(
        kind="kernels on a GPU", sides={row.side: {} for row in found.rows},
        rows=tuple(found.rows), baseline=DENSE,
        verdict=Verdict(not found.failed, tuple(found.failed)), provenance=origin,
    )  # fmt: skip


def _with_backends(gpu: Gpu, names: Sequence[str]) -> Gpu:
    """Keep the named backends; all if none is named."""
    if unknown := set(names) - set(gpu.backends):
        known = ", ".join(gpu.backends)
        raise UsageError(f"backend {min(unknown)!r} is none of those for GPUs: give {known}.")
    return replace(gpu, backends={name: gpu.backends[name] for name in names or gpu.backends})


def measure_limits(gpu: Gpu, found: Findings, sizes: Sizes, rounds: int) -> None:
    """Add what the device can do at most: bytes read and copied, operations per second."""
    numbers, square = gpu.normal(sizes.read_bytes // 2), gpu.normal(sizes.square, sizes.square)
    target = torch.empty_like(numbers)
    for load, metric, unit, amount, call in (
        ("read", "gb_s", "GB/s", numbers.nbytes / 1e9, numbers.amax),
        ("copy", "gb_s", "GB/s", 2 * numbers.nbytes / 1e9, lambda: target.copy_(numbers)),
        ("multiply", "tflop_s", "TFLOP/s", 2 * sizes.square**3 / 1e12, lambda: square @ square),
    ):
        timed = gpu.timer([call])
        rates = [amount / timed() for _ in range(rounds)]
        found.rows.append(Row.of_rounds("device", load, metric, unit, rates))


def measure_linears(
    gpu: Gpu, found: Findings, shape: Shape, formats: Sequence[Asked], settings: Settings
) -> None:
    """Add microseconds and GB/s of every side at one shape, for each number of tokens."""
    makers: dict[str, Callable[[], Side]] = {
        DENSE: partial(dense, gpu, shape),
        TWO_FOUR: partial(torch_two_four, gpu, shape),
    }
    for asked in formats:
        for name in serving(gpu, asked, [shape]):
            makers[f"{name} {asked.text}"] = partial(packed, gpu, name, asked, shape)
    where = f"{shape[0]}x{shape[1]}"
    made = [found.attempt(f"{name}, {where}", make) for name, make in makers.items()]
    for tokens in settings.tokens:
        x, load = gpu.normal(tokens, shape[1]), f"{where}, {tokens} tokens"
        prepared: dict[Side, Timed] = {}
        for side in filter(None, made):
            calls = [partial(call, x) for call in side.copies]
            timed = found.attempt(f"{side.name}, {load}", partial(gpu.timer, calls))
            if timed is not None:
                prepared[side] = timed
        found.rows += take_turns(prepared, load, settings.rounds)


def take_turns(prepared: dict[Side, Timed], load: str, rounds: int) -> list[Row]:
    """Time every side in each round; the order alternates, so that drift hits all alike."""
    seconds: dict[Side, list[float]] = {side: [] for side in prepared}
    for number in range(rounds):
        for side in prepared if number % 2 == 0 else reversed(prepared):
            seconds[side].append(prepared[side]())
    rows = []
    for side, times in seconds.items():
        rates = [side.size / one / 1e9 for one in times]
        rows.append(Row.of_rounds(side.name, load, "us", "µs", [1e6 * one for one in times]))
        rows.append(Row.of_rounds(side.name, load, "gb_s", "GB/s", rates))
    return rows


def serving(gpu: Gpu, asked: Asked, shapes: Sequence[Shape]) -> list[str]:
    """Name the backends that take weights of all these shapes [out, in], the preferred first."""
    return [
        name
        for name, backend in gpu.backends.items()
        if all(
            backend.refuses(asked.settle(shape[1]), shape, torch.bfloat16, gpu.device) is None
            for shape in shapes
        )
    ]


def packed(gpu: Gpu, name: str, asked: Asked, shape: Shape, copies: int = 0) -> Side:
    """Prepare a weight [out, in] for a backend, in so many copies; 0 is more than caches hold."""
    backend, fmt = gpu.backends[name], asked.settle(shape[1])
    parts = fmt.pack("weight", sparse_weight(fmt, gpu.normal(*shape).float()))
    prepared = backend.prepare(fmt, parts, shape, torch.bfloat16)
    size = sum(tensor.nbytes for tensor in prepared)
    number = copies or num_copies(size, gpu.cold_bytes)
    every = [prepared, *([t.clone() for t in prepared] for _ in range(number - 1))]
    calls = (partial(backend.linear, prepared=one, fmt=fmt, shape=shape) for one in every)
    return Side(f"{name} {asked.text}", size, tuple(calls))


def dense(gpu: Gpu, shape: Shape, copies: int = 0) -> Side:
    """Draw PyTorch's own weight [out, in], in so many copies; 0 is more than caches hold."""
    weight = gpu.normal(*shape)
    number = copies or num_copies(weight.nbytes, gpu.cold_bytes)
    every = [weight, *(weight.clone() for _ in range(number - 1))]
    return Side(DENSE, weight.nbytes, tuple(partial(functional.linear, weight=w) for w in every))


def torch_two_four(gpu: Gpu, shape: Shape) -> Side:
    """Draw PyTorch's own 2:4 weight [out, in], which cuSPARSELt or CUTLASS multiplies."""
    kept = torch.arange(shape[1], device=gpu.device).remainder(4).lt(2)
    weight = gpu.normal(*shape) * kept
    size = weight.nbytes * 9 // 16
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the interface is a prototype
        every = [
            torch.sparse.to_sparse_semi_structured(weight)
            for _ in range(num_copies(size, gpu.cold_bytes))
        ]
    return Side(TWO_FOUR, size, tuple(partial(functional.linear, weight=w) for w in every))


def measure_decoding(
    gpu: Gpu, found: Findings, sizes: Sizes, formats: Sequence[Asked], rounds: int
) -> None:
    """Add tokens per second of a decode loop: dense, then each format on its first backend."""
    kinds: dict[str, Callable[[Shape], Side]] = {DENSE: partial(dense, gpu, copies=sizes.layers)}
    for asked in formats:
        for name in serving(gpu, asked, sizes.linears)[:1]:
            kinds[f"{name} {asked.text}"] = partial(packed, gpu, name, asked, copies=sizes.layers)
    for name, make in kinds.items():
        decode(gpu, found, sizes, name, make, rounds)
        torch.cuda.empty_cache()


def decode(
    gpu: Gpu, found: Findings, sizes: Sizes, name: str, make: Callable[[Shape], Side], rounds: int
) -> None:
    """Add tokens per second of a decode loop whose linears `make` builds, for each batch size."""
    sides = found.attempt(f"{name}, decode loop", lambda: [make(shape) for shape in sizes.linears])
    if sides is None:
        return
    for batch in BATCHES:
        load = f"decode loop, batch {batch}"
        timed = found.attempt(f"{name}, {load}", partial(_decoder, gpu, sizes, batch, sides))
        if timed is not None:
            rates = [batch / timed() for _ in range(rounds)]
            found.rows.append(Row.of_rounds(name, load, "tok_s", "tok/s", rates))


def _decoder(gpu: Gpu, sizes: Sizes, batch: int, sides: Sequence[Side]) -> Timed:
    return gpu.timer([Decoder(gpu, sizes, batch, sides).step])


class Decoder:
    """A LLaMA's layers for a batch of sequences, one token each a step; the head is dense.

    Weights are random. Keys and values of a full context are read, those of the new token are
    written; nothing else depends on a text.
    """

    def __init__(self, gpu: Gpu, sizes: Sizes, batch: int, sides: Sequence[Side]) -> None:
        """Fill the context; `sides` are the four of `sizes.linears`, with a copy for each layer."""
        self._sizes, self._batch = sizes, batch
        self._layers = [*zip(*(side.copies for side in sides), strict=True)]
        keys = gpu.normal(batch, sizes.heads, sizes.context, sizes.hidden // sizes.heads)
        self._caches = [(keys.clone(), keys.clone()) for _ in self._layers]
        self._embedded = gpu.normal(batch, sizes.hidden)
        self._head = gpu.normal(sizes.vocabulary, sizes.hidden)

    def step(self) -> Tensor:
        """Give the most likely token of each sequence: [batch] int64."""
        hidden, width = self._embedded, (self._sizes.hidden,)
        for (qkv, o, gate_up, down), (keys, values) in zip(self._layers, self._caches, strict=True):
            normed = functional.rms_norm(hidden, width)
            parts = qkv(normed).reshape(self._batch, 3, self._sizes.heads, -1)
            query, keys[:, :, -1], values[:, :, -1] = parts.unbind(1)
            seen = functional.scaled_dot_product_attention(query.unsqueeze(2), keys, values)
            hidden = hidden + o(seen.reshape(self._batch, -1))
            gate, up = gate_up(functional.rms_norm(hidden, width)).chunk(2, dim=-1)
            hidden = hidden + down(functional.silu(gate) * up)
        return functional.linear(functional.rms_norm(hidden, width), self._head).argmax(dim=-1)
