"""`gblm bench models SIDE SIDE …`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click

from gblm.commands.common import Command, backend_option, emit, progress_bars, save_record, table
from gblm.errors import GateError

# Metric → heading and digits.
COLUMNS = {
    "ttft_ms_p50": ("TTFT p50", 1),
    "ttft_ms_p99": ("p99", 1),
    "tpot_ms_p50": ("TPOT p50", 2),
    "tpot_ms_p99": ("p99", 2),
    "itl_ms_p99": ("ITL p99", 2),
    "e2e_ms_p50": ("E2E p50", 0),
    "requests_per_s": ("req/s", 2),
    "output_tok_s": ("tok/s", 1),
    "tok_s_per_user": ("tok/s/user", 1),
    "goodput_requests_per_s": ("goodput", 2),
    "memory_mb": ("MB", 0),
    "peak_memory_mb": ("peak MB", 0),
    "load_s": ("load s", 1),
    "joules_per_token": ("J/token", 3),
}
# The ratio that is printed: the first that the tool tells.
RATIOS = ("tpot_ms_p50", "e2e_ms_p50", "total_tok_s")


def numbers(ctx: click.Context, option: click.Parameter, value: str | None) -> tuple[float, ...]:
    """Positive numbers between commas; "inf" is no limit."""
    if value is None:
        return ()
    found = []
    for word in value.split(","):
        try:
            number = float(word)
        except ValueError:
            number = math.nan
        if not number > 0:
            raise click.BadParameter(f"{word[:40]!r} is not a positive number.", ctx, option)
        found.append(number)
    return tuple(dict.fromkeys(found))


def widths(ctx: click.Context, option: click.Parameter, value: str | None) -> tuple[float, ...]:
    """Whole positive numbers between commas, or "inf"."""
    found = numbers(ctx, option, value)
    if broken := [number for number in found if not (number.is_integer() or math.isinf(number))]:
        raise click.BadParameter(f"{broken[0]:g} is not a whole number.", ctx, option)
    return found


@click.command("models", cls=Command)
@click.argument("words", metavar="SIDE SIDE… [-- VLLM_OPTIONS]", nargs=-1, type=click.UNPROCESSED)
@click.option(
    "--with", "tool", default="serve", show_default=True,
    type=click.Choice(["serve", "latency", "throughput", "guidellm"]),
    help="For sides in vLLM: a tool of `vllm bench`, or GuideLLM.",
)  # fmt: skip
@click.option("--num-prompts", type=click.IntRange(1), default=16, show_default=True)
@click.option("--input-len", type=click.IntRange(1), default=64, show_default=True)
@click.option("--output-len", type=click.IntRange(2), default=32, show_default=True)
@click.option(
    "--concurrency", callback=widths, default="1", show_default=True,
    help="Requests in flight; several, between commas, are a sweep; inf is no limit.",
)  # fmt: skip
@click.option(
    "--request-rate", callback=numbers,
    help="Requests per second; several, between commas, are a sweep. Default: no pause.",
)  # fmt: skip
@click.option(
    "--repeat", "rounds", type=click.IntRange(1), default=6, show_default=True,
    help="Rounds; each starts every side anew, in another order.",
)  # fmt: skip
@click.option(
    "--slo", help="Limits for goodput, such as ttft:500,tpot:30 (ms), or mlperf-llama3.1-8b."
)
@click.option("--max-steal", type=click.FloatRange(0, 100), default=2, show_default=True,
              help="Percent of the CPU time that a hypervisor may take.")  # fmt: skip
@click.option("--max-other-load", type=click.FloatRange(0, 100), default=10, show_default=True,
              help="Percent of the CPU time that other processes may use.")  # fmt: skip
@click.option("--threads", type=click.IntRange(1), help="Of hf, ort and llama.cpp.")
@click.option("--seed", type=int, default=0, show_default=True)
@backend_option
@click.option(
    "--output", type=click.Path(path_type=Path, dir_okay=False), default=Path("bench.json"),
    show_default=True, help="JSON file for the record.",
)  # fmt: skip
@click.option("--log", type=click.Path(path_type=Path, dir_okay=False),
              help="File for the servers' output.")  # fmt: skip
@click.pass_context
def command(
    ctx: click.Context, /, words: tuple[str, ...], output: Path, log: Path | None, **given: Any
) -> None:
    """Measure models against each other; a SIDE is [NAME=][ENGINE:]MODEL, the first the baseline.

    Engines: vllm, hf (transformers), ort (an exported folder), llama.cpp (a GGUF file). Options
    behind -- go to vLLM. A run that breaks a check is INVALID: no figure, exit code 5.
    """
    first = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    with progress_bars(ctx) as progress:
        from gblm.bench.models import bench_models
        from gblm.bench.sides import parse_sides

        parsed = parse_sides(words[:first])
        record = bench_models(parsed, plan_of(words[first:], given), progress, log)
    save_record(output, record)
    emit(ctx, record, lambda: print_record(record))
    if not record["valid"]:
        raise GateError(
            f"INVALID: {record['reasons'][0]}; {len(record['reasons'])} reasons in {output}."
        )


def plan_of(options: tuple[str, ...], given: dict[str, Any]) -> Any:
    """The plan that the options ask for: every concurrency at every rate."""
    from gblm.bench.models import Plan
    from gblm.bench.requests import Slo
    from gblm.bench.validity import Asked, Limits

    loads = tuple(
        Asked(
            given["num_prompts"],
            given["input_len"],
            given["output_len"],
            None if math.isinf(width) else int(width),
            rate,
        )
        for width in given["concurrency"]
        for rate in given["request_rate"] or (None,)
    )
    slo = given["slo"]
    return Plan(
        loads,
        given["rounds"],
        given["seed"],
        given["tool"],
        None if slo is None else Slo.parse(slo),
        Limits(given["max_steal"] / 100, given["max_other_load"] / 100),
        given["threads"],
        given["backend"],
        options,
    )


def print_record(record: dict[str, Any]) -> None:
    """A table for each load; no figure of a run that is not valid."""
    known = [name for name in COLUMNS if any(name in row["metrics"] for row in record["rows"])]
    ratio = next((name for name in RATIOS if name in known or name == RATIOS[-1]), RATIOS[0])
    for load in record["loads"]:
        rows = [row for row in record["rows"] if row["load"] == load]
        header = ["", *(COLUMNS[name][0] for name in known), f"{ratio} ratio (95 %)"]
        click.echo(_load_line(load))
        table(header, [_cells(row, known, ratio) for row in rows])
        click.echo()
    settings = record["settings"]
    click.echo(
        f"{settings['rounds']} interleaved rounds, {settings['num_prompts']} prompts of "
        f"{settings['input_len']} + {settings['output_len']} tokens; ms; medians of the rounds; "
        f"ratios to {record['baseline']}, {record['provenance']['device']}"
    )
    for words in record["caveats"]:
        click.echo(f"note: {words}")
    for reason in record["reasons"]:
        click.echo(f"INVALID: {reason}")


def _load_line(load: dict[str, Any]) -> str:
    width = load["concurrency"] or "no limit"
    rate = load["request_rate"]
    return f"concurrency {width}" + ("" if rate is None else f", {rate:g} requests/s")


def _cells(row: dict[str, Any], known: list[str], ratio: str) -> list[str]:
    if not row["valid"]:
        return [row["side"], "INVALID", *[""] * len(known)]
    found = row.get("ratio", {}).get(ratio)
    return [
        row["side"],
        *(
            f"{row['metrics'][name]['median']:.{COLUMNS[name][1]}f}"
            if name in row["metrics"]
            else "–"
            for name in known
        ),
        f"{found['median']:.3f} ({found['low']:.3f}–{found['high']:.3f})" if found else "–",
    ]
