"""`gblm bench kernels`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from gblm.commands.common import Command, commas, progress_bars, record_option, whole_number
from gblm.commands.records import hand_out, noise_option

ISAS = ("amx", "avx512", "avx2", "neon_bf16", "neon", "portable")


@click.command("kernels", cls=Command)
@click.option(
    "--shapes", callback=commas(str), multiple=True, default=["llama-7b"], show_default=True,
    help="OUTxIN, or the linears of llama-7b, llama-1b (Llama 3.2), smollm2. Repeatable.",
)  # fmt: skip
@click.option(
    "--tokens", callback=commas(whole_number), default="1,4,8,16,64,256", show_default=True,
    help="Numbers of tokens that are multiplied at once.",
)  # fmt: skip
@click.option(
    "--formats", callback=commas(str), multiple=True,
    help="FORMAT/PATTERN[/VALUES], such as nm/2:4/int8:128; on CPU dense controls are added. "
    "Default: dense, 50 %, 2:4, 4:8, 8:16 of each value type, and 70 and 80 % of bf16; on a GPU "
    "2:4 of each value type, 50 and 70 %.",
)  # fmt: skip
@click.option(
    "--backends", callback=commas(str), multiple=True,
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

        settings = Settings(parse_shapes(shapes), **rest)
        record = bench_kernels(settings, progress)
    hand_out(ctx, record, output)
