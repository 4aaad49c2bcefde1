"""The options that make a recipe: the same for every command that takes one."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gblm.commands.common import METHODS, device_option, dtype_option, options

if TYPE_CHECKING:
    from gblm.recipe import Recipe

CALIBRATION_OPTIONS = (
    "calibration", "num_samples", "seq_len", "batch_size", "seed", "bos", "prefix", "order",
)  # fmt: skip
# What each preset sets; the steps follow docs/methods.md.
PRESETS: dict[str, dict[str, Any]] = {
    "fast": {
        "method": "sparsegpt", "rounding": "obs", "order": "sequential",
        "num_samples": 64, "seq_len": 512,
    },
    "best": {
        "method": "sparsegpt", "rounding": "obs", "order": "sequential", "reconstruct": 2,
        "num_samples": 128, "seq_len": 512,
    },
}  # fmt: skip
METHOD_OPTIONS = ("alpha", "gradient_norm", "gradient_mode", "damping")
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
    click.option(
        "--damping", type=float, help="sparsegpt, alps: share of the mean diagonal (0.01)."
    ),
)
values_options = options(
    click.option(
        "--values",
        type=click.Choice(["float", "int8", "int4"]),
        default="float",
        show_default=True,
        help="How kept weights are stored: as they are, or rounded to codes with group scales.",
    ),
    click.option(
        "--group-size",
        type=click.Choice(["auto", "32", "64", "96", "128", "192", "256", "row"]),
        help="Columns per scale of codes; auto (default) is the largest of 128, 96, 64, "
        "32 that divides the linear's.",
    ),
)
head_option = click.option(
    "--head",
    type=click.Choice(["float", "int8", "int4"]),
    default="float",
    show_default=True,
    help="How the output head is stored: as it is, or rounded to codes. A head that is tied to the "
    "embeddings becomes a rounded copy, and the embeddings stay.",
)
step_options = options(
    click.option(
        "--rounding",
        type=click.Choice(["nearest", "mse", "obs"]),
        default="nearest",
        show_default=True,
        help="How integer codes are found: to the nearest; with scales of least error; or so "
        "that the weights not yet rounded make up for it (GPTQ; joint with sparsegpt's mask).",
    ),
    click.option("--refit", is_flag=True, help="Least squares on the weights that stay."),
    click.option(
        "--reconstruct",
        type=click.IntRange(0),
        default=0,
        show_default=True,
        metavar="EPOCHS",
        help="Train each pruned decoder layer towards the dense one, so many times over the text.",
    ),
)
recipe_options = options(
    click.option(
        "--preset",
        type=click.Choice(sorted(PRESETS)),
        help="Sets method, steps, order and samples, as far as no option does: fast takes minutes, "
        "best a few times as long.",
    ),
    click.option(
        "--method", default="gblm", show_default=True, help=f"One of {', '.join(METHODS)}."
    ),
    click.option(
        "--pattern",
        default="2:4",
        show_default=True,
        help="2:4, 4:8, 8:16, any N:M (N kept of M), a sparsity such as 0.5, tiles (16x16@0.5), "
        "unstructured, dense.",
    ),
    click.option("--sparsity", type=float, help="Fraction of zeros for --pattern unstructured."),
    values_options,
    step_options,
    head_option,
    method_options,
    click.option(
        "--calibration",
        default="pydoc",
        show_default=True,
        help="A .txt, .jsonl or .parquet file, or pydoc, wikitext2, c4.",
    ),
    click.option("--num-samples", type=click.IntRange(1), default=128, show_default=True),
    click.option(
        "--seq-len",
        type=click.IntRange(2),
        default=2048,
        show_default=True,
        help="Tokens per sample.",
    ),
    click.option(
        "--batch-size",
        type=click.IntRange(1),
        default=1,
        show_default=True,
        help="Samples per forward pass.",
    ),
    click.option("--seed", type=int, default=0, show_default=True),
    click.option(
        "--bos/--no-bos",
        default=True,
        show_default=True,
        help="Begin windows with what the tokenizer puts before a prompt; the papers leave it out.",
    ),
    click.option(
        "--prefix",
        type=click.Choice(["pruned", "dense"]),
        default="pruned",
        show_default=True,
        help="Whose activations a layer sees: the pruned layers' before it, or the dense model's.",
    ),
    click.option(
        "--order",
        type=click.Choice(["layer", "sequential"]),
        default="layer",
        show_default=True,
        help="Observe a whole decoder layer before pruning it, or linear by linear in one pass.",
    ),
    click.option(
        "--stats",
        type=click.Path(path_type=str),
        help="Use statistics that --save-stats wrote; no calibration pass.",
    ),
    dtype_option,
    device_option,
    click.option("--targets", multiple=True, help="Glob of module names to prune; repeatable."),
    click.option(
        "--ignore", multiple=True, help="Glob of module names to leave dense; repeatable."
    ),
    click.option(
        "--recipe",
        type=click.Path(path_type=Path),
        help="A recipe.json; replaces all options that are part of it.",
    ),
)


def read_recipe(
    ctx: click.Context, recipe: Path | None, given: dict[str, Any], own: frozenset[str]
) -> Recipe:
    """The recipe that a command line asks for.

    Args:
        ctx: of the command.
        recipe: the file to take instead of options.
        given: values of `recipe_options`, and "model".
        own: options of the command itself, which go with a file, too.
    """
    from gblm.recipe import Recipe

    if given["stats"] is not None:
        _refuse_given(ctx, CALIBRATION_OPTIONS, "does not go with --stats")
    if recipe is None:
        return Recipe.from_dict(_fields(**_with_preset(ctx, **given)))
    others = ctx.params.keys() - own - {"recipe", "model"}
    _refuse_given(ctx, others, "does not go with --recipe: edit the recipe instead")
    chosen = Recipe.from_file(recipe)
    return chosen.model_copy(update={"model": given["model"]}) if given["model"] else chosen


def values_spec(values: str, group_size: str | None) -> str:
    """What `values_options` ask for, as `gblm.values.parse_values` reads it."""
    if values != "float":
        return f"{values}:{group_size or 'auto'}"
    if group_size is not None:
        raise click.UsageError("--group-size goes with --values int8 or int4.")
    return values


def _refuse_given(ctx: click.Context, names: Iterable[str], why: str) -> None:
    """Refuse options that something else would silently win over."""
    from click.core import ParameterSource

    for name in names:
        if ctx.get_parameter_source(name) == ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--{name.replace('_', '-')} {why}.")


def _with_preset(ctx: click.Context, preset: str | None, **given: Any) -> dict[str, Any]:
    """The options, where the preset's own take the place of those that were not given."""
    from click.core import ParameterSource

    own = PRESETS.get(preset or "", {})
    if given["values"] == "float":
        own = {name: value for name, value in own.items() if name != "rounding"}
    if given["stats"] is not None and preset:
        raise click.UsageError("--preset does not go with --stats: it calibrates its own way.")
    source = ctx.get_parameter_source
    return given | {n: v for n, v in own.items() if source(n) != ParameterSource.COMMANDLINE}


def _fields(
    model: str | None,
    method: str,
    pattern: str,
    sparsity: float | None,
    values: str,
    group_size: str | None,
    rounding: str,
    refit: bool,
    reconstruct: int,
    head: str,
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
        "values": values_spec(values, group_size),
        "rounding": rounding,
        "refit": {} if refit else None,
        "reconstruct": {"epochs": reconstruct} if reconstruct else None,
        "head": head,
        "options": {key: value for key, value in options.items() if value is not None},
        "calibration": {"source": calibration, **rest},
        "stats": stats,
        "targets": targets,
        "ignore": ignore,
        "dtype": dtype,
        "device": device,
    }
