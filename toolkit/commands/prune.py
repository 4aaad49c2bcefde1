"""`gblm prune MODEL --output OUT`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from gblm.commands.common import (
    METHODS,
    Command,
    device_option,
    dtype_option,
    emit,
    megabytes,
    options,
    overwrite_option,
    progress_bars,
)

METHOD_OPTIONS = ("alpha", "gradient_norm", "gradient_mode", "damping", "variant")
method_options = options(
    click.option("--alpha", type=float, help="gblm: weight of the gradient term (default 100)."),
    click.option(
        "--gradient-norm",
        type=click.Choice(["l1", "l2"]),
        help="gblm, gradient: norm over the samples (default l2).",
    ),
    click.option(
        "--gradient-mode",
        type=click.Choice(["mean", "reference"]),
        help="gblm: mean over the samples (default), or the published code's sum.",
    ),
    click.option("--damping", type=float, help="sparsegpt: share of the mean diagonal (0.01)."),
    click.option(
        "--variant", is_flag=True, default=None, help="wanda: a budget of its own for each row."
    ),
)


@click.command("prune", cls=Command)
@click.argument("model", required=False)
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Folder to make.")
@click.option("--method", default="gblm", show_default=True, help=f"One of {', '.join(METHODS)}.")
@click.option(
    "--pattern",
    default="2:4",
    show_default=True,
    help="N:M (N kept of M), a sparsity such as 0.5, or unstructured.",
)
@click.option("--sparsity", type=float, help="Fraction of zeros for --pattern unstructured.")
@method_options
@click.option(
    "--calibration",
    default="pydoc",
    show_default=True,
    help="A .txt, .jsonl or .parquet file, or pydoc, wikitext2, c4.",
)
@click.option("--num-samples", type=click.IntRange(1), default=128, show_default=True)
@click.option(
    "--seq-len", type=click.IntRange(2), default=2048, show_default=True, help="Tokens per sample."
)
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Samples per forward pass.",
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--prefix",
    type=click.Choice(["pruned", "dense"]),
    default="pruned",
    show_default=True,
    help="Whose activations a layer sees: the pruned layers' before it, or the dense model's.",
)
@click.option(
    "--stats",
    type=click.Path(path_type=str),
    help="Use statistics that --save-stats wrote; no calibration pass.",
)
@click.option(
    "--save-stats", type=click.Path(path_type=Path), help="Folder to keep the statistics in."
)
@dtype_option
@device_option
@click.option("--targets", multiple=True, help="Glob of module names to prune; repeatable.")
@click.option("--ignore", multiple=True, help="Glob of module names to leave dense; repeatable.")
@click.option(
    "--recipe",
    type=click.Path(path_type=Path),
    help="A recipe.json; replaces all options but --output and --overwrite.",
)
@overwrite_option
@click.option(
    "--resume/--no-resume",
    default=True,
    show_default=True,
    help="Go on after the finished layers of the same command.",
)
@click.pass_context
def command(
    ctx: click.Context,
    /,
    output: Path,
    overwrite: bool,
    resume: bool,
    save_stats: Path | None,
    recipe: Path | None,
    **given: Any,
) -> None:
    """Prune MODEL (a local HF folder or a hub id) and write it packed.

    Nothing appears under the output's name until everything is complete; finished layers are kept
    beside it until then. Several processes: torchrun --nproc-per-node N -m gblm prune …
    """
    with progress_bars(ctx) as progress:
        from gblm.prune import Output, prune
        from gblm.recipe import Recipe

        if recipe is not None:
            _only_recipe(ctx)
            chosen = Recipe.from_file(recipe)
            if given["model"]:
                chosen = chosen.model_copy(update={"model": given["model"]})
        else:
            chosen = Recipe.from_dict(_recipe_fields(**given))
        report = prune(chosen, Output(output, overwrite, resume, save_stats), progress)
    if not report:
        return  # rank 0 tells

    def text() -> None:
        click.echo(
            f"{report['output']}: {chosen.method} {chosen.pattern}, "
            f"{report['linears']} linears, {report['sparsity']:.1%} zeros"
        )
        click.echo(
            f"{megabytes(report['bytes_dense'])} dense -> "
            f"{megabytes(report['bytes_packed'])} packed "
            f"({report['bits_per_weight']:.2f} bits per pruned weight, mask included), "
            f"{report['seconds']:.0f} s"
        )

    emit(ctx, {key: value for key, value in report.items() if key != "tensors"}, text)


def _only_recipe(ctx: click.Context) -> None:
    """Refuse options that a recipe would silently win over."""
    from click.core import ParameterSource

    allowed = {"output", "overwrite", "resume", "save_stats", "recipe", "model"}
    for name in ctx.params:
        if name not in allowed and ctx.get_parameter_source(name) == ParameterSource.COMMANDLINE:
            flag = "--" + name.replace("_", "-")
            raise click.UsageError(f"{flag} does not go with --recipe: edit the recipe instead.")


def _recipe_fields(
    model: str | None,
    method: str,
    pattern: str,
    sparsity: float | None,
    targets: tuple[str, ...],
    ignore: tuple[str, ...],
    dtype: str,
    device: str,
    stats: str | None,
    calibration: str,
    **rest: Any,
) -> dict[str, Any]:
    """The options as the fields of a Recipe."""
    from gblm.patterns import parse

    if not model:
        raise click.UsageError("Missing argument 'MODEL'.")
    options = {name: rest.pop(name) for name in METHOD_OPTIONS}
    return {
        "model": model,
        "method": method,
        "pattern": str(parse(pattern, sparsity)),
        "options": {key: value for key, value in options.items() if value is not None},
        "calibration": {"source": calibration, **rest},
        "stats": stats,
        "targets": targets,
        "ignore": ignore,
        "dtype": dtype,
        "device": device,
    }
