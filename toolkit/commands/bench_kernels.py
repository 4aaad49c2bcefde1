"""`gblm bench kernels`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from gblm.commands.common import Command, emit, progress_bars, record_option, table
from gblm.commands.verdict import fail_if_invalid, noise_option, print_verdict
from gblm.record import Record

ISAS = ("amx", "avx512", "avx2", "neon_bf16", "neon", "portable")
# Metric → heading and how it is printed.
FIGURES = {
    "us": ("us", "{:.1f}"), "tok_s": ("tok/s", "{:.1f}"), "tflop_s": ("TFLOP/s", "{:.1f}"),
    "gb_s": ("GB/s", "{:.1f}"), "share_of_read_limit": ("of limit", "{:.0%}"),
}  # fmt: skip
RATIOS, CONTROL = ("torch_bf16", "torch_2:4", "vllm_bf16", "vllm_w8a8"), "dense control"
FACTS = ("device", "cpu_model", "threads", "instruction_set", "compiler", "clock", "load_average")


def words(ctx: click.Context, option: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    """Read a repeatable option whose values may be words between commas: each word once."""
    found = dict.fromkeys(word.strip() for text in value for word in text.split(","))
    if "" in found:
        raise click.BadParameter("a word is empty.", ctx, option)
    return tuple(found)


@click.command("kernels", cls=Command)
@click.option(
    "--shapes", callback=words, multiple=True, default=["llama-7b"], show_default=True,
    help="OUTxIN, or the linears of llama-7b, llama-1b (Llama 3.2), smollm2. Repeatable.",
)  # fmt: skip
@click.option(
    "--tokens", callback=words, multiple=True, default=["1,4,8,16,64,256"], show_default=True,
    help="Numbers of tokens that are multiplied at once.",
)  # fmt: skip
@click.option(
    "--formats", callback=words, multiple=True,
    help="FORMAT/PATTERN[/VALUES], such as nm/2:4/int8:128; on CPU dense controls are added. "
    "Default: dense, 50 %, 2:4, 4:8, 8:16 of each value type, and 70 and 80 % of bf16; on a GPU "
    "2:4 of each value type, 50 and 70 %.",
)  # fmt: skip
@click.option(
    "--backends", callback=words, multiple=True,
    help="Of gblm: cpu, reference, dense; on a GPU mma_sp, delta, triton. Default: cpu, or all of "
    "a GPU's.",
)  # fmt: skip
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True,
              help="cuda measures a decode loop, too.")  # fmt: skip
@click.option(
    "--minutes",
    type=click.FloatRange(0, min_open=True),
    help="Nothing begins afterwards; the record then lacks something, and is invalid.",
)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@click.option("--isa", type=click.Choice(ISAS), help="Instruction set of cpu. Default: the best.")
@click.option("--rounds", type=click.IntRange(1), default=7, show_default=True)
@click.option("--vllm/--no-vllm", default=True, show_default=True,
              help="Measure vLLM's linears, too, if it is installed.")  # fmt: skip
@noise_option
@record_option
@click.pass_context
def command(
    ctx: click.Context,
    /,
    shapes: tuple[str, ...],
    tokens: tuple[str, ...],
    output: Path | None,
    **rest: Any,
) -> None:
    """Time packed weights against PyTorch, vLLM and the speed of this machine's memory.

    Weights are read from memory, not from caches. Ratios are medians over interleaved rounds.
    """
    for name in ("threads", "isa", "vllm") if rest["device"] == "cuda" else ():
        if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--{name} does not go with --device cuda.")
    with progress_bars(ctx) as progress:
        from gblm.bench.kernels import Settings, bench_kernels, parse_shapes

        settings = Settings(parse_shapes(shapes), _numbers(tokens), **rest)
        record = bench_kernels(settings, progress)
    if output is not None:
        record.write(output)
    emit(ctx, record.as_json(), lambda: print_record(record))
    fail_if_invalid(record, output)


def print_record(record: Record) -> None:
    """Print a table for each load that was timed, then of the weights, and what to mind."""
    for load in record.loads:
        rows = [row for row in record.rows if row.load == load and row.metric in FIGURES]
        sides = list(dict.fromkeys(row.side for row in rows))
        known = {row.metric for row in rows}
        figures = [name for name in FIGURES if name in known]
        beside = [name for name in RATIOS if name in sides and len(sides) > 1]
        if any(_control(record, side) in sides for side in sides):
            beside.append(CONTROL)
        if sides:
            header = [load, *(FIGURES[name][0] for name in figures), *(f"x {n}" for n in beside)]
            table(header, [_cells(record, side, load, figures, beside) for side in sides])
            click.echo()
    stored = [row for row in record.rows if row.metric == "bits_per_weight"]
    if stored:
        table(["a weight", "bits", "prepare, GB/s of dense bf16"],
              [[f"{row.side} {row.load}", f"{row.value:.2f}",
                _figure(record, row.side, row.load, "prepare_gb_s", "{:.2f}")]
               for row in stored])  # fmt: skip
        click.echo()
    facts = record.provenance
    known_facts = (f"{name.replace('_', ' ')} {facts[name]}" for name in FACTS if name in facts)
    click.echo(
        f"{facts['settings']['rounds']} interleaved rounds; medians, ratios paired by round "
        f"(95 %), above 1 is faster; weights read from memory; {', '.join(known_facts)}"
    )
    print_verdict(record)


def _control(record: Record, side: str) -> str | None:
    """Name the dense linear of the same value type; baselines and GPUs have none."""
    name: str | None = record.sides[side].get("control")
    return name


def _figure(record: Record, side: str, load: str, metric: str, digits: str) -> str:
    value = record.value(side, load, metric)
    return "–" if value is None else digits.format(value)


def _cells(
    record: Record, side: str, load: str, figures: list[str], beside: list[str]
) -> list[str]:
    """Format one side; what it is compared by is its time, or its tokens per second."""
    cells = [side, *(_figure(record, side, load, name, FIGURES[name][1]) for name in figures)]
    for name in beside:
        other = _control(record, side) if name == CONTROL else name
        found = None
        if other not in (None, side):
            faster = record.ratio(str(other), load, "us", side)
            found = faster or record.ratio(side, load, "tok_s", other)
        cells.append(f"{found.median:.2f} ({found.low:.2f}–{found.high:.2f})" if found else "–")
    return cells


def _numbers(texts: tuple[str, ...]) -> tuple[int, ...]:
    for text in texts:
        if not (text.isascii() and text.isdigit() and 0 < int(text) < 10**6):
            raise click.BadParameter(
                f"{text[:40]!r} is not a positive number.", param_hint="--tokens"
            )
    return tuple(map(int, texts))
