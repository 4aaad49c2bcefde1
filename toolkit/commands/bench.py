"""`gblm bench models|serving|watch|kernels|onnx`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from gblm.commands.bench_kernels import command as kernels
from gblm.commands.bench_models import command as models
from gblm.commands.bench_onnx import command as onnx
from gblm.commands.bench_watch import command as watch
from gblm.commands.common import (
    Command,
    backend_option,
    emit,
    progress_bars,
    save_record,
    table,
)

LABELS = {
    "ttft_ms": "TTFT, median (ms)",
    "tpot_ms": "TPOT, median (ms)",
    "itl_p99_ms": "ITL, p99 (ms)",
    "decode_tok_s": "decode (tok/s per stream)",
    "throughput_tok_s": "throughput (tok/s)",
    "memory_mb": "server memory (MB)",
    "ready_s": "start to healthy (s)",
    "weights_mb": "weights on disk (MB)",
}


@click.group("bench")
def command() -> None:
    """Measure speed: models against each other, live servers, ONNX models, the kernels alone."""


command.add_command(models)
command.add_command(kernels)
command.add_command(watch)
command.add_command(onnx)


@command.command("serving", cls=Command)
@click.argument("model")
@click.argument("vllm_options", nargs=-1, type=click.UNPROCESSED)
@click.option("--baseline", required=True, help="Dense model to compare with.")
@backend_option
@click.option("--num-prompts", type=click.IntRange(1), default=8, show_default=True)
@click.option("--input-len", type=click.IntRange(1), default=64, show_default=True)
@click.option("--output-len", type=click.IntRange(2), default=32, show_default=True)
@click.option("--concurrency", type=click.IntRange(1), default=1, show_default=True)
@click.option(
    "--repeat",
    "rounds",
    type=click.IntRange(1),
    default=3,
    show_default=True,
    help="Rounds; each starts both servers anew, in alternating order.",
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False, writable=True),
    default=Path("bench.json"),
    show_default=True,
    help="JSON file for the record.",
)
@click.option(
    "--log", type=click.Path(path_type=Path, dir_okay=False), help="File for the servers' output."
)
@click.pass_context
def serving(
    ctx: click.Context,
    /,
    model: str,
    vllm_options: tuple[str, ...],
    baseline: str,
    backend: str | None,
    output: Path,
    log: Path | None,
    **load: Any,
) -> None:
    """Serve MODEL and --baseline in turn, load both with `vllm bench serve`, compare.

    Options behind -- go to both vLLM servers.
    """
    with progress_bars(ctx) as progress:
        from gblm.bench.serving import Load, bench_serving

        settings = Load(options=vllm_options, **load)
        record = bench_serving(model, baseline, settings, backend, progress, log)
    emit(ctx, record, lambda: print_summary(record))
    save_record(output, record)


def print_summary(record: dict[str, Any]) -> None:
    """Both sides, their ratio and its spread over the rounds."""
    rows = [
        [
            LABELS[metric],
            f"{row['baseline']:.2f}",
            f"{row['model']:.2f}",
            f"{row['ratio']:.2f}",
            f"{row['ratio_min']:.2f}–{row['ratio_max']:.2f}",
        ]
        for metric, row in record["summary"].items()
    ]
    table(["", "baseline", "model", "ratio", "min–max"], rows)
    load = record["load"]
    click.echo(
        f"{load['rounds']} interleaved rounds, {load['num_prompts']} prompts of "
        f"{load['input_len']} + {load['output_len']} tokens, concurrency {load['concurrency']}, "
        f"{record['provenance']['device']}"
    )
