"""The options that make a recipe: the same for every command that takes one.

Options of fields have type, bounds, help and default from the fields of gblm.recipe.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

import click
from click.core import ParameterSource
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from gblm.commands.common import Command, options
from gblm.progress import Progress, no_progress
from gblm.recipe import MIX, Calibration, Recipe

if TYPE_CHECKING:
    from gblm.search.examine import Space

logger = logging.getLogger(__name__)

CALIBRATION = ("num_samples", "seq_len", "seed", "bos", "order", "shrinkage")
# Options that are fields of a recipe as they are.
PLAIN = (
    "model", "method", "dense_ends", "rounding", "head", "ignore", "dtype", "device",
    "max_shard_size",
)  # fmt: skip
FAST: dict[str, Any] = {
    "method": "sparsegpt", "pattern": "8:16", "values": "int4", "budget": "3.7bits",
    "dense_ends": 1, "rounding": "obs", "calibration": MIX, "num_samples": 64, "seq_len": 512,
    "order": "sequential", "shrinkage": 0.33,
}  # fmt: skip
# The steps follow docs/methods.md, the choice docs/results.md. What the papers did is what a recipe
# says of itself.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "fast": FAST,
    "recovered": FAST | {"method": "alps", "num_samples": 128, "reconstruct": 1, "recover": 65536},
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


def field_options(
    model: type[BaseModel], *names: str, defaults: bool = True
) -> Callable[[Any], Any]:
    """Give an option for each of these fields.

    Args:
        model: has the fields.
        names: of the fields; they are the options' names, too.
        defaults: whether an option that is not given has the field's default, or else is None.
    """
    return options(*(_field_option(name, model.model_fields[name], defaults) for name in names))


def _field_option(name: str, field: FieldInfo, default: bool) -> Callable[[Any], Any]:
    flag, words = f"--{name.replace('_', '-')}", _typed(field.annotation, field.metadata)
    if field.annotation is bool:
        flag = f"{flag}/--no-{flag.removeprefix('--')}"
    if default:
        words |= {"default": field.default, "show_default": True}
    if name in TABLES:
        words |= {"cls": LazyHelp, "entries": TABLES[name]}
    return click.option(flag, name, help=field.description, **words)


def _typed(kind: Any, bounds: Sequence[Any] = ()) -> dict[str, Any]:
    """Give the arguments of click.Option for the declared type of a field and its bounds."""
    kind = next(iter(get_args(kind))) if type(None) in get_args(kind) else kind
    if kind is bool:
        return {"is_flag": True, "default": None}
    if get_origin(kind) is Literal:
        return {"type": click.Choice(get_args(kind))}
    if get_origin(kind) is tuple:
        return {"type": str, "multiple": True}
    kinds = ("ge", "gt", "le", "lt")
    found = {name: getattr(b, name) for b in bounds for name in kinds if hasattr(b, name)}
    if not found:
        return {"type": kind}
    low, high = found.get("ge", found.get("gt")), found.get("le", found.get("lt"))
    whole = click.IntRange if kind is int else click.FloatRange
    return {"type": whole(low, high, min_open="gt" in found, max_open="lt" in found)}


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


TABLES: dict[str, Callable[[], Iterable[str]]] = {"method": _methods, "values": _kinds}
# What a search takes; a recipe has the rest.
search_options = options(
    click.option(
        "--budget",
        help="Spread over the linears by what pruning costs each: 3.5bits (per pruned weight, "
        "masks and scales counted), 2.1GB (the whole packed model).",
    ),
    field_options(Recipe, "method", "pattern", "values", defaults=False),
    click.option("--calibration", help=Calibration.model_fields["source"].description),
    field_options(Calibration, "num_samples", "seq_len", defaults=False),
    field_options(Recipe, "device"),
    field_options(Recipe, "ignore", defaults=False),
    click.option(
        "--recipe",
        type=click.Path(path_type=Path),
        help="A recipe.json; replaces all options that are part of it.",
    ),
)
recipe_options = options(
    click.option(
        "--preset",
        type=click.Choice(sorted(PRESETS)),
        help="Sets what no option does. Default: recovered; paper where a --method is named.",
    ),
    search_options,
    field_options(Recipe, "dense_ends", "rounding", defaults=False),
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
    field_options(Recipe, "head", "max_shard_size", defaults=False),
    field_options(Calibration, "seed", "bos", "order", "shrinkage", defaults=False),
    field_options(Recipe, "dtype"),
)


def read_recipe(
    ctx: click.Context,
    recipe: Path | None,
    given: dict[str, Any],
    own: frozenset[str],
    progress: Progress = no_progress,
) -> Recipe:
    """Give the recipe that a command line asks for; a budget is spread over the linears.

    Args:
        ctx: of the command.
        recipe: the file to take instead of options.
        given: values of `recipe_options`, and "model".
        own: options of the command itself, which go with a file, too.
        progress: for progress bars.
    """
    if recipe is None:
        chosen = with_preset(**given)
        if chosen["preset"] != "paper":
            logger.info("preset %s", _in_words(**chosen))
            _advise(**chosen)
        if "budget" not in chosen:
            return Recipe.from_dict(_fields(**chosen))
        from gblm.search.candidates import best, parse_budget

        space = space_of(chosen.get("values"), chosen.get("pattern"))
        return best(spread_recipe(chosen), parse_budget(chosen["budget"]), space, progress)
    for name in ctx.params.keys() - own - {"recipe", "model"}:
        if ctx.get_parameter_source(name) == ParameterSource.COMMANDLINE:
            raise click.UsageError(
                f"--{name.replace('_', '-')} does not go with --recipe: edit the recipe instead."
            )
    found = Recipe.from_file(recipe)
    return found.model_copy(update={"model": given["model"]}) if given["model"] else found


def spread_recipe(chosen: dict[str, Any]) -> Recipe:
    """Give a recipe whose pattern and values a search decides."""
    # Rounding belongs to integer values; recipes without any leave it out.
    return Recipe.from_dict(_fields(**chosen | {"values": "int8", "pattern": "dense"}))


def space_of(values: str | None, pattern: str | None) -> Space:
    """Say what linears may become besides dense: what the options name, or everything."""
    from gblm.search.examine import EVERYTHING, Space
    from gblm.sparse.patterns import NM, parse
    from gblm.sparse.values import parse_values

    kinds = (str(parse_values(values)),) if values else EVERYTHING.values
    if pattern is None:
        return Space(kinds)
    if pattern == "dense":
        return Space(kinds, ())
    if pattern == "unstructured" or isinstance(parse(pattern), NM):
        return Space(kinds, (pattern,))
    raise click.UsageError(
        f"--pattern {pattern} does not go with a budget, which decides the sparsity: give "
        "unstructured, N:M or dense."
    )


def with_preset(preset: str | None = None, **options: Any) -> dict[str, Any]:
    """Give the options that were given, and the preset's own in place of those that were not.

    Who names a method gets what the papers did. The preset's budget is for its own pattern and
    values; a budget decides itself which linears stay dense.
    """
    given = {name: value for name, value in options.items() if value not in (None, ())}
    preset = preset or ("paper" if "method" in given else "recovered")
    if "budget" in given and "dense_ends" in given:
        raise click.UsageError("--dense-ends does not go with --budget, which decides that itself.")
    spread = "budget" in given or not given.keys() & {"pattern", "values", "dense_ends"}
    leave = {"dense_ends"} if spread else {"budget"}
    # Codes alone are rounded.
    leave |= {"rounding"} if given.get("values") == "float" else set()
    if given.get("pattern") == "dense":
        leave |= {"dense_ends"}
        # A budget for dense linears decides their bits.
        leave |= {"values"} if "budget" in given else set()
    own = {name: value for name, value in PRESETS[preset].items() if name not in leave}
    if "values" in PRESETS[preset]:  # the head has those of the linears, but no fewer than 4 bits
        kind = given.get("values", PRESETS[preset]["values"]).partition(":")[0]
        own["head"] = "int4" if kind == "int3" else kind
        if _without_head(given.get("model")):
            own["head"] = "float"
    return {"preset": preset} | own | given


def _without_head(model: str | None) -> bool:
    """Tell whether vLLM could not serve the model with a packed output head, and log that."""
    from gblm.model.folder import ModelFolder
    from gblm.serve.vllm_cli import WITHOUT_HEAD

    kind = model and ModelFolder.open(model).text_config.get("model_type")
    if kind in WITHOUT_HEAD:
        logger.info("head float: vLLM's %s has no place for a packed one", kind)
    return kind in WITHOUT_HEAD


def _in_words(
    *, preset: str, method: str, pattern: str, num_samples: int, seq_len: int,
    values: str = "of so many bits as fit", **rest: Any,
) -> str:  # fmt: skip
    """Say what a preset and the options beside it come to."""
    budget, ends = rest.get("budget"), rest.get("dense_ends")
    words = [] if pattern == "dense" else [method]
    words += [pattern + " or dense" * bool(budget and pattern != "dense"), values]
    words += [f"spread to {budget}"] if budget else []
    words += [f"{ends} layer{'s' * (ends > 1)} dense at each end"] if ends else []
    words += [f"on {num_samples} samples of {seq_len} tokens"]
    words += ["reconstructed"] if rest.get("reconstruct") else []
    words += [f"recovered on {rest['recover']} tokens"] if rest.get("recover") else []
    return f"{preset}: {', '.join(words)}"


def _advise(*, pattern: str, values: str | None = None, **rest: Any) -> None:
    """Say so where the CPU of this machine is not faster for the zeros."""
    from gblm.doctor import has_avx2_alone

    if pattern == "dense" or (values or "").partition(":")[0] != "int4":
        return
    if has_avx2_alone():
        logger.info(
            "with AVX2 alone, as here, int4 with zeros decodes slower than without: --pattern dense"
        )


def _fields(**chosen: Any) -> dict[str, Any]:
    """Turn the options that a command has into fields of a Recipe; the others keep its defaults."""
    from gblm.methods import flags
    from gblm.sparse.patterns import parse
    from gblm.sparse.values import parse_values

    if "model" not in chosen:
        raise click.UsageError("Missing argument 'MODEL'.")
    fields = {name: chosen[name] for name in PLAIN if name in chosen}
    text = {name: chosen[name] for name in CALIBRATION if name in chosen}
    source = chosen.get("calibration", Calibration().source)
    if "pattern" in chosen:
        fields["pattern"] = str(parse(chosen["pattern"]))
    if "values" in chosen:
        fields["values"] = str(parse_values(chosen["values"]))
    if chosen.get("refit"):
        fields["refit"] = {}
    if chosen.get("reconstruct"):
        fields["reconstruct"] = {"epochs": chosen["reconstruct"]}
    if chosen.get("recover"):
        same = {name: text[name] for name in ("seed", "bos") if name in text}
        fields["recover"] = {"tokens": chosen["recover"], "text": source, **same}
    own = {flag.name: chosen[flag.name] for flag in flags() if flag.name in chosen}
    return fields | {"options": own, "calibration": {"source": source, **text}}
