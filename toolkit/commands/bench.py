"""`gblm bench A [B …]`, `gblm bench kernels` and `gblm bench watch`."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from gblm.commands.common import (
    Command,
    backend_option,
    commas,
    progress_bars,
    record_option,
    whole_number,
    with_a_place,
)
from gblm.commands.records import hand_out, noise_option

# What is printed; the record has more.
SHOWN = (
    "ttft_ms_p50", "ttft_ms_p99", "tpot_ms_p50", "tpot_ms_p99", "itl_ms_p99", "e2e_ms_p50",
    "requests_per_s", "output_tok_s", "decode_tok_s", "memory_mb", "load_s",
)  # fmt: skip


class Bench(click.Group):
    """A group whose first word may be a side; then it is the comparison of sides."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Take anything but the name of a command as a word of the comparison."""
        if args and args[0] in self.commands:
            return super().resolve_command(ctx, args)
        return "", sides, args

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Show how sides are given."""
        pieces = " ".join(sides.collect_usage_pieces(ctx))
        formatter.write_usage(ctx.command_path, f"{pieces} | kernels | watch")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the options of the comparison, then the commands."""
        sides.format_options(ctx, formatter)
        self.format_commands(ctx, formatter)


@click.group("bench", cls=Bench, context_settings={"ignore_unknown_options": True})
def command() -> None:
    """Measure models against each other; the first one is the baseline.

    A side is [NAME=][ENGINE:]MODEL; engines: vllm (served), vllm-offline, transformers, onnx (an
    exported folder), llama.cpp (a GGUF file). Options behind -- go to vLLM. What breaks a check
    gets no figure, and the exit code is 5.
    """


@click.command("bench", cls=Command)
@click.argument("words", metavar="SIDE… [-- VLLM_OPTIONS]", nargs=-1, type=click.UNPROCESSED)
@click.option("--num-prompts", type=click.IntRange(1), default=8, show_default=True)
@click.option("--prompt-len", type=click.IntRange(1), default=64, show_default=True)
@click.option("--output-len", type=click.IntRange(2), default=32, show_default=True)
@click.option(
    "--concurrency", callback=commas(whole_number), default="1", show_default=True,
    help="Requests in flight; several, between commas, are a sweep.",
)  # fmt: skip
@click.option("--rounds", type=click.IntRange(1), default=7, show_default=True)
@click.option(
    "--restart", is_flag=True,
    help="Start each side anew in every round. Default: all stay in memory together.",
)  # fmt: skip
@noise_option
@click.option(
    "--threads", type=click.IntRange(1), help="Of each engine. Default: what it takes itself."
)
@backend_option
@click.option(
    "--output", type=click.Path(path_type=Path, dir_okay=False), default=Path("bench.json"),
    show_default=True, callback=with_a_place, help="JSON file for the record.",
)  # fmt: skip
@click.pass_context
def sides(ctx: click.Context, /, words: tuple[str, ...], output: Path, **given: Any) -> None:
    """Measure models against each other; the first one is the baseline."""
    first = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    log = Path(tempfile.gettempdir()) / f"gblm-bench-{os.getpid()}.log"
    with progress_bars(ctx) as progress:
        from gblm.bench.engines import parse_sides
        from gblm.bench.requests import Load
        from gblm.bench.rounds import bench
        from gblm.bench.sides import Setup

        prompts, before, after = map(given.pop, ("num_prompts", "prompt_len", "output_len"))
        loads = tuple(Load(prompts, before, after, n) for n in given.pop("concurrency"))
        setup = Setup(loads, log, options=words[first:], **given)
        record = bench(parse_sides(words[:first], setup), progress)
    log.unlink(missing_ok=True)
    hand_out(ctx, record, output, SHOWN)


@command.command("kernels", cls=Command)
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
    "--backend", "backends", callback=commas(str), multiple=True,
    help="Of gblm: cpu, reference, dense; on a GPU mma_sp, delta, triton. Default: cpu, or all of "
    "a GPU's.",
)  # fmt: skip
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=7, show_default=True)
@click.option("--vllm/--no-vllm", default=True, show_default=True,
              help="Measure vLLM's linears, too, if it is installed.")  # fmt: skip
@noise_option
@record_option
@click.pass_context
def kernels(
    ctx: click.Context,
    /,
    shapes: tuple[str, ...],
    output: Path | None,
    **rest: Any,
) -> None:
    """Time packed weights against PyTorch, vLLM and the speed of this machine's memory.

    Weights are read from memory, not from caches. Ratios are medians over interleaved rounds.
    """
    for name in ("threads", "vllm") if rest["device"] == "cuda" else ():
        if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--{name} does not go with --device cuda.")
    with progress_bars(ctx) as progress:
        from gblm.bench.kernels import Settings, bench_kernels, parse_shapes

        settings = Settings(parse_shapes(shapes), **rest)
        record = bench_kernels(settings, progress)
    hand_out(ctx, record, output)


@command.command("watch", cls=Command)
@click.argument("url_a")
@click.argument("url_b")
@click.option("--duration", type=click.FloatRange(1, 1e7), default=600, show_default=True,
              help="Seconds to watch.")  # fmt: skip
@click.option("--rounds", type=int, default=12, show_default=True,
              help="Parts that this time is cut into, each with figures of its own.")  # fmt: skip
@click.option(
    "--api-key-file", "key_files", type=click.Path(path_type=Path, dir_okay=False), multiple=True,
    help="File with the key for /metrics; twice: A's and B's.",
)  # fmt: skip
@record_option
@click.pass_context
def watch(
    ctx: click.Context,
    /,
    url_a: str,
    url_b: str,
    duration: float,
    rounds: int,
    key_files: tuple[Path, ...],
    output: Path | None,
) -> None:
    """Compare two live vLLM servers by their /metrics; sends them no requests of its own.

    URL_A is the server to compare with, URL_B the candidate, both under real traffic.
    """
    if len(key_files) > 2:
        raise click.UsageError("--api-key-file: give one file for both servers, or two.")
    key_a, key_b = (key_files * 2)[:2] if key_files else (None, None)
    with progress_bars(ctx) as progress:
        from gblm.bench import watch as watching
        from gblm.bench.metrics import Target

        a, b = Target.of("A", url_a, key_a), Target.of("B", url_b, key_b)
        record = watching.watch(a, b, duration, rounds, progress)
    hand_out(ctx, record, output)
