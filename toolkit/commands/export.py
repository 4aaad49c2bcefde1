"""Run `gblm export dense|pack|onnx SOURCE --output OUT`."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from gblm.commands.common import (
    Command,
    emit,
    folder_option,
    head_note,
    megabytes,
    options,
    overwrite_option,
    progress_bars,
)
from gblm.commands.recipe_options import field_options
from gblm.errors import UsageError
from gblm.recipe import Recipe
from gblm.record import command_line

ONNX_TARGETS = ("cpu", "cuda")
ONNX_PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int4")
output_options = options(
    click.argument("source"),
    folder_option,
    overwrite_option,
)


@click.group("export")
def command() -> None:
    """Write a packed model for other tools, or pack a model pruned by other tools."""


@command.command("dense", cls=Command)
@output_options
@field_options(Recipe, "max_shard_size")
@click.pass_context
def dense(
    ctx: click.Context, source: str, output: Path, overwrite: bool, max_shard_size: str
) -> None:
    """Unpack the packed folder SOURCE into an ordinary HF folder with zeros."""
    with progress_bars(ctx) as progress:
        from gblm.export.dense import export_dense
        from gblm.model.folder import ModelFolder

        result = export_dense(
            ModelFolder.open(source), output, overwrite, progress, max_shard_size=max_shard_size
        )
    emit(ctx, result, lambda: click.echo(
        f"{output}: {result['linears']} linears unpacked, "
        f"{megabytes(result['bytes_packed'])} packed -> {megabytes(result['bytes_dense'])} dense"
    ))  # fmt: skip


@command.command("pack", cls=Command)
@output_options
@click.option(
    "--pattern", help="Pattern the zeros must follow, found out if left out; dense keeps all."
)
@field_options(Recipe, "values", "head", "max_shard_size")
@click.option("--ignore", multiple=True, help="Glob of module names to leave dense; repeatable.")
@click.pass_context
def pack(ctx: click.Context, /, source: str, output: Path, overwrite: bool, **how: Any) -> None:
    """Pack SOURCE, a dense HF folder whose zeros are already there. Never prunes.

    With integer --values the weights are rounded to the nearest code, with --head the output
    head. A sparse checkpoint of compressed-tensors is converted as it is, without options.
    """
    with progress_bars(ctx) as progress:
        from gblm.export.legacy import export_legacy
        from gblm.export.pack import export_pack
        from gblm.model.folder import ModelFolder

        folder = ModelFolder.open(source)
        if folder.kind == "legacy":
            refuse_given(ctx, how)
            result = export_legacy(folder, output, overwrite, progress)
        else:
            result = export_pack(source, output, overwrite=overwrite, progress=progress, **how)
    facts = {key: value for key, value in result.items() if key != "tensors"}
    emit(ctx, facts | {"output": str(output)}, lambda: click.echo(
        f"{output}: {result['linears']} linears packed, {result['sparsity']:.1%} zeros, "
        f"{megabytes(result['bytes_dense'])} dense -> {megabytes(result['bytes_packed'])} packed"
        f"{head_note(result)}"
        f"{'; fp8 codes × scales rounded once to bfloat16' if 'rounded' in result else ''}"
    ))  # fmt: skip


def refuse_given(ctx: click.Context, names: Iterable[str]) -> None:
    """Refuse options where a checkpoint of compressed-tensors leaves no choice.

    Raises:
        UsageError: one of them was given.
    """
    for name in names:
        if ctx.get_parameter_source(name) is not ParameterSource.DEFAULT:
            raise UsageError(
                f"--{name}: SOURCE is stored sparse already, by compressed-tensors, and is "
                "converted as it is: leave the option out."
            )


@command.command("onnx", cls=Command)
@output_options
@click.option(
    "--target",
    type=click.Choice(ONNX_TARGETS),
    default="cpu",
    show_default=True,
    help="Where ONNX Runtime is to run the graph.",
)
@click.option(
    "--precision",
    type=click.Choice(ONNX_PRECISIONS),
    help="Of the graph. Default: fp32 for cpu, fp16 for cuda.",
)
@click.option(
    "--sparse",
    is_flag=True,
    help="Keep the weights of the packed folder SOURCE packed: the graph then needs gblm's "
    "operator library, which is put beside it.",
)
@click.option(
    "--validate",
    type=click.IntRange(0, 1024),
    default=64,
    show_default=True,
    help="Greedy tokens to compare with the original torch model; 0 leaves it out.",
)
@click.pass_context
def onnx(ctx: click.Context, /, source: str, output: Path, overwrite: bool, **wanted: Any) -> None:
    """Write SOURCE, a packed or dense folder, as a decoder with key-value cache for ONNX Runtime.

    Exit status 5: the export differs from the original more than it may.
    """
    with progress_bars(ctx) as progress:
        from gblm.export.onnx.export import Wanted, export_onnx

        asked = Wanted(**wanted, command=command_line(sys.argv[1:]))
        result = export_onnx(source, output, asked, overwrite, progress)
    emit(ctx, result, lambda: click.echo(_onnx_line(output, result)))


def _onnx_line(output: Path, report: dict[str, Any]) -> str:
    parts = [
        f"{output}: {report['target']} {report['precision']}, {megabytes(report['bytes_total'])}"
    ]
    if report["sparse"]:
        packed = sum(row["num_bytes"] for row in report["linears"])
        parts.append(f"{len(report['linears'])} linears packed, {megabytes(packed)}")
    if found := report.get("validation"):
        parts.append(
            f"{found['equal_greedy_tokens']} of {found['tokens']} greedy tokens as in torch with "
            f"these weights, logits {found['logit_deviation']:.2g} off (allowed: "
            f"{found['allowed_logit_deviation']:.2g})"
        )
    return "; ".join(parts)
