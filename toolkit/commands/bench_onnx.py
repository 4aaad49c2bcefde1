"""`gblm bench onnx FOLDER FOLDER …`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from gblm.commands.common import (
    Command,
    emit,
    megabytes,
    progress_bars,
    record_option,
    save_record,
    table,
)


@click.command("onnx", cls=Command)
@click.argument(
    "folders",
    nargs=-1,
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@click.option("--prompt-len", type=click.IntRange(1), default=64, show_default=True)
@click.option("--output-len", type=click.IntRange(1), default=32, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=7, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@record_option
@click.pass_context
def command(
    ctx: click.Context, /, folders: tuple[Path, ...], output: Path | None, **settings: Any
) -> None:
    """Time exported FOLDERs against each other in ONNX Runtime on CPU; the first is the baseline.

    Decoding and prefill alternate between all of them; ratios are paired by round.
    """
    with progress_bars(ctx) as progress:
        from gblm.export.onnx_model.bench import Settings, bench_onnx

        record = bench_onnx(folders, Settings(**settings), progress)
    save_record(output, record)
    emit(ctx, record, lambda: _show(record))


def _show(record: dict[str, Any]) -> None:
    first = record["rows"][0]["name"]
    header = ["", "file", "memory", "load s", "prefill ms", "decode ms", "tok/s", f"x {first}"]
    table(header, [_cells(row, first) for row in record["rows"]])
    settings = record["settings"]
    click.echo(
        f"\n{settings['rounds']} interleaved rounds of {settings['prompt_len']} + "
        f"{settings['output_len']} tokens; medians, the ratio is of decoding and paired by round "
        f"(min–max); {record['clock']}, {settings['threads']} threads, "
        f"{record['machine']['cpu']}, load average {record['load_average']:.1f}"
    )


def _cells(row: dict[str, Any], first: str) -> list[str]:
    decode = row["decode_ms"]["median"]
    ratio = row["decode_speedup"].get(first)
    return [
        row["name"],
        megabytes(row["file_bytes"]),
        megabytes(row["memory_bytes"]),
        f"{row['load_s']:.2f}",
        f"{row['prefill_ms']['median']:.1f}",
        f"{decode:.2f}",
        f"{1e3 / decode:.1f}",
        f"{ratio['median']:.2f} ({ratio['min']:.2f}–{ratio['max']:.2f})" if ratio else "–",
    ]
