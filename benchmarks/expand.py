"""Ways to expand a packed 2:4 weight in plain PyTorch and numpy; the code has the best one.

Writes benchmarks/results/expand.json: median nanoseconds per dense weight, and what the chunk size
of the reference backend changes; interleaved.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from pages import made_by
from torch import Tensor

from gblm.kernels import reference
from gblm.provenance import provenance
from gblm.sparse.formats import make_format
from gblm.sparse.formats.bits import expand_bits, unpack_bits
from gblm.sparse.weights import SparseWeight

RECORD = Path(__file__).resolve().parent / "results" / "expand.json"
CHUNKS = (1 << 15, 1 << 18, 1 << 30)
SHAPE, REPEATS = (448, 576), 200  # about one chunk of the reference backend


def masked_scatter(values: Tensor, bitmask: Tensor) -> Tensor:
    """torch's own, with the mask unpacked by numpy."""
    dense = torch.zeros(SHAPE, dtype=values.dtype)
    return dense.masked_scatter_(unpack_bits(bitmask), values)


def boolean_assignment(values: Tensor, bitmask: Tensor) -> Tensor:
    """numpy's a[mask] = values, on 16-bit integers."""
    dense = np.zeros(SHAPE, np.int16)
    dense[unpack_bits(bitmask).numpy()] = values.view(torch.int16).numpy().reshape(-1)
    return torch.from_numpy(dense).view(torch.bfloat16)


def cumulative_sum(values: Tensor, bitmask: Tensor) -> Tensor:
    """Positions by a running count, then a gather, then a multiplication by the mask."""
    mask = unpack_bits(bitmask).view(-1)
    index = torch.cumsum(mask, 0, dtype=torch.int32).sub_(1).clamp_(min=0)
    return (values.reshape(-1).index_select(0, index) * mask).view(SHAPE)


def byte_table(values: Tensor, bitmask: Tensor) -> Tensor:
    """Each mask byte looks up which of its four values (or zero) goes to each of 8 columns."""
    padded = torch.nn.functional.pad(values.reshape(-1, 4), (1, 0))
    return padded.gather(1, TABLE[bitmask.reshape(-1).int()]).view(SHAPE)


def _table() -> Tensor:
    bits = (torch.arange(256).unsqueeze(1) >> torch.arange(8)) & 1
    return (bits.cumsum(1) * bits).clamp(max=4)


TABLE = _table()
WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "positions and scatter (in the code)": expand_bits,
    "masked_scatter": masked_scatter,
    "boolean assignment": boolean_assignment,
    "cumulative sum": cumulative_sum,
    "byte table": byte_table,
}


def chunk_seconds(num_tokens: int) -> dict[str, float]:
    """Seconds for all linears of SmolLM2-135M, by weights per chunk of the reference backend."""
    fmt, backend = make_format("nm", "2:4"), reference.Reference()
    shapes = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]
    layers = []
    for shape in shapes * 30:
        weight = torch.randn(shape).bfloat16()
        sparse = SparseWeight.cut(weight, fmt.pattern.keep(weight.float().abs(), "row"))
        layers.append((shape, backend.prepare(fmt, fmt.pack("w", sparse), shape)))
    inputs = {width: torch.randn(num_tokens, width).bfloat16() for width in (576, 1536)}
    times: dict[str, list[float]] = {str(chunk): [] for chunk in CHUNKS}
    for _ in range(7):
        for chunk in CHUNKS:
            reference.CHUNK_WEIGHTS = chunk
            began = time.perf_counter()
            for shape, prepared in layers:
                backend.linear(inputs[shape[1]], prepared, fmt, shape)
            times[str(chunk)].append(time.perf_counter() - began)
    return {chunk: statistics.median(seconds) for chunk, seconds in times.items()}


def main() -> None:
    """Check that all agree, time them in turn, write the record."""
    fmt = make_format("nm", "2:4")
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).bfloat16()
    sparse = SparseWeight.cut(weight, fmt.pattern.keep(weight.float().abs(), "row"))
    parts = fmt.pack("w", sparse)
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(REPEATS):
        for name, way in WAYS.items():
            began = time.perf_counter()
            dense = way(parts["values"], parts["bitmask"])
            seconds[name].append(time.perf_counter() - began)
            if not torch.equal(dense, sparse.weight):
                raise SystemExit(f"{name} expands wrongly")
    count = SHAPE[0] * SHAPE[1]
    result = {name: statistics.median(times) * 1e9 / count for name, times in seconds.items()}
    for name, nanoseconds in result.items():
        print(f"{name:40}{nanoseconds:6.2f} ns/weight")
    record = {"kind": "expand", "command": made_by(),
              "provenance": provenance(), "shape": SHAPE, "repeats": REPEATS,
              "threads": torch.get_num_threads(), "ns_per_weight": result,
              "chunk_seconds": {str(n): chunk_seconds(n) for n in (1, 8, 64)}}  # fmt: skip
    print(record["chunk_seconds"])
    RECORD.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
