"""The options that make a recipe: the same for every command that takes one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

import click

from gblm.commands.common import Command, device_option, dtype_option, options

if TYPE_CHECKING:
    from gblm.recipe import Recipe

logger = logging.getLogger(__name__)

CALIBRATION_OPTIONS = (
    "calibration", "num_samples", "seq_len", "seed", "bos", "prefix", "order",
)  # fmt: skip
# Options that are fields of a recipe as they are.
PLAIN = (
    "model", "method", "rounding", "head", "stats", "targets", "ignore", "dtype", "device",
)  # fmt: skip
# Text of a known domain and twice as much that the dense model writes: docs/log.md.
MIX = "pydoc:1,self:2"
# What the papers did, and what an option has where no preset says otherwise.
PAPER: dict[str, Any] = {
    "method": "gblm", "pattern": "2:4", "values": "float", "head": "float",
    "rounding": "nearest", "reconstruct": 0, "recover": 0, "calibration": "pydoc",
    "num_samples": 128, "seq_len": 2048, "order": "layer", "bos": True,
}  # fmt: skip
FAST = PAPER | {
    "method": "sparsegpt", "pattern": "8:16", "values": "int8", "head": "int8",
    "rounding": "obs", "calibration": MIX, "num_samples": 64, "seq_len": 512,
    "order": "sequential",
}  # fmt: skip
# The steps follow docs/methods.md, the choice docs/results.md.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": PAPER,
    "fast": FAST,
    "recovered": FAST | {"reconstruct": 2, "recover": 65536},
    "best": FAST | {"num_samples": 128, "reconstruct": 4, "recover": 262144},
}


class RecipeCommand(Command):
    """A command that takes a recipe, with the flags that the tables of methods and values give.

    The tables need torch, so the flags are made when the command is used, not when it is imported.
    """

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Add the flags at the first call."""
        own = {parameter.name for parameter in self.params}
        self.params += [flag for flag in method_flags() if flag.name not in own]
        return super().get_params(ctx)


def method_flags() -> list[click.Option]:
    """Make an option of each hyper-parameter that a method offers; what is not given is None."""
    from gblm.methods import flags

    return [
        click.Option([f"--{flag.name.replace('_', '-')}"], help=flag.help, **_typed(flag.kind))
        for flag in flags()
    ]


def _typed(kind: Any) -> dict[str, Any]:
    """Give the arguments of click.Option for the declared type of a field."""
    if kind is bool:
        return {"is_flag": True, "default": None}
    return {"type": click.Choice(get_args(kind)) if get_origin(kind) is Literal else kind}


class LazyHelp(click.Option):
    """An option whose help lists the entries of a table that needs torch."""

    def __init__(self, *args: Any, entries: Callable[[], Iterable[str]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._entries = entries

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Put the entries into the text."""
        text, self.help = self.help, (self.help or "").format(", ".join(self._entries()))
        try:
            return super().get_help_record(ctx)
        finally:
            self.help = text


def _methods() -> Iterable[str]:
    from gblm.methods import METHODS

    return METHODS


def _kinds() -> Iterable[str]:
    from gblm.sparse.values import KINDS

    return (f"{name} ({kind.about})" for name, kind in KINDS.items())


def values_option(default: str | None = None) -> Callable[[Any], Any]:
    """Give the option of how weights are stored; without a default the preset's is taken."""
    return click.option(
        "--values",
        cls=LazyHelp,
        entries=_kinds,
        default=default,
        show_default=True,
        help="How kept weights are stored: {}. Codes take a group size: int8:128, int4:row; int4 "
        "alone is int4:auto, the largest of 128, 96, 64, 32 columns that divides the linear's.",
    )


def head_option(default: str | None = None) -> Callable[[Any], Any]:
    """Give the option of how the head is stored; without a default the preset's is taken."""
    return click.option(
        "--head",
        type=click.Choice(["float", "int8", "int4"]),
        default=default,
        show_default=True,
        help="How the output head is stored: as it is, or rounded to codes. A head that is tied to "
        "the embeddings becomes a rounded copy, and the embeddings stay.",
    )


step_options = options(
    click.option(
        "--rounding",
        type=click.Choice(["nearest", "mse", "obs"]),
        help="How integer codes are found: to the nearest; with scales of least error; or so "
        "that the weights not yet rounded make up for it (GPTQ; joint with sparsegpt's mask).",
    ),
    click.option("--refit", is_flag=True, help="Least squares on the weights that stay."),
    click.option(
        "--reconstruct",
        type=click.IntRange(0),
        metavar="EPOCHS",
        help="Train each pruned decoder layer towards the dense one, so many times over the text.",
    ),
    click.option(
        "--recover",
        type=click.IntRange(0),
        metavar="TOKENS",
        help="Train the whole pruned model towards the dense one, as gblm recover does.",
    ),
)
# What a search takes; a recipe has the rest.
search_options = options(
    click.option(
        "--preset",
        type=click.Choice(sorted(PRESETS)),
        help="Sets what no option does. Default: recovered; paper where a --method is named.",
    ),
    click.option(
        "--method",
        cls=LazyHelp,
        entries=_methods,
        help="One of {}.",
    ),
    click.option(
        "--pattern",
        help="2:4, 4:8, 8:16, any N:M (N kept of M), a sparsity such as 0.5, dense.",
    ),
    values_option(),
    click.option(
        "--calibration",
        help="A .txt, .jsonl or .parquet file, or pydoc, wikitext2, c4; several with shares: "
        "pydoc:1,self:2, where self is what the dense model writes.",
    ),
    click.option("--num-samples", type=click.IntRange(1), help="Of the text."),
    click.option(
        "--seq-len",
        type=click.IntRange(2),
        help="Tokens per sample.",
    ),
    click.option("--seed", type=int, default=0, show_default=True),
    click.option(
        "--bos/--no-bos",
        default=True,
        show_default=True,
        help="Begin windows with what the tokenizer puts before a prompt; the papers leave it out.",
    ),
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
recipe_options = options(
    search_options,
    step_options,
    head_option(),
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
        help="Observe a whole decoder layer before pruning it, or linear by linear in one pass.",
    ),
    click.option(
        "--stats",
        type=click.Path(path_type=str),
        help="Use statistics that --save-stats wrote; no calibration pass.",
    ),
    dtype_option,
)


def read_recipe(
    ctx: click.Context, recipe: Path | None, given: dict[str, Any], own: frozenset[str]
) -> Recipe:
    """The recipe that a command line asks for.

    Args:
        ctx: of the command.
        recipe: the file to take instead of options.
        given: values of `recipe_options` or `search_options`, and "model".
        own: options of the command itself, which go with a file, too.
    """
    from gblm.recipe import Recipe

    if given.get("stats") is not None:
        _refuse_given(ctx, CALIBRATION_OPTIONS, "does not go with --stats")
    if recipe is None:
        return Recipe.from_dict(_fields(**_with_preset(ctx, **given)))
    others = ctx.params.keys() - own - {"recipe", "model"}
    _refuse_given(ctx, others, "does not go with --recipe: edit the recipe instead")
    chosen = Recipe.from_file(recipe)
    return chosen.model_copy(update={"model": given["model"]}) if given["model"] else chosen


def _refuse_given(ctx: click.Context, names: Iterable[str], why: str) -> None:
    """Refuse options that something else would silently win over."""
    from click.core import ParameterSource

    for name in names:
        if ctx.get_parameter_source(name) == ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--{name.replace('_', '-')} {why}.")


def _with_preset(ctx: click.Context, preset: str | None, **given: Any) -> dict[str, Any]:
    """The options, where the preset's own take the place of those that were not given.

    Who names a method, or has statistics, gets what the papers did.
    """
    saved = given.get("stats") is not None
    if saved and preset:
        raise click.UsageError("--preset does not go with --stats: it calibrates its own way.")
    preset = preset or ("paper" if saved or given["method"] else "recovered")
    own = {n: v for n, v in PRESETS[preset].items() if given.get(n) is None}
    # Codes alone are rounded; with a floating --values the head is left floating, too.
    if given["values"] == "float":
        own |= {name: PAPER[name] for name in ("rounding", "head") if name in own}
    chosen = given | own
    if preset != "paper":
        steps = ", reconstructed" if chosen.get("reconstruct") else ""
        steps += f", recovered on {chosen['recover']} tokens" if chosen.get("recover") else ""
        logger.info(
            "preset %s: %s, %s, %s, on %d samples of %d tokens%s",
            preset, chosen["method"], chosen["pattern"], chosen["values"],
            chosen["num_samples"], chosen["seq_len"], steps,
        )  # fmt: skip
    return chosen


def _fields(**given: Any) -> dict[str, Any]:
    """Turn the options that a command has into fields of a Recipe; the others keep its defaults."""
    from gblm.methods import flags
    from gblm.sparse.patterns import parse
    from gblm.sparse.values import parse_values

    if not given["model"]:
        raise click.UsageError("Missing argument 'MODEL'.")
    fields = {name: given[name] for name in PLAIN if name in given}
    text = {name: given[name] for name in CALIBRATION_OPTIONS[1:] if name in given}
    own = {flag.name: given.get(flag.name) for flag in flags()}
    if given.get("refit"):
        fields["refit"] = {}
    if given.get("reconstruct"):
        fields["reconstruct"] = {"epochs": given["reconstruct"]}
    if given.get("recover"):
        fields["recover"] = {
            "tokens": given["recover"], "text": given["calibration"],
            "seed": given["seed"], "bos": given["bos"],
        }  # fmt: skip
    return fields | {
        "pattern": str(parse(given["pattern"])),
        "values": str(parse_values(given["values"])),
        "options": {name: value for name, value in own.items() if value is not None},
        "calibration": {"source": given["calibration"], **text},
    }
