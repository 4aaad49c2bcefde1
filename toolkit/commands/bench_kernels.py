"""`gblm bench kernels`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from gblm.commands.common import Command, emit, progress_bars, record_option, table
from gblm.commands.verdict import fail_if_invalid, limits_of, noise_options, print_verdict
from gblm.record import Record, Row

ISAS = ("amx", "avx512", "avx2", "neon_bf16", "neon", "portable")
LIMITS = ("max_steal", "max_other_load", "max_slow_read")
RATIOS = {
    "torch_bf16": "x torch bf16",
    "vllm_bf16": "x vLLM bf16",
    "vllm_w8a8": "x vLLM W8A8",
    "dense": "x dense control",
}


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
@click.option("--minutes", type=click.FloatRange(0, min_open=True),
              help="On a GPU: nothing begins afterwards.")  # fmt: skip
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@click.option("--isa", type=click.Choice(ISAS), help="Instruction set of cpu. Default: the best.")
@click.option("--rounds", type=click.IntRange(1), default=7, show_default=True)
@click.option("--vllm/--no-vllm", default=True, show_default=True,
              help="Measure vLLM's linears, too, if it is installed.")  # fmt: skip
@noise_options
@record_option
@click.pass_context
def command(
    ctx: click.Context,
    /,
    shapes: tuple[str, ...],
    tokens: tuple[str, ...],
    formats: tuple[str, ...],
    backends: tuple[str, ...],
    device: str,
    minutes: float | None,
    output: Path | None,
    **rest: Any,
) -> None:
    """Time packed weights against PyTorch, vLLM and the speed of this machine's memory.

    Weights are read from memory, not from caches. Ratios are medians over interleaved rounds.
    """
    for name in ("threads", "isa", "vllm", *LIMITS) if device == "cuda" else ("minutes",):
        if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            option = name.replace("_", "-")
            raise click.UsageError(f"--{option} does not go with --device {device}.")
    limits = limits_of({name: rest.pop(name) for name in LIMITS})
    asked = {"tokens": _numbers(tokens), "formats": formats, "backends": backends,
             "limits": limits, **rest}  # fmt: skip
    if device == "cuda":
        _on_gpu(ctx, shapes, asked, math.inf if minutes is None else minutes, output)
    else:
        _on_cpu(ctx, shapes, asked, output)


def _on_cpu(
    ctx: click.Context, shapes: tuple[str, ...], asked: dict[str, Any], output: Path | None
) -> None:
    with progress_bars(ctx) as progress:
        from gblm.bench.kernels import FORMATS, Settings, bench_kernels, parse_shapes

        asked["formats"] = asked["formats"] or FORMATS
        asked["backends"] = asked["backends"] or ("cpu",)
        record = bench_kernels(Settings(shapes=parse_shapes(shapes), **asked), progress)
    if output is not None:
        record.write(output)
    emit(ctx, record.as_json(), lambda: print_record(record))
    fail_if_invalid(record, output)


def _on_gpu(
    ctx: click.Context,
    shapes: tuple[str, ...],
    asked: dict[str, Any],
    minutes: float,
    output: Path | None,
) -> None:
    with progress_bars(ctx) as progress:
        from gblm.bench.gpu import bench_gpu
        from gblm.bench.kernels import Settings, parse_shapes

        settings = Settings(shapes=parse_shapes(shapes), **asked)
        record = bench_gpu(settings, minutes, progress)
    if output is not None:
        record.write(output)
    emit(ctx, record.as_json(), lambda: print_gpu(record))
    fail_if_invalid(record, output)


def print_gpu(record: Record) -> None:
    """Print a table for each load, then what has no figure."""
    for load in record.loads:
        rows = [row for row in record.rows if row.load == load and row.metric != "gb_s"]
        rows = rows or [row for row in record.rows if row.load == load]
        table([load, rows[0].unit, f"x {record.baseline}", "GB/s"],
              [_gpu_cells(record, row) for row in rows])  # fmt: skip
        click.echo()
    click.echo(
        f"{record.provenance['device']}; medians of rounds in CUDA graphs, weights read from "
        "memory; above 1 is faster"
    )
    print_verdict(record)


def _gpu_cells(record: Record, row: Row) -> list[str]:
    ratio = record.ratio(row.side, row.load, row.metric)
    times = None if ratio is None else 1 / ratio.median if row.metric == "us" else ratio.median
    rate = record.value(row.side, row.load, "gb_s")
    return [
        row.side,
        f"{row.value:.1f}",
        "–" if times is None else f"{times:.2f}",
        "–" if rate is None else f"{rate:.0f}",
    ]


def print_record(record: Record) -> None:
    """Print a table per case, then `prepare`, the cost of a call, and how it was measured."""
    from gblm.bench.kernels import CALL

    timed = [row for row in record.rows if row.metric == "us"]
    for load in dict.fromkeys(row.load for row in timed if row.load != CALL):
        names = [row.side for row in timed if row.load == load]
        ratios = [key for key in RATIOS if key == "dense" or key in names]
        table([load, "bits", "us", "GB/s", "of limit", *(RATIOS[key] for key in ratios)],
              [_cells(record, name, load, ratios) for name in names])  # fmt: skip
        click.echo()
    prepared = [row for row in record.rows if row.metric == "prepare_gb_s"]
    table(["prepare, dense-equivalent bf16", "GB/s"],
          [[f"{row.side} {row.load}", f"{row.value:.2f}"] for row in prepared])  # fmt: skip
    click.echo()
    table([CALL, "us"], [[row.side, f"{row.value:.2f}"] for row in timed if row.load == CALL])
    facts = record.provenance
    click.echo(
        f"\n{facts['settings']['rounds']} interleaved rounds; medians, ratios paired by round "
        f"(95 %), above 1 is faster; {facts['clock']}, {facts['threads']} threads, "
        f"{facts['instruction_set']}, {facts['compiler']}, {facts['device']} "
        f"({facts['cpu_model']}), load average {facts['load_average']:.1f}"
    )
    print_verdict(record)


def _cells(record: Record, name: str, load: str, ratios: list[str]) -> list[str]:
    """Format one linear; its speed-up is the other's time over its own."""
    control = record.sides[name]["control"]
    others = [control if key == "dense" else key for key in ratios]
    found = [
        record.ratio(other, load, "us", name) if other not in (None, name) else None
        for other in others
    ]
    shape = load.partition(",")[0]
    figures = [record.value(name, shape, "bits_per_weight"), record.value(name, load, "us"),
               record.value(name, load, "gb_s")]  # fmt: skip
    share = record.value(name, load, "share_of_read_limit") or 0.0
    return [
        name,
        *(f"{value:.{digits}f}" for value, digits in zip(figures, (2, 1, 1), strict=True)),
        f"{share:.0%}",
        *(f"{r.median:.2f} ({r.low:.2f}–{r.high:.2f})" if r else "–" for r in found),
    ]


def _numbers(texts: tuple[str, ...]) -> tuple[int, ...]:
    for text in texts:
        if not (text.isascii() and text.isdigit() and 0 < int(text) < 10**6):
            raise click.BadParameter(
                f"{text[:40]!r} is not a positive number.", param_hint="--tokens"
            )
    return tuple(map(int, texts))
